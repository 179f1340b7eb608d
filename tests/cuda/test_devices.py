# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the GPU of their inputs, also where another GPU is current. The driver is a mock."""

import contextlib
import importlib
import re
from pathlib import Path

import genperf.kernels.nearest_code as kernels
import pytest
import torch

BINDINGS = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*_bindings.cpp"))


def test_search_is_launched_on_the_gpu_of_x(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    x, codebook = torch.empty(1, 8, 5, device="meta"), torch.empty(4, 8, device="meta")
    launched = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernels, "nearest_code", lambda *_: launched.append(list(current)))
    importlib.import_module("genperf.ops.nearest_code")._launch_search(x, codebook, None, False)
    assert launched == [[x.device]]
    assert current == []


@pytest.mark.parametrize("path", BINDINGS, ids=lambda path: path.stem)
def test_bindings_make_the_gpu_of_x_current(path):
    """Every function that is registered as an op makes x's device current, by a Launch, before it starts a kernel."""
    source = path.read_text()
    registered = re.findall(r'm\.impl\(\s*"\w+",\s*TORCH_BOX\(&(\w+)\)\)', source)
    assert registered
    for name in registered:
        body = re.search(rf"^\S.*\b{name}\((?:.|\n)*?^}}", source, re.MULTILINE)
        assert body, name
        launch = re.search(r"(?:const )?Launch (\w+)[({]", body[0])
        assert launch, name
        assert re.search(rf"\b{launch[1]}\b", body[0][launch.end() :]), name
