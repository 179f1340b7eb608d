# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised GAN: a classifier trained on few labeled and many unlabeled images."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from ..nn.batch_norm import BatchNorm
from ..ops._noise import sample_offset
from ._moving_average import update_average
from .gan import GAN, GANConfig
from .system import evaluating, option, standard_normal

# Standard deviation of the noise on the hidden layers.
LAYER_NOISE = 0.5


@dataclass(frozen=True)
class SemiSupervisedGANConfig(GANConfig):
    """Configuration of a `SemiSupervisedGAN`."""

    num_classes: int = 10
    labels_per_class: int = option(10, "labeled images per class")
    label_seed: int = option(0, "seed of the choice of labeled images")
    labelled_batch: int = option(100, "labeled images per discriminator step")
    unlabelled: bool = option(True, "train on unlabeled images too, False: train only the classifier, on the labeled images")
    input_noise: float = option(0.6, "standard deviation of the noise on the discriminator's input, images in [-1, 1]")
    classifier_ema: float = option(0.995, "decay of the moving average of the discriminator, used for classification, 0: none")
    adversarial_weight: float = option(0.0, "weight of the adversarial loss of the generator")
    feature_matching: float = option(1.0, "weight of feature matching in the generator's loss")
    width: int = option(256, "units of the generator's hidden layers; the discriminator's have 2 to 1/2 times as many")
    lr: float = option(1e-3, "learning rate of the generator")


class SemiSupervisedGAN(GAN):
    """A classifier trained on few labeled and many unlabeled images; Salimans et al., "Improved Techniques for Training
    GANs" (2016), section 5; Odena (2016).

    The discriminator classifies images into K classes and a class of generated images, whose logit is fixed to 0. With the
    other logits l(x) [B, K] and d(x) = logsumexp(l(x), 1), the probability that an image is real is sigmoid(d(x)), and that it is
    real and of class k is exp(l_k(x)) / (1 + exp(d(x))). With labeled images a and labels y, unlabeled images x and noise z:
        discriminator:  F.cross_entropy(l(a), y) + mean softplus(-d(x)) + mean softplus(d(g(z)))
        generator:      feature_matching(f(x), f(g(z)))                     # f: the discriminator's last hidden layer

    Both networks are fully connected, as in the paper for digits: the discriminator with weight normalization (Salimans &
    Kingma 2016) and Gaussian noise on its input and hidden layers in training, the generator with batch normalization. The
    options of `GAN` are supported, except for minibatch discrimination and the penalty "finite-difference", which needs a
    deterministic discriminator.

    `prepare` chooses the labeled images and must be called before the first step. Each discriminator step samples a batch of
    them, the same on every rank.

    Attributes:
        labelled_images, labels: the labeled images [L, C, H, W] and their labels [L]; not in the state_dict.

    Raises:
        ValueError: an invalid configuration.
    """

    Config = SemiSupervisedGANConfig
    config: SemiSupervisedGANConfig
    discriminator: "ClassifyingDiscriminator"
    labelled_images: Tensor | None
    labels: Tensor | None

    def __init__(self, config: SemiSupervisedGANConfig | None = None) -> None:
        super().__init__(config)
        self.classifier = None
        if self.config.classifier_ema:
            self.classifier = AveragedModel(self.discriminator).requires_grad_(False)
        self.register_buffer("labelled_images", None, persistent=False)
        self.register_buffer("labels", None, persistent=False)

    def build_generator(self) -> nn.Module:
        return NormalizedGenerator(self.config.image_shape, self.config.latent_dim, self.config.width)

    def build_discriminator(self) -> "ClassifyingDiscriminator":
        return ClassifyingDiscriminator(self.config.image_shape, self.config.num_classes, self.config.width, self.config.input_noise)

    def prepare(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep `labels_per_class` labels of each class; the choice depends on the labels and `label_seed` only.

        Returns:
            All images, and the labels with -1 in place of removed ones.

        Raises:
            ValueError: labels that are not int64 or out of range, or a class with too few images.
        """
        self.check_images(images)
        name, config = self.name, self.config
        if labels is None or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = None if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{name}: labels must be int64 [{len(images)}], got {got}.")
        present, counts = labels.unique(return_counts=True)
        if len(present) and not 0 <= present[0] <= present[-1] < config.num_classes:
            raise ValueError(f"{name}: labels must be 0 ... {config.num_classes - 1}, got {present[0]} ... {present[-1]}.")
        if not len(present) or counts.min() < config.labels_per_class:
            raise ValueError(
                f"{name}: each class must have at least {config.labels_per_class} images, got {counts.min() if len(counts) else 0}."
            )
        generator = torch.Generator().manual_seed(config.label_seed)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        kept = torch.cat([order[labels[order] == k][: config.labels_per_class] for k in present])
        self.labelled_images = images[kept].to(self.device)
        self.labels = labels[kept].to(self.device)
        remaining = torch.full_like(labels, -1)
        remaining[kept] = labels[kept]
        return images, remaining

    def players_at(self, step: int) -> Sequence[str]:
        """As in `GAN`; only the discriminator with unlabelled=False."""
        return super().players_at(step) if self.config.unlabelled else self.players[:1]

    def step_done(self, player: str) -> None:
        super().step_done(player)
        if player == "discriminator" and self.classifier is not None:
            update_average(self.classifier, self.discriminator, self.config.classifier_ema)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes], by the averaged weights if there are any."""
        self.check_images(images)
        network = self.discriminator if self.classifier is None else cast("ClassifyingDiscriminator", self.classifier.module)
        with evaluating(self):
            return network.classify(images * 2 - 1)[0]

    def _discriminator_losses(self, real: Tensor, condition: None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parts, scores = super()._discriminator_losses(real, condition) if self.config.unlabelled else ({}, {})
        parts["cross_entropy"] = self._cross_entropy()
        return parts, scores

    def _generator_losses(self, real: Tensor, condition: None) -> dict[str, Tensor]:
        parts = super()._generator_losses(real, condition)
        return {**parts, "adversarial": self.config.adversarial_weight * parts["adversarial"]}

    def _cross_entropy(self) -> Tensor:
        if self.labels is None or self.labelled_images is None:
            raise RuntimeError(f"{self.name}: prepare(images, labels) must be called before the first training step.")
        # Drawn on the CPU, where all ranks draw the same; the noise of the discriminator must then be the same too.
        drawn = torch.randperm(len(self.labels))[: self.config.labelled_batch].to(self.labels.device)
        with sample_offset(0):
            logits, _ = self.discriminator.classify(self.labelled_images[drawn] * 2 - 1)
        return F.cross_entropy(logits, self.labels[drawn])

    def _check_config(self) -> None:
        super()._check_config()
        config, name = self.config, self.name
        for field, least in (("num_classes", 2), ("labels_per_class", 1), ("labelled_batch", 1), ("width", 2)):
            if not getattr(config, field) >= least:
                raise ValueError(f"{name}: {field} must be at least {least}, got {getattr(config, field)!r}.")
        for field in ("input_noise", "adversarial_weight"):
            if not 0 <= getattr(config, field) < math.inf:
                raise ValueError(f"{name}: {field} must be a finite number, at least 0, got {getattr(config, field)!r}.")
        if not 0 <= config.classifier_ema < 1:
            raise ValueError(f"{name}: classifier_ema must be in [0, 1), got {config.classifier_ema!r}.")
        if not (config.adversarial_weight or config.feature_matching):
            raise ValueError(f"{name}: adversarial_weight or feature_matching must be above 0, got 0 for both.")
        if config.penalty == "finite-difference":
            raise ValueError(f"{name}: penalty must not compare two passes, since the discriminator is noisy, got {config.penalty!r}.")
        if config.minibatch_kernels:
            raise ValueError(f"{name}: minibatch_kernels must be 0, since single images are classified, got {config.minibatch_kernels}.")


class ClassifyingDiscriminator(nn.Module):
    """Images [B, C, H, W] to logits [B], real or generated, and features [B, width / 2]; the condition must be None."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int, input_noise: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten(), GaussianNoise(input_noise)]
        sizes = [math.prod(image_shape), 2 * width, width, width // 2, width // 2, width // 2]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [_normalized(inputs, outputs), nn.ReLU(), GaussianNoise(LAYER_NOISE)]
        *body, last_noise = layers
        self.body = nn.Sequential(*body)
        self.classes = nn.Sequential(last_noise, _normalized(sizes[-1], num_classes))

    def forward(self, images: Tensor, condition: None = None) -> tuple[Tensor, Tensor]:
        logits, features = self.classify(images)
        return logits.logsumexp(1), features

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes] and features."""
        features = self.body(images)
        return self.classes(features), features


class NormalizedGenerator(nn.Module):
    """Noise [B, latent_dim] to images in [-1, 1], by two hidden layers with batch normalization; the condition must be None."""

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(latent_dim, width),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, math.prod(image_shape)),
            nn.Tanh(),
            nn.Unflatten(1, image_shape),
        )

    def forward(self, z: Tensor, condition: None = None) -> Tensor:
        return self.body(z)


class GaussianNoise(nn.Module):
    """Adds Gaussian noise in training mode; `genperf.sample_offset` applies."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * standard_normal(*x.shape, device=x.device) if self.training and self.std else x


def _normalized(inputs: int, outputs: int) -> nn.Module:
    """A linear layer with weight normalization and Kaiming initialization, which keeps activations above the noise."""
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return weight_norm(layer)
