"""A build that cannot succeed stops with one sentence that says what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['build']; runpy.run_path('setup.py', run_name='__main__')"


HOPPER = {"GENPERF_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.mark.parametrize(
    ("sentence", "arguments", "environment"),
    [
        ("'torch' cannot be imported by this build: install torch", ["-c", WITHOUT_TORCH], {}),
        ("no C++ compiler: 'no-such-compiler' is not on PATH", ["setup.py", "build"], {"CXX": "no-such-compiler"}),
        ("GENPERF_CUDA=1 needs nvcc", ["setup.py", "build"], {"GENPERF_CUDA": "1", "CUDA_HOME": "/no/such/folder"}),
        pytest.param("architectures such as 9.0 or 9.0+PTX, got 'Hopper'", ["setup.py", "build"], HOPPER, marks=needs_nvcc),
        ("GENPERF_CUDA must be 0, 1 or auto, got 'yes'", ["setup.py", "build"], {"GENPERF_CUDA": "yes"}),
        (
            "the build failed; the compiler's message is above",
            ["setup.py", "build", "--build-temp", "{tmp}"],
            {"CXXFLAGS": "--no-such-flag"},
        ),
    ],
)
def test_failure_is_one_sentence(sentence, arguments, environment, tmp_path):
    command = [sys.executable, *(argument.format(tmp=tmp_path) for argument in arguments), "--build-lib", str(tmp_path)]
    environment = {**os.environ, "GENPERF_CUDA": "0", **environment}
    run = subprocess.run(command[: None if "-c" not in command else 3], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
