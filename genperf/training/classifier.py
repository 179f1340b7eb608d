"""A classifier of the data set at hand, whose features and verdicts score samples where Inception's mean little."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import UserError
from .checkpoint import load_checkpoint, save_checkpoint
from .data import LabelledImages, fingerprint
from .seeding import seeded

_FORMAT = "genperf classifier, 1"
_STEPS = 500
_BATCH = 64
_RATE = 4e-3
_SHIFT = 2  # pixels
_FEATURES = 64


class Classifier(nn.Module):
    """A small convolutional network from images [B, C, H, W] in [0, 1] to logits [B, num_classes].

    Args:
        image_shape: C, H, W.
        num_classes: K.

    Attributes:
        num_classes: as above.
        accuracy: share of held-out images that it classifies right; NaN before it is trained.
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
        """The last hidden layer, [B, 64]."""
        return self.hidden(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.hidden(images))


def unsuitable(data: LabelledImages) -> str | None:
    """Why no classifier can be trained on the data, or None."""
    if data.labels is None:
        return "the data have no labels"
    if len(data.labels.unique()) < 2:
        return "all images have the same label"
    return None


def train_classifier(training: LabelledImages, held_out: LabelledImages, device: torch.device) -> Classifier:
    """Train a classifier in a fixed number of steps; the same data give the same one, and torch's generators stay as they are.

    Raises:
        ValueError: no labels, or fewer than two classes.
    """
    if unsuitable(training) is not None:
        raise ValueError(f"train_classifier: images of at least two classes are needed, but {unsuitable(training)}.")
    classes = max(training.num_classes, held_out.num_classes)
    with seeded(0, device):
        classifier = Classifier(tuple(training.images.shape[1:]), classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    draws = np.random.default_rng(0)
    # Where cuDNN chose the algorithm, no two trainings would be alike.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for batch in _batches(len(training.images), draws):
            images, labels = training.images[batch].to(device), training.labels[batch].to(device)
            loss = F.cross_entropy(classifier(_shifted(images, draws)), labels, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.requires_grad_(False).eval()
    right = (predict(classifier, held_out.images) == held_out.labels).double().mean()
    classifier.accuracy = right.item()
    return classifier


def trained_classifier(training: LabelledImages, held_out: LabelledImages, *, folder: Path, device: torch.device) -> Classifier:
    """The classifier of this data that lies in the folder as classifier.pt; trained and written there where there is none.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / "classifier.pt"
    key = " ".join(fingerprint(part) for data in (training, held_out) for part in data)
    state = _load(path, key)
    if state is None:
        classifier = train_classifier(training, held_out, device)
        weights = {name: value.cpu() for name, value in classifier.state_dict().items()}
        save_checkpoint(path, {"format": _FORMAT, "data": key, "accuracy": classifier.accuracy, "model": weights})
        return classifier
    classifier = Classifier(tuple(training.images.shape[1:]), len(state["model"]["output.bias"]))
    classifier.load_state_dict(state["model"])
    classifier.accuracy = state["accuracy"]
    return classifier.to(device).requires_grad_(False).eval()


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """The most probable class of each image, int64 [N], on the CPU."""
    device = classifier.output.weight.device
    return torch.cat([classifier(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)])


def _load(path: Path, key: str) -> dict[str, Any] | None:
    """What the file holds, or None where it has to be made anew."""
    try:
        state = load_checkpoint(path)
    except UserError:
        return None
    fits = isinstance(state, dict) and state.get("format") == _FORMAT and state.get("data") == key
    return state if fits else None


def _batches(count: int, draws: np.random.Generator) -> list[Tensor]:
    """Indices of the images of each step: one permutation after the other."""
    size = min(_BATCH, count)
    epochs = -(-_STEPS // (count // size))
    found = [torch.from_numpy(draws.permutation(count)[: count // size * size]).split(size) for _ in range(epochs)]
    return [batch for epoch in found for batch in epoch][:_STEPS]


def _shifted(images: Tensor, draws: np.random.Generator) -> Tensor:
    """All images of a batch moved by the same few pixels, with their border continued."""
    down, right = (int(step) for step in draws.integers(0, 2 * _SHIFT + 1, 2))
    height, width = images.shape[2:]
    padded = F.pad(images, [_SHIFT] * 4, mode="replicate")
    return padded[:, :, down : down + height, right : right + width]
