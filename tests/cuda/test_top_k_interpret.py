# SPDX-License-Identifier: Apache-2.0
"""The Triton search of the k nearest codes in the interpreter, in a process of its own (see test_triton_interpret.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpreted_top_k.py"


def test_nearest_codes():
    """No row is wrong, and some are with half of the bound."""
    run = subprocess.run([sys.executable, "-W", "ignore", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0
