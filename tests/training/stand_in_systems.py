# SPDX-License-Identifier: Apache-2.0
"""Small systems with known scores, and images that they are scored on."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from genperf.models.system import System, SystemConfig, standard_normal
from genperf.training import classifier as classifiers
from genperf.training.classifier import train_classifier
from genperf.training.data import LabeledImages, split_held_out

CPU = torch.device("cpu")
CLASSES = 4  # class 2 has no images


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(classifiers, "_STEPS", 40)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def classifier(data):
    steps, classifiers._STEPS = classifiers._STEPS, 40
    try:
        return train_classifier(*data, CPU)
    finally:
        classifiers._STEPS = steps


def quarters(labels):
    """Noisy images [N, 1, 8, 8] whose class is given by the bright quarter."""
    images = 0.2 * torch.rand(len(labels), 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 0.7
    return images


def make_data(count=200):
    torch.manual_seed(1)
    labels = torch.tensor([0, 0, 1, 3]).repeat(count // 4)
    return split_held_out(LabeledImages(quarters(labels), labels))


class Base(System):
    def __init__(self, config=None):
        super().__init__(config)
        self.factor = torch.nn.Parameter(torch.tensor(0.5))


class Reconstructing(Base):
    """Halves the brightness."""

    def reconstruct(self, images):
        return self.factor * images


class Denoising(Reconstructing):
    def corrupt(self, images):
        return images + 0.5

    def denoise(self, images):
        return 0.1 * images


class Likelihood(Base):
    def negative_elbo(self, images):
        return images.flatten(1).sum(1) + standard_normal(len(images), device=images.device)


class Indices(Base):
    class Config(SystemConfig):
        num_codes = 5

    def encode(self, images):
        return images[:, 0].gt(0.5).long() * 3


class Levels(NamedTuple):
    top: torch.Tensor
    bottom: torch.Tensor


class TwoLevels(Indices):
    def encode(self, images):
        return Levels(super().encode(images)[:, :4, :4], super().encode(images))


class Anomalies(Reconstructing):
    class Config(SystemConfig):
        normal_class = 1

    def anomaly_score(self, images):
        return images[:, 0, 4:].mean((1, 2))  # high where the lower half is bright: class 3


class Classifying(Base):
    class Config(SystemConfig):
        num_classes = CLASSES

    def classify(self, images):
        return F.one_hot(torch.zeros(len(images), dtype=torch.int64), CLASSES).float()

    def sample(self, n, labels=None):
        assert labels is None
        return quarters(torch.zeros(n, dtype=torch.int64))


class Generating(Base):
    """Samples all classes with their frequencies in the data."""

    def sample(self, n, labels=None):
        assert labels is None
        noise = standard_normal(n, device=self.device)
        return quarters(torch.where(noise < 0, 0, torch.where(noise < 0.67, 1, 3)))


class Conditional(Base):
    class Config(SystemConfig):
        num_classes = CLASSES

    def sample(self, n, labels=None):
        assert len(labels) == n
        return quarters(labels)


class Collapsed(Base):
    def __init__(self, image):
        super().__init__()
        self.image = image

    def sample(self, n, labels=None):
        return self.image.expand(n, -1, -1, -1)


class Diverged(Base):
    def sample(self, n, labels=None):
        return torch.full((n, 1, 8, 8), torch.nan)


class NoPrior(Base):
    class Config(SystemConfig):
        prior_width = 0

    def sample(self, n, labels=None):
        raise RuntimeError("no prior")
