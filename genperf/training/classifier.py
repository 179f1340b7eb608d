# SPDX-License-Identifier: Apache-2.0
"""A small classifier trained on the data set itself, to score samples where Inception features are not meaningful."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import UserError
from .checkpoint import load_checkpoint, save_checkpoint, using_checkpoint
from .data import LabeledImages, fingerprint
from .seeding import seeded

_FORMAT = "genperf classifier, 1"
_STEPS = 500
_BATCH = 64
_LEARNING_RATE = 4e-3
_MAX_SHIFT = 2  # pixels
_FEATURES = 64


class Classifier(nn.Module):
    """A small convolutional network from images [B, C, H, W] in [0, 1] to logits [B, num_classes].

    Args:
        image_shape: C, H, W.
        num_classes: K.

    Attributes:
        accuracy: on the held-out images; NaN before training.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.num_classes = num_classes
        self.accuracy = math.nan
        layers: list[nn.Module] = []
        hidden = 16
        while not layers or max(height, width) > 7:
            layers += [nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.MaxPool2d(2, ceil_mode=True)]
            layers += [nn.BatchNorm2d(hidden), nn.ReLU()]
            channels, hidden = hidden, min(2 * hidden, 64)
            height, width = -(-height // 2), -(-width // 2)
        self.hidden = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, _FEATURES), nn.ReLU())
        self.output = nn.Linear(_FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Activations of the last hidden layer, [B, 64]."""
        return self.hidden(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.hidden(images))


def classifier_unavailable(data: LabeledImages) -> str | None:
    """Why a classifier cannot be trained on the data, or None."""
    if data.labels is None:
        return "the data have no labels"
    if len(data.labels.unique()) < 2:
        return "all images have the same label"
    return None


def train_classifier(training: LabeledImages, held_out: LabeledImages, device: torch.device) -> Classifier:
    """Train a classifier for a fixed number of steps.

    Training is deterministic, and torch's random state does not change.

    Raises:
        ValueError: no labels, or fewer than two classes.
    """
    reason, labels = classifier_unavailable(training), training.labels
    if reason is not None or labels is None:
        raise ValueError(f"train_classifier: images of at least two classes are needed, but {reason}.")
    classes = max(training.num_classes, held_out.num_classes)
    with seeded(0, device):
        classifier = Classifier(_image_shape(training.images), classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    draws = np.random.default_rng(0)
    # cuDNN's default algorithms are not deterministic.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for batch in _batch_indices(len(training.images), draws):
            logits = classifier(_shift(training.images[batch].to(device), draws))
            loss = F.cross_entropy(logits, labels[batch].to(device), label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.requires_grad_(False).eval()
    classifier.accuracy = (predict(classifier, held_out.images) == held_out.labels).double().mean().item()
    return classifier


def trained_classifier(training: LabeledImages, held_out: LabeledImages, *, folder: Path, device: torch.device) -> Classifier:
    """Load the classifier of this data from classifier.pt in the folder; if there is none, train it and write it there.

    A folder that cannot be written to is left as it is.
    """
    path = folder / "classifier.pt"
    key = " ".join(fingerprint(part) for data in (training, held_out) for part in data if part is not None)
    classifier = _load(path, key, _image_shape(training.images))
    if classifier is None:
        classifier = train_classifier(training, held_out, device)
        weights = {name: value.cpu() for name, value in classifier.state_dict().items()}
        with suppress(OSError):
            save_checkpoint(path, {"format": _FORMAT, "data": key, "accuracy": classifier.accuracy, "model": weights})
    return classifier.to(device).requires_grad_(False).eval()


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """The most probable class of each image, int64 [N], on the CPU."""
    device = classifier.output.weight.device
    return torch.cat([classifier(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)])


def _load(path: Path, key: str, image_shape: tuple[int, int, int]) -> Classifier | None:
    """The classifier in the file, or None if there is none for this data and this version."""
    try:
        state = load_checkpoint(path)
        with using_checkpoint(path):
            if state["format"] != _FORMAT or state["data"] != key:
                return None
            classifier = Classifier(image_shape, len(state["model"]["output.bias"]))
            classifier.load_state_dict(state["model"])
            classifier.accuracy = float(state["accuracy"])
    except UserError:
        return None
    return classifier


def _image_shape(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _batch_indices(count: int, draws: np.random.Generator) -> list[Tensor]:
    """Indices of the images of each step, from a new permutation for every epoch."""
    size = min(_BATCH, count)
    epochs = -(-_STEPS // (count // size))
    batches = [torch.from_numpy(draws.permutation(count)[: count // size * size]).split(size) for _ in range(epochs)]
    return [batch for epoch in batches for batch in epoch][:_STEPS]


def _shift(images: Tensor, draws: np.random.Generator) -> Tensor:
    """Shift all images of a batch by the same random offset, replicating the border."""
    down, right = (int(offset) for offset in draws.integers(0, 2 * _MAX_SHIFT + 1, 2))
    height, width = images.shape[2:]
    padded = F.pad(images, [_MAX_SHIFT] * 4, mode="replicate")
    return padded[:, :, down : down + height, right : right + width]
