# SPDX-License-Identifier: Apache-2.0
"""Deterministic autoencoder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import signature_of
from ._convolutional import DOWNSAMPLING, check_convolutional, vector_decoder, vector_encoder
from .system import System, SystemConfig, evaluating, option


@dataclass(frozen=True)
class AutoencoderConfig(SystemConfig):
    """Configuration of an `Autoencoder`."""

    dim: int = option(32, "length of a code")
    hidden: int = option(32, "channels of the convolutions, an even number")
    lr: float = option(2e-3, "learning rate of Adam")


class Autoencoder(System):
    """Compresses an image to a short vector and back; Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with
    Neural Networks" (2006), with convolutions.

    Equivalent to:
        loss = F.mse_loss(decoder(encoder(images)), images)

    The decoder has no output activation: its outputs are clamped to [0, 1] except in the loss. A sigmoid would saturate on mostly
    dark images and stop learning. Codes are floats [B, dim] without bounds.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = AutoencoderConfig
    config: AutoencoderConfig
    downsampling = DOWNSAMPLING

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__(config)
        self.encoder, self.decoder = self.build_networks()

    def build_networks(self) -> tuple[nn.Module, nn.Module]:
        """An encoder from images to codes [B, dim] and a decoder back; subclasses may override it."""
        config = self.config
        check_convolutional(type(self).__name__, config)
        encoder = vector_encoder(config.image_shape, config.hidden, config.dim)
        return encoder, vector_decoder(config.dim, config.hidden, config.image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions of the images, differentiable and not clamped to [0, 1]."""
        self.check_images(images)
        return self.decoder(self.encoder(images))

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        self.check_player(player)
        return {"loss": F.mse_loss(self(images).to(images.dtype), images)}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, dim] of images [B, C, H, W]."""
        self.check_images(images)
        with evaluating(self):
            return self.encoder(images)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, C, H, W] of codes [B, dim]."""
        with evaluating(self):
            return self.decoder(codes).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    def latent_grid(self, n: int, images: Tensor) -> Tensor:
        """Images [n * n, C, H, W], row by row, decoded from the `latent_plane` of the codes of `images`."""
        return self.decode(latent_plane(self.encode(images), n))


def latent_plane(codes: Tensor, n: int, *, extent: float = 2.0) -> Tensor:
    """A square grid of codes on the plane of the first two principal components of given codes.

    The grid is centered at their mean and extends `extent` standard deviations to each side.

    Args:
        codes: [N, dim], N >= 3, dim >= 2.
        n: number of points along each side.

    Returns:
        [n * n, dim], row by row; the first component decreases from row to row, the second increases along a row.

    Raises:
        ValueError: codes of another shape, or n below 1.
    """
    if codes.dim() != 2 or codes.shape[0] < 3 or codes.shape[1] < 2:
        raise ValueError(f"latent_plane: codes must have shape [N, dim] with N at least 3 and dim at least 2, got {list(codes.shape)}.")
    if n < 1:
        raise ValueError(f"latent_plane: n must be at least 1, got {n}.")
    mean = codes.mean(0)
    _, lengths, directions = torch.linalg.svd(codes - mean, full_matrices=False)
    # Singular vectors are unique up to sign: make the largest component positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    axes = directions * torch.where(largest < 0, -1, 1) * lengths[:, None] / (len(codes) - 1) ** 0.5
    steps = torch.linspace(-extent, extent, n, dtype=codes.dtype, device=codes.device) if n > 1 else codes.new_zeros(1)
    down, along = torch.meshgrid(-steps, steps, indexing="ij")
    return mean + down.reshape(-1, 1) * axes[0] + along.reshape(-1, 1) * axes[1]
