# SPDX-License-Identifier: Apache-2.0
"""docs/drop-ins.md names every option and method of the libraries that genperf.compat replaces, as far as they are installed."""

import importlib
import importlib.util
import inspect
import sys
import types

import drop_ins
import pytest
from drop_ins import DIFFERS, MISSING, PLAIN
from torch import nn

pytest.importorskip("torchmetrics")

ENTRIES = {entry.path: entry for library in drop_ins.LIBRARIES for entry in library.entries()}


def upstream_of(entry, monkeypatch):
    module, name = entry.path.split(":")
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"needs {module.partition('.')[0]}")
    if module == "pytorch_fid.fid_score" and importlib.util.find_spec("torchvision") is None:
        for missing in ("torchvision", "torchvision.transforms", "pytorch_fid.inception"):
            monkeypatch.setitem(sys.modules, missing, types.ModuleType(missing))
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
        sys.modules["pytorch_fid.inception"].InceptionV3 = type("InceptionV3", (), {"BLOCK_INDEX_BY_DIM": {2048: 3}})
        monkeypatch.delitem(sys.modules, "pytorch_fid.fid_score", raising=False)
    return getattr(importlib.import_module(module), name, None)


@pytest.mark.parametrize("path", [path for path in ENTRIES if not path.startswith("vector_quantize_pytorch:")])
def test_options_and_methods_are_those_of_upstream(path, monkeypatch):
    entry, upstream = ENTRIES[path], upstream_of(ENTRIES[path], monkeypatch)
    if entry.genperf is None:
        assert entry.instead
        return
    expected = [option for option in drop_ins.signature_options(upstream) if option not in entry.missing]
    assert drop_ins.signature_options(entry.genperf) == expected
    if inspect.isclass(upstream):
        methods = {name for name, value in vars(upstream).items() if inspect.isfunction(value) and name[0] != "_"}
        assert methods - {"forward"} <= {*entry.methods, *entry.missing}
        assert all(callable(getattr(entry.genperf, name)) for name in entry.methods)


@pytest.mark.parametrize("path", ENTRIES)
def test_notes_are_of_options(path):
    entry = ENTRIES[path]
    options = {*entry.options(), ""}
    for status, notes in ((DIFFERS, entry.differs), (PLAIN, entry.plain), (MISSING, entry.missing)):
        assert set(notes) <= options, status
        assert not any(note.endswith(".") for note in notes.values())


def test_every_class_of_compat_is_listed():
    listed = {entry.genperf for entry in ENTRIES.values()}
    for module in (
        drop_ins.diffusers,
        drop_ins.taming,
        drop_ins.torcheval,
        drop_ins.vqp,
        importlib.import_module("genperf.compat.torchmetrics"),
    ):
        classes = {value for value in vars(module).values() if inspect.isclass(value) and value.__module__.startswith(module.__name__)}
        assert {each for each in classes if each.__name__[0] != "_"} <= listed
    assert all(issubclass(entry.genperf, nn.Module) for path, entry in ENTRIES.items() if path.startswith("vector_quantize_pytorch:"))


def test_page_has_the_tables():
    page = drop_ins.PAGE.read_text()
    assert drop_ins.rendered(page) == page, "run `python tests/compat/drop_ins.py`"
