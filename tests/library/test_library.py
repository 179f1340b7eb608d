"""Loading the library that suits the processor, its override, and the errors where it cannot be loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genperf import _library, _probe

OPS = Path(__file__).parents[1] / "ops"
KERNELS = Path(__file__).parents[2] / "csrc" / "cpu"


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_best_library_is_loaded():
    expected = os.environ.get("GENPERF_ISA") or _library.runnable_isas()[0]
    assert _library.isa == expected


def test_every_built_library_is_listed():
    features = _probe.cpu_features()
    for isa in _probe.build_info()["isas"].split(","):
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
    # The library of x86-64-v4 also holds the AMX kernels, which only the search has.
    tests = "search" if (isa, _library.isa) == ("x86-64-v4", "amx") else "compiled"
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


def test_uncompiled_checkout_says_so_and_keeps_the_reference(tmp_path):
    package = Path(_library.__file__).parent
    for source in package.rglob("*.py"):
        target = tmp_path / "genperf" / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, genperf
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
    assert "genperf is not compiled here" in result.stdout
    assert "genperf is not compiled here" in result.stderr
