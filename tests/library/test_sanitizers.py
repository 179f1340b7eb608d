# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of compiled kernels on it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genperf import _library

ROOT = Path(__file__).parents[2]


def runtime(name):
    """Path of a sanitizer's runtime, which must be loaded before the libraries of Python."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.skipif(shutil.which("g++") is None or runtime("libasan.so") is None, reason="g++ with sanitizer runtimes is not installed")
def test_compiled_tests_pass_under_sanitizers(tmp_path):
    checkout = tmp_path / "source"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "runs", "__pycache__", "*.egg-info"))
    # -Og compiles in half the time of -O1, and the tests take as long. Functions with hundreds of memory accesses call their checks:
    # inlined, they double the time to compile the largest file.
    flags = "-Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    flags += " --param asan-instrumentation-with-call-threshold=500"
    environment = {**os.environ, "CXX": "g++", "CXXFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined", "GENPERF_CUDA": "0"}
    environment["GENPERF_BUILD_ISAS"] = _library.built_isa(_library.isa)  # the one that is loaded
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
        # Python and torch keep memory until the process ends, which is no leak of genperf.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        # Two threads that sleep while they wait: spinning takes the core from the other tests and more than doubles the time.
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    marks = "compiled and not once and not unsanitized"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, "ops"]
    run = subprocess.run(command, cwd=checkout / "tests", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    where = subprocess.run(
        [sys.executable, "-c", "import genperf; print(genperf.__file__)"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert str(tmp_path / "built") in where.stdout, where.stdout + where.stderr
