"""The Triton kernel of residual_vector_quantize in the interpreter, in a process of its own as in test_triton_interpret.py."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_all_quantizers_in_one_launch():
    script = Path(__file__).parent / "interpreted_residual.py"
    run = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
