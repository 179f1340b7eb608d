"""Loading: the right library for the processor, overrides, and failures that are not hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genperf import _library, _probe

# The tests of everything that is compiled, csrc/cpu/<op>.cpp.
COMPILED = sorted(path.stem for path in (Path(__file__).parents[2] / "csrc" / "cpu").glob("*.cpp"))
OP_TESTS = [str(path) for op in (*COMPILED, "noise") if (path := Path(__file__).parents[1] / "ops" / f"test_{op}.py").exists()]


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_best_library_is_loaded():
    expected = os.environ.get("GENPERF_ISA") or _library.runnable_isas()[0]
    assert _library.isa == expected


def test_every_built_library_is_listed():
    features = _probe.cpu_features()
    for isa in _probe.build_info()["isas"].split(","):
        assert (isa in _library.runnable_isas()) == features.get(isa, True)


@pytest.mark.parametrize("isa", _library.runnable_isas()[1:])
def test_op_tests_pass_on(isa):
    """Every instruction set below the best one, which the rest of the run has used."""
    if os.environ.get("GENPERF_ISA"):
        pytest.skip("this run is already for one instruction set")
    # AMX is code of the search within the library of x86-64-v4.
    same_library = (isa, _library.isa) == ("x86-64-v4", "amx")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not contract and not compile and not derivatives and not host",
        *(path for path in OP_TESTS if not same_library or "nearest_code" in path or "vector_quantize" in path),
    ]
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
