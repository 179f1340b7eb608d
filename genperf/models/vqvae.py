"""VQ-VAE for images."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.vector_quantizer import VectorQuantizer


@dataclass(frozen=True)
class VQVAEConfig:
    """What a `VQVAE` is built from."""

    image_channels: int = 1
    hidden: int = 64
    """Channels of the convolutions, an even number."""
    dim: int = 32
    """Length of a code."""
    num_codes: int = 256
    decay: float | None = 0.99
    """Of the codebook's moving averages; None for a codebook that learns by gradient."""
    commitment_weight: float = 0.25


class VQVAEOutput(NamedTuple):
    reconstruction: Tensor
    """[B, C, H, W]"""
    indices: Tensor
    """[B, H/4, W/4], int64"""
    quantizer_loss: Tensor
    """Scalar."""


class VQVAE(nn.Module):
    """A convolutional autoencoder whose latent image holds codes; van den Oord et al. (2017).

    Images [B, C, H, W] with H and W divisible by 4, pixels around [0, 1], become indices [B, H/4, W/4] and back.
    """

    downsampling = 4

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQVAEConfig()
        if config.image_channels < 1:
            raise ValueError(f"VQVAE: image_channels must be at least 1, got {config.image_channels}.")
        if config.hidden < 2 or config.hidden % 2:
            raise ValueError(f"VQVAE: hidden must be a positive even number, got {config.hidden}.")
        channels, hidden = config.image_channels, config.hidden
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, hidden // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1),
            ResidualBlock(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, config.dim, 1),
        )
        self.quantizer = VectorQuantizer(
            config.num_codes,
            config.dim,
            decay=config.decay,
            commitment_weight=config.commitment_weight,
            channel_dim=1,
            init="data",
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.dim, hidden, 3, padding=1),
            ResidualBlock(hidden),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden // 2, channels, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> VQVAEOutput:
        quantized, indices, loss = self.quantizer(self._latents(images))
        return VQVAEOutput(self.decoder(quantized), indices, loss)

    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        """The losses of a batch by name; "loss" is their sum, the one to differentiate."""
        output = self(images)
        reconstruction = F.mse_loss(output.reconstruction, images)
        return {
            "loss": reconstruction + output.quantizer_loss,
            "reconstruction": reconstruction.detach(),
            "quantizer": output.quantizer_loss.detach(),
        }

    def encode(self, images: Tensor) -> Tensor:
        """Indices [B, H/4, W/4] of the images; nothing learns from them, in training mode neither."""
        return self.quantizer.encode(self._latents(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Images [B, C, 4h, 4w] of the indices [B, h, w]."""
        return self.decoder(self.quantizer.decode(indices))

    @torch.no_grad()
    def init_codes(self, images: Tensor) -> None:
        """Set the codes to encodings of the images, as the first training step does where nobody else has."""
        self.quantizer.init_codes(self._latents(images))

    def _latents(self, images: Tensor) -> Tensor:
        channels, step = self.config.image_channels, self.downsampling
        if images.dim() != 4 or images.shape[1] != channels or any(size % step for size in images.shape[2:]):
            raise ValueError(f"VQVAE: images must have shape [B, {channels}, H, W], H and W divisible by {step}, got {list(images.shape)}.")
        return self.encoder(images)


class ResidualBlock(nn.Module):
    """x + f(x) with two convolutions that keep size and channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
