# SPDX-License-Identifier: Apache-2.0
"""Extractors of features: callables named on the command line, and Inception."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from digits_world import DIGITS, assert_fails, direct_terms, fid, fid_json, files, statistics_of
from PIL import Image

from genperf.fid.extractors import _import_inception


def test_extractors_run_without_tf32(world, extractors, tmp_path):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for number, chosen in enumerate([("high", True), ("medium", True), ("highest", False)]):
            torch.set_float32_matmul_precision(chosen[0])
            torch.backends.cudnn.allow_tf32 = chosen[1]
            assert fid("--save-stats", tmp_path / f"{number}.npz", world / "low", "--extractor", "fid_extractors:precision") == 0
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == chosen
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert len(extractors.seen) >= 6
    assert set(extractors.seen) == {("highest", False)}


@pytest.mark.parametrize("name", ["Digits", "module", "module.forward"])
def test_factories_modules_and_functions(world, extractors, capsys, name):
    expected = fid_json(capsys, world / "low", world / "high", *DIGITS)
    result = fid_json(capsys, world / "low", world / "high", "--extractor", f"fid_extractors:{name}")
    assert result["distance"] == expected["distance"]


def test_feature_maps_are_averaged(world, extractors, capsys):
    result = fid_json(capsys, world / "low", world / "high", "--extractor", "fid_extractors:maps")
    sides = []
    for name in ("low", "high"):
        images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files(world / name)])
        with torch.no_grad():
            sides += statistics_of(extractors.module.body[0](images[:, None] / 255).double().mean((2, 3)).numpy())
    assert result["d"] == 8
    assert result["distance"] == pytest.approx(sum(direct_terms(*sides)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Digits", "must be inception, dinov2, clip or module.path:callable, got 'Digits'"),
        ("fid_extractors:", "must be inception, dinov2, clip or module.path:callable"),
        ("no_such_module:Digits", "'no_such_module:Digits' cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("fid_extractors:Letters", "cannot be imported: AttributeError: .*Letters"),
        ("fid_extractors:not_callable", "must be a callable that maps images to features, got 3"),
        ("fid_extractors:NeedsArgument", "must be a callable"),
        ("fid_extractors:broken_factory", "cannot be called without arguments: OSError: no weights"),
        ("fid_extractors:raising", r"failed on images \[64, 3, 8, 8\]: RuntimeError: no such layer\.$"),
        ("fid_extractors:dictionary", "'fid_extractors:dictionary': features must be a tensor, got dict"),
        ("fid_extractors:integers", "'fid_extractors:integers': features must .*, got torch.int64"),
        ("fid_extractors:torch.ravel", r"features must have shape \[N, d\] or \[B, d, H, W\], got \[12288\]"),
        ("fid_extractors:short", r"must return features of every image, got \[63, 192\] for images \[64, 3, 8, 8\]"),
        ("fid_extractors:pair", "must return one tensor of features, got 2 outputs"),
        ("fid_extractors:infinite", "'fid_extractors:infinite': features must be finite, got NaN or infinity in 64 of 64"),
    ],
)
def test_invalid_extractors(world, extractors, tmp_path, capsys, name, sentence):
    assert_fails(capsys, ["--save-stats", tmp_path / "a.npz", world / "low", "--extractor", name], sentence, tmp_path)


def test_extractors_are_found_in_the_current_folder(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "fid_extractors", raising=False)
    try:
        assert fid_json(capsys, "low", "high", *DIGITS)["files"] == ["low", "high"]
    finally:
        sys.modules.pop("fid_extractors", None)


@pytest.fixture
def torch_fidelity(monkeypatch, tmp_path):
    """A stand-in for the package with its signature, whose weights are two numbers."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__()
            assert features_list == ["2048"]
            self.scale = torch.nn.Parameter(torch.ones(2))
            self.load_state_dict(torch.load(feature_extractor_weights_path or cached, weights_only=True))

        def forward(self, images):
            assert images.dtype == torch.uint8
            assert images.shape[1] == 3
            return (images.float().flatten(1)[:, 20:22] * self.scale,)

    url = "https://example.org/weights-inception.pth"
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    vars(package.feature_extractor_inceptionv3).update(URL_INCEPTION_V3=url, FeatureExtractorInceptionV3=FeatureExtractorInceptionV3)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", package.feature_extractor_inceptionv3)
    return cached


def test_inception(world, torch_fidelity, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save({"scale": torch.tensor([1.0, 2.0])}, weights)
    result = fid_json(capsys, world / "low", world / "high", "--weights", weights)
    assert result["extractor"] == "inception"
    assert result["d"] == 2
    pixels = [np.stack([np.array(Image.open(path)).ravel()[20:22] for path in files(world / side)]) for side in ("low", "high")]
    expected = sum(direct_terms(*statistics_of(pixels[0] * [1.0, 2.0]), *statistics_of(pixels[1] * [1.0, 2.0])))
    assert result["distance"] == pytest.approx(expected, rel=1e-6)
    torch_fidelity.parent.mkdir(parents=True)
    weights.rename(torch_fidelity)
    assert fid(world / "low", world / "high") == 0
    assert "downloads" not in capsys.readouterr().err


def test_inception_takes_images_of_several_sizes(world, torch_fidelity, tmp_path, capsys):
    torch_fidelity.parent.mkdir(parents=True)
    torch.save({"scale": torch.ones(2)}, torch_fidelity)
    folder = tmp_path / "sizes"
    folder.mkdir()
    rows = []
    for number, (path, size) in enumerate(zip(files(world / "low"), [(8, 8), (8, 8), (12, 5), (9, 9), (8, 8)], strict=False)):
        image = Image.open(path).resize(size)
        image.save(folder / f"{number}.png")
        rows.append(np.array(image).ravel()[20:22])
    low = np.stack([np.array(Image.open(path)).ravel()[20:22] for path in files(world / "low")])
    expected = sum(direct_terms(*statistics_of(np.stack(rows)), *statistics_of(low)))
    said = f"genperf: the images in {str(folder)!r} have several sizes, and inception resizes each to what it takes; --size resizes them"
    for options in ([], ["--batch-size", "2"]):
        assert fid(folder, world / "low", "--json", *options) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["distance"] == pytest.approx(expected, rel=1e-6)
        assert printed.err.count(said) == 1
    assert fid(folder, world / "low", "--size", "8") == 0
    assert "several sizes" not in capsys.readouterr().err


def test_inception_errors(world, torch_fidelity, tmp_path, monkeypatch, capsys):
    def fails(sentence, *options):
        assert_fails(capsys, ["--save-stats", tmp_path / "a.npz", world / "low", *options], sentence, tmp_path)

    fails("the Inception weights from https://example.org/weights-inception.pth cannot be loaded: FileNotFoundError")
    fails("--weights must be a file, got '.*none.pth'", "--weights", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    fails("the Inception weights from '.*text.pth' cannot be loaded: ", "--weights", tmp_path / "text.pth")
    fails("--weights are those of --extractor inception, dinov2 or clip, got --extractor fid_extractors:Digits", "--weights", "a", *DIGITS)
    fails("--pixels must be uint8 for --extractor inception, got signed", "--pixels", "signed")
    fails("takes images of 3 channels, got --channels 1", "--channels", "1")
    assert fid(world / "low", world / "high") == 2
    note = f"genperf: torch-fidelity downloads its Inception weights from https://example.org/weights-inception.pth to {torch_fidelity}."
    assert note in capsys.readouterr().err.splitlines()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    fails("--extractor inception needs the package torch-fidelity .*; install it with `pip install --no-deps torch-fidelity`, or name")


def test_inception_needs_no_torchvision(tmp_path, monkeypatch):
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_torchvision")
    (package / "helpers.py").write_text("URL = 'https://example.org/weights'")
    (package / "feature_extractor_inceptionv3.py").write_text("from torch_fidelity.helpers import URL as URL_INCEPTION_V3")
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for _ in range(2):
            assert _import_inception().URL_INCEPTION_V3 == "https://example.org/weights"
        assert "torch_fidelity" not in sys.modules
        with pytest.raises(ModuleNotFoundError, match="no_such_torchvision"):
            importlib.import_module("torch_fidelity")
    finally:
        for name in ("helpers", "feature_extractor_inceptionv3"):
            sys.modules.pop(f"torch_fidelity.{name}", None)
