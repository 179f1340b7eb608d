# SPDX-License-Identifier: Apache-2.0
"""The modules and public names of genperf at commit 27c15df can be imported from where they were."""

import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from genperf._moved import MOVED

IMPORTS = Path(__file__).with_name("imports.txt").read_text().splitlines()
# Modules that need an optional package.
NEEDS = {"genperf.compat.torchmetrics": "torchmetrics", "genperf.kernels.nearest_code": "triton"}


@pytest.mark.parametrize("entry", IMPORTS)
def test_import(entry):
    path, _, name = entry.partition(":")
    if path in NEEDS:
        pytest.importorskip(NEEDS[path])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = import_module(path)
        assert not name or hasattr(module, name)


def test_every_moved_module_is_tested():
    assert {*MOVED} <= {*IMPORTS}


STATEMENTS = {
    "import genperf.cli.runs; module = genperf.cli.runs": ("genperf.cli.runs", "genperf.training.runs"),
    "from genperf.cli.training import Training": ("genperf.cli.training", "genperf.training.trainer"),
    "from genperf.cli import images as module": ("genperf.cli.images", "genperf.fid.images"),
    "from genperf.nn.joint import joint_mean": ("genperf.nn.joint", "genperf._distributed"),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_moved_module_warns_where_it_is_imported(statement, monkeypatch):
    old, new = STATEMENTS[statement]
    package, _, leaf = old.rpartition(".")
    monkeypatch.delitem(sys.modules, old, raising=False)
    monkeypatch.delattr(import_module(package), leaf, raising=False)
    found = {}
    with pytest.warns(DeprecationWarning, match=re.escape(f"{old} is now {new}.")) as caught:
        exec(compile(statement, "caller.py", "exec"), found)
    assert [warning.filename for warning in caught] == ["caller.py"]
    module = import_module(new)
    assert module.__name__ == module.__spec__.name == new
    assert found.get("module", module) is module


def test_genperf_alone_imports_no_moved_module():
    code = "import sys, genperf; print([name for name in genperf._moved.MOVED if name in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
