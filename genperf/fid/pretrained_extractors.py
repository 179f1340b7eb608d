# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of the package transformers as extractors, from a folder of weights."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import UserError, reason


class _Kind(NamedTuple):
    model: str  # the class in transformers
    features: Callable[[Any], Tensor]  # of its output
    mean: tuple[float, float, float]  # of the pixels in training
    std: tuple[float, float, float]
    size: int | None  # of the images; None for that in the model's configuration
    example: str


PRETRAINED = {
    # As in dgm-eval: the class token after the last normalization.
    "dinov2": _Kind(
        "Dinov2Model",
        lambda output: output.last_hidden_state[:, 0],
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        224,
        "facebook/dinov2-large",
    ),
    # As in CMMD: the projected embedding.
    "clip": _Kind(
        "CLIPVisionModelWithProjection",
        lambda output: output.image_embeds,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        None,
        "openai/clip-vit-large-patch14-336",
    ),
}


class PretrainedExtractor(nn.Module):
    """Resizes images, float32 [B, 3, H, W] in [0, 1], with an antialiased bicubic filter, normalizes them, and returns features [B, d]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, kind: _Kind) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.size = kind.size or model.config.image_size
        for name, values in (("mean", kind.mean), ("std", kind.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.kind.features(self.model((images - self.mean) / self.std))


def load_pretrained(name: str, folder: Path | None) -> PretrainedExtractor:
    """Load the extractor of that name in `PRETRAINED` from a folder that `save_pretrained` of transformers wrote.

    Raises:
        UserError: the package or the folder is missing, or the folder does not hold such a model.
    """
    kind = PRETRAINED[name]
    if folder is None or not (folder / "config.json").is_file():
        got = "no --weights" if folder is None else f"{str(folder)!r}, which has no config.json"
        raise UserError(
            f"--extractor {name} needs --weights with the folder of a model of transformers, such as {kind.example}, got {got}."
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"--extractor {name} needs the package transformers ({error}); install it with `pip install transformers`."
        ) from error
    try:
        # The whole CLIP has this part; its other weights are skipped.
        model, loading = getattr(transformers, kind.model).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # damaged files raise exceptions of many classes
        raise UserError(f"--weights {str(folder)!r} cannot be loaded as {kind.model}: {reason(error)}.") from error
    if loading["missing_keys"]:
        raise UserError(
            f"--weights {str(folder)!r} must hold a {kind.model}, got a folder without {sorted(loading['missing_keys'])[0]} and "
            f"{len(loading['missing_keys']) - 1} others of its weights."
        )
    return PretrainedExtractor(model, kind)
