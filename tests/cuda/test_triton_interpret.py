# SPDX-License-Identifier: Apache-2.0
"""Triton kernels in the interpreter, in a process of their own because the interpreter must be chosen before they are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpreted_search.py"


def test_nearest_code():
    """`bound` and `accumulation` search adversarial data on a model of the tensor cores. With bounds that are too small, they fail."""
    parts = ("suite", "bound", "half_bound", "accumulation", "ways")
    run = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, *parts], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    wrong_rows = {part: int(number) for part, number in map(str.split, run.stdout.splitlines())}
    assert [wrong_rows[part] for part in ("suite", "bound", "ways")] == [0, 0, 0]
    assert wrong_rows["half_bound"] > 0
    assert wrong_rows["accumulation"] > 0
