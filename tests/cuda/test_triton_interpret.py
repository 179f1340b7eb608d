"""Triton kernels in the interpreter, in processes of their own because the interpreter must be chosen before they are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpreted_search.py"


def wrong_rows(part):
    run = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, part], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.parametrize("part", ["suite", "bound"])
def test_nearest_code(part):
    """The adversarial data of `bound` is searched on a model of the tensor cores."""
    assert wrong_rows(part) == 0


def test_half_of_the_bound_is_too_small():
    assert wrong_rows("half_bound") > 0
