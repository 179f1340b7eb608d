"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: built apart, run by the op tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genperf import _library

ROOT = Path(__file__).parents[2]
COMPILED = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
OP_TESTS = [name for op in COMPILED if (ROOT / "tests" / (name := f"ops/test_{op}.py")).exists()]


def runtime(name):
    """Path of a sanitizer's runtime, which must be loaded before Python's own libraries."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.skipif(shutil.which("g++") is None or runtime("libasan.so") is None, reason="g++ with sanitizer runtimes is not installed")
def test_op_tests_pass_under_sanitizers(tmp_path):
    checkout = tmp_path / "source"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "runs", "__pycache__", "*.egg-info"))
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    environment = {**os.environ, "CXX": "g++", "CXXFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined", "GENPERF_CUDA": "0"}
    environment["GENPERF_BUILD_ISAS"] = "x86-64-v4" if _library.isa == "amx" else _library.isa  # the one that will be loaded
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", tmp_path / "built"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    environment |= {
        "PYTHONPATH": str(tmp_path / "built"),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and torch keep memory until the process ends; what is looked for is wrong access.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "OMP_NUM_THREADS": "2",
    }
    # The reference of every odd size is far slower here and proves nothing more; compiled graphs run other code.
    select = "not every_row and not contract and not compile and not derivatives and not host and not allocation and not larger_than"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select, *OP_TESTS]
    run = subprocess.run(command, cwd=checkout / "tests", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    where = subprocess.run(
        [sys.executable, "-c", "import genperf; print(genperf.__file__)"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert str(tmp_path / "built") in where.stdout, where.stdout + where.stderr
