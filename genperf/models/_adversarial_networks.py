# SPDX-License-Identifier: Apache-2.0
"""Generators and discriminators of GANs, fully connected and convolutional, with or without a condition.

Generators map noise [B, latent_dim] and a condition [B, condition_dim] or None to images in [-1, 1]; discriminators map
such images and a condition to logits [B] and features [B, F], their last hidden layer.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._choices import Normalization
from ..nn.batch_norm import BatchNorm
from ..nn.minibatch_discrimination import MinibatchDiscrimination
from ..nn.virtual_batch_norm import VirtualBatchNorm, reference_pass

NORMS: dict[Normalization, Callable[[int], nn.Module]] = {"batch": BatchNorm, "virtual": VirtualBatchNorm, "none": nn.Identity}

# Size of the reference batch of virtual batch normalization.
REFERENCE_BATCH = 64

# Dimensions of each kernel of minibatch discrimination.
KERNEL_DIM = 5


class DenseGenerator(nn.Module):
    """Two hidden layers, with batch normalization."""

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(latent_dim, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, math.prod(image_shape)),
            nn.Tanh(),
            nn.Unflatten(1, image_shape),
        )

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.body(z if condition is None else torch.cat([z, condition], 1))


class DenseDiscriminator(nn.Module):
    """Two hidden layers."""

    def __init__(self, image_shape: tuple[int, int, int], width: int, *, minibatch_kernels: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(image_shape), width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
        )
        self.score = score_layer(width, minibatch_kernels)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.score(features).squeeze(1), features


class ConvGenerator(nn.Module):
    """A linear layer to 2 * width channels at a quarter of height and width, then two transposed convolutions of stride 2.

    A condition is concatenated to the noise. With norm="virtual", the statistics come from a fixed batch of noise, with the
    one-hot conditions in rotation, under the current weights, so samples do not depend on each other.
    """

    reference: Tensor | None

    def __init__(
        self, image_shape: tuple[int, int, int], latent_dim: int, width: int, *, norm: Normalization = "batch", condition_dim: int = 0
    ) -> None:
        super().__init__()
        channels, rows, columns = image_shape
        layer, bias = NORMS[norm], norm == "none"  # a norm has its own bias
        start = (2 * width, rows // 4, columns // 4)
        self.body = nn.Sequential(
            nn.Linear(latent_dim + condition_dim, math.prod(start), bias=bias),
            nn.Unflatten(1, start),
            layer(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=bias),
            layer(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.apply(dcgan_init)
        self.register_buffer("reference", None)
        if norm == "virtual":
            self.reference = torch.randn(REFERENCE_BATCH, latent_dim)
            if condition_dim:
                conditions = torch.eye(condition_dim)[torch.arange(REFERENCE_BATCH) % condition_dim]
                self.reference = torch.cat([self.reference, conditions], 1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = z if condition is None else torch.cat([z, condition], 1)
        if self.reference is None:
            return self.body(inputs)
        with reference_pass(self.body, self.reference):
            return self.body(inputs)


class ConvDiscriminator(nn.Module):
    """Two convolutions of stride 2 to 2 * width channels, then a linear layer.

    A condition adds its inner product with the features: the projection of Miyato & Koyama (2018).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        *,
        norm: Normalization = "batch",
        minibatch_kernels: int = 0,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        channels, rows, columns = image_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=norm == "none"),
            NORMS[norm](2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        features = 2 * width * (rows // 4) * (columns // 4)
        self.score = score_layer(features, minibatch_kernels)
        self.projection = nn.Linear(condition_dim, features, bias=False) if condition_dim else None
        self.apply(dcgan_init)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        logits = self.score(features).squeeze(1)
        if condition is not None and self.projection is not None:
            logits = logits + (self.projection(condition) * features).sum(1)
        return logits, features


def score_layer(features: int, minibatch_kernels: int) -> nn.Sequential:
    """Features [B, F] to logits [B, 1], through minibatch discrimination if there are kernels."""
    if not minibatch_kernels:
        return nn.Sequential(nn.Linear(features, 1))
    similarity = MinibatchDiscrimination(features, minibatch_kernels, KERNEL_DIM)
    return nn.Sequential(similarity, nn.Linear(similarity.out_features, 1))


def dcgan_init(module: nn.Module) -> None:
    """Weights N(0, 0.02^2), scales of norms N(1, 0.02^2), biases 0; Radford et al. (2016)."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNorm | VirtualBatchNorm) and module.weight is not None:
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
