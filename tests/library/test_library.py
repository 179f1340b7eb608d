# SPDX-License-Identifier: Apache-2.0
"""Loading the library that suits the processor, its override, and the errors where it cannot be loaded."""

import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import genperf
from genperf import _library
from genperf.ops import _dispatch

OPS = Path(__file__).parents[1] / "ops"
KERNELS = Path(__file__).parents[2] / "csrc" / "cpu"


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_best_library_is_loaded():
    expected = os.environ.get("GENPERF_ISA") or _library.runnable_isas()[0]
    assert _library.isa == expected


def test_every_built_library_is_listed():
    features = _library.cpu_features()
    for isa in _library.build_info["isas"]:
        assert (isa in _library.runnable_isas()) == features.get(isa, True)


def test_every_kernel_has_compiled_tests():
    kernels = [path.stem for path in KERNELS.glob("*.cpp")]
    assert kernels
    for kernel in kernels:
        assert any("pytest.mark.compiled" in path.read_text() for path in OPS.glob(f"test_{kernel}*.py")), kernel


@pytest.mark.parametrize("isa", _library.runnable_isas()[1:])
def test_compiled_tests_pass_on(isa):
    """Every instruction set below the best one, on which the tests run anyway."""
    if os.environ.get("GENPERF_ISA"):
        pytest.skip("this run is already for one instruction set")
    # The library of x86-64-v4 also holds the kernels of AMX and AVX-512 VNNI, which only the search has.
    tests = "search" if _library.built_isa(isa) == _library.built_isa(_library.isa) else "compiled"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", f"{tests} and not once", str(OPS)]
    result = subprocess.run(command, env={**os.environ, "GENPERF_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


def test_unknown_isa_is_an_error():
    result = run("import genperf", GENPERF_ISA="x86-64-v9")
    assert result.returncode != 0
    assert "GENPERF_ISA=x86-64-v9 cannot run here" in result.stderr


def test_choice_is_logged_at_debug():
    code = """
import logging, torch
logging.basicConfig(level=logging.DEBUG)
import genperf
genperf.nearest_code(torch.zeros(2, 3), torch.zeros(4, 3))
"""
    result = run(code)
    assert "nearest_code runs native" in result.stderr


def copy_of_the_package(folder, libraries=()):
    """Lines of Python after which `import genperf` imports a copy of the package with these of its libraries."""
    package = Path(_library.__file__).parent
    built = ["_build_info.json", *(f"_{name}*.so" for name in libraries)] if libraries else []
    for source in [*package.rglob("*.py"), *(path for pattern in built for path in package.glob(pattern))]:
        target = folder / "genperf" / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return f"""
import sys; sys.path.insert(0, {str(folder)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, genperf
from genperf import _library
"""


def test_uncompiled_checkout_says_so_and_keeps_the_reference(tmp_path):
    code = f"""
{copy_of_the_package(tmp_path)}
x, codebook = torch.randn(5, 3), torch.randn(4, 3)
print(genperf.nearest_code(x, codebook).shape)
try:
    genperf.nearest_code(x, codebook, impl="native")
except NotImplementedError as error:
    print(error)
"""
    result = run(code, PYTHONWARNINGS="default")
    assert result.returncode == 0, result.stderr
    assert "torch.Size([5])" in result.stdout
    assert "is a source tree of genperf without compiled libraries" in result.stdout
    # At the line that imports genperf, though the warning comes from a module within.
    assert re.search(r"^<string>:\d+: RuntimeWarning: .* is a source tree of genperf without compiled libraries", result.stderr, re.M)


def test_triton_search_is_available_without_compiled_libraries(tmp_path):
    code = f"""
{copy_of_the_package(tmp_path)}
from torch._subclasses import FakeTensorMode
assert _library.cpu_failure and _library.triton_failure is None
assert torch._C._dispatch_has_kernel_for_dispatch_key("genperf::nearest_code", "CUDA")
with FakeTensorMode():
    x, codebook = torch.empty(5, 3, device="cuda"), torch.empty(4, 3, device="cuda")
    print(genperf.nearest_code(x, codebook, impl="triton"))
"""
    result = run(code, PYTHONWARNINGS="ignore")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "FakeTensor(..., device='cuda:0', size=(5,), dtype=torch.int64)\n"


@pytest.mark.parametrize("op", ["nearest_code", "nearest_codes"])
def test_schemas_of_python_launchers_are_those_of_the_library(op):
    """They are defined in Python where no library defines them."""
    source = (Path(_library.__file__).parent / "ops" / f"{op}.py").read_text()
    schema = str(getattr(torch.ops.genperf, op).default._schema).removeprefix(f"genperf::{op}")
    assert re.search(rf'@implement_on_cuda\(\s*"{op}", "{re.escape(schema)}"\s*\)', source)


@pytest.mark.parametrize(("broken", "kept"), [("cuda", 0), ("cpu", 0), ("cuda", 50_000)])
def test_library_that_does_not_load_is_a_warning_and_a_reason(broken, kept, tmp_path):
    """A file that is no library, or the beginning of one."""
    name = broken if broken == "cuda" else f"cpu_{_library._isa_library(_library.isa).stem.removeprefix('_cpu_')}"
    begin = copy_of_the_package(tmp_path, ["probe", "cpu"])
    library = _library._isa_library(_library.isa).read_bytes()
    (tmp_path / "genperf" / f"_{name}.so").write_bytes(library[:kept] if kept else b"not a library")
    code = f"""
{begin}
from genperf.cli import info
print(genperf.nearest_code(torch.randn(5, 3), torch.randn(4, 3)).shape)
print(*info.info_lines(), sep="\\n")
"""
    result = run(code, PYTHONWARNINGS="default")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"The {broken.upper()} library does not load") == 1
    assert re.search(f"{broken} kernels +unavailable: The {broken.upper()} library does not load", result.stdout)
    assert "torch.Size([5])" in result.stdout


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
    ],
)
def test_architectures_run_on_the_capabilities_they_are_for(arch, capability, runs):
    assert _library._runs_on(arch, capability) == runs


def test_gpu_without_kernels_gets_the_reference_and_one_warning(monkeypatch):
    """Two GPUs: the first has kernels, the second, a Turing card, has none."""
    monkeypatch.setattr(_library, "cuda_archs", ["8.0", "9.0"])
    for failures in ("cuda_device_failures", "triton_device_failures"):
        monkeypatch.setattr(_library, failures, {})
    for failure in ("cuda_failure", "triton_failure"):
        monkeypatch.setattr(_library, failure, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5)].__getitem__)
    monkeypatch.setattr(_dispatch, "_warned", False)
    _library._check_devices()
    assert list(_library.cuda_device_failures) == list(_library.triton_device_failures) == [1]

    def chosen(op, device):
        return _dispatch.choose_impl(op, None, importlib.import_module(f"genperf.ops.{op}").unavailable(device, torch.float32))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("interpolate", torch.device("cuda:0")) == "native"
        assert chosen("nearest_code", torch.device("cuda:0")) == "triton"
    with pytest.warns(RuntimeWarning, match=r"GPU 1 has compute capability 7.5; reinstall .* TORCH_CUDA_ARCH_LIST=7.5") as caught:
        chosen_on_turing = [chosen(op, torch.device("cuda:1")) for op in ("interpolate", "gaussian_sample", "nearest_code")]
    assert chosen_on_turing == ["reference"] * 3
    assert len(caught) == 1


def test_missing_cuda_library_is_one_warning_and_none_where_the_reference_was_asked_for(monkeypatch):
    failure = "genperf was built without CUDA kernels (no nvcc); reinstall it from source to add them."
    monkeypatch.setattr(_library, "cuda_failure", failure)
    monkeypatch.setattr(_dispatch, "_warned", False)

    def penalize(**options):
        with FakeTensorMode():
            return genperf.gradient_norm_penalty(torch.empty(4, 3, device="cuda"), **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalize(impl="reference")
        with genperf.reference_ops():
            penalize()
    with pytest.warns(RuntimeWarning, match="gradient_norm_penalty runs its slower PyTorch reference on CUDA: genperf was built") as caught:
        penalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalize()
    assert [warning.filename for warning in caught] == [__file__]  # the line that called genperf, at any depth


def test_import_leaves_what_takes_seconds_to_others():
    heavy = {"torch._dynamo", "triton", "sympy", "matplotlib", "torchmetrics", "torchvision"}
    code = f"import torch, sys; before = set(sys.modules); import genperf; print(*sorted({heavy} & sys.modules.keys() - before))"
    result = run(code)
    assert result.stdout.split() == ([] if torch.version.cuda is None else ["triton"]), result.stderr
