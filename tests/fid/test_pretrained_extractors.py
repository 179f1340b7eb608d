# SPDX-License-Identifier: Apache-2.0
"""DINOv2 and CLIP as extractors, with random weights."""

import sys

import pytest
import torch
from digits_world import assert_fails
from torch.nn import functional as F

from genperf._errors import UserError
from genperf.fid.extractors import load_extractor

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_folder_of_the_weights_is_needed(name, world, tmp_path, capsys):
    inputs = (world / "low", world / "high", "--extractor", name)
    assert_fails(capsys, inputs, f"--extractor {name} needs --weights .*, got no --weights")
    assert_fails(capsys, (*inputs, "--weights", tmp_path), "which has no config.json")
    assert_fails(capsys, (*inputs, "--pixels", "signed"), f"--pixels must be unit for --extractor {name}")


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"--extractor clip needs the package transformers .*; install it with `pip install transformers`"):
        load_extractor("clip", pixels=None, weights=tmp_path, device=CPU)


def saved(folder, name):
    """A small model of that kind with random weights, saved in the folder."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14}
    if name == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, **sizes))
    else:
        config = transformers.CLIPVisionConfig(image_size=28, intermediate_size=32, projection_dim=10, **sizes)
        model = transformers.CLIPVisionModelWithProjection(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "size", "mean", "std"),
    [
        ("dinov2", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("clip", 28, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_features_are_those_of_the_model(name, size, mean, std, tmp_path):
    model = saved(tmp_path, name)
    extractor = load_extractor(name, pixels=None, weights=tmp_path, device=CPU)
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)
    resized = F.interpolate(images.float() / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    normalized = torch.stack([(resized[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    with torch.no_grad():
        output = model(normalized)
    expected = output.pooler_output if name == "dinov2" else output.image_embeds
    torch.testing.assert_close(extractor(images), expected)


def test_folder_of_another_model_is_an_error(tmp_path):
    saved(tmp_path, "clip")
    with pytest.raises(UserError, match=r"--weights .* (must hold|cannot be loaded as)"):
        load_extractor("dinov2", pixels=None, weights=tmp_path, device=CPU)
