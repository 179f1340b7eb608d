# SPDX-License-Identifier: Apache-2.0
"""Denoising autoencoder."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._choices import Corruption
from .autoencoder import Autoencoder, AutoencoderConfig
from .system import option, standard_normal


@dataclass(frozen=True)
class DenoisingAutoencoderConfig(AutoencoderConfig):
    """Configuration of a `DenoisingAutoencoder`."""

    noise: Corruption = option("gaussian", "kind of noise")
    level: float = option(0.5, "standard deviation of gaussian noise, or fraction of pixels changed by other noise")


class DenoisingAutoencoder(Autoencoder):
    """Reconstructs images from corrupted ones; Vincent et al., "Stacked Denoising Autoencoders" (2010).

    Equivalent to:
        loss = F.mse_loss(model(corrupt(images)), images)

    noise               corrupt(x), u uniform on [0, 1)
    "gaussian"          (x + level * torch.randn_like(x)).clamp(0, 1)
    "salt-and-pepper"   0 where u < level / 2, 1 where u >= 1 - level / 2
    "masking"           0 where u < level

    Noise is independent for each channel of a pixel.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = DenoisingAutoencoderConfig
    config: DenoisingAutoencoderConfig

    def __init__(self, config: DenoisingAutoencoderConfig | None = None) -> None:
        super().__init__(config)
        noise, level, name = self.config.noise, self.config.level, type(self).__name__
        if not 0 <= level < float("inf"):
            raise ValueError(f"{name}: level must be a finite number, at least 0, got {level}.")
        if noise != "gaussian" and level > 1:
            raise ValueError(f"{name}: level must be at most 1, a fraction of the pixels, for noise={noise!r}, got {level}.")

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        self.check_player(player)
        return {"loss": F.mse_loss(self(self.corrupt(images)).to(images.dtype), images)}

    @torch.no_grad()
    def corrupt(self, images: Tensor) -> Tensor:
        """Add noise to images as in training; pixels stay in [0, 1]."""
        self.check_images(images)
        level = self.config.level
        noise = standard_normal(*images.shape, device=images.device).to(images.dtype)
        if self.config.noise == "gaussian":
            return (images + level * noise).clamp(0, 1)
        # A standard normal variable is below quantile(p) with probability p.
        if self.config.noise == "masking":
            return images.masked_fill(noise < _normal_quantile(level), 0)
        tail = _normal_quantile(level / 2)
        return images.masked_fill(noise < tail, 0).masked_fill(noise >= -tail, 1)

    def denoise(self, images: Tensor) -> Tensor:
        """Remove noise from images."""
        return self.reconstruct(images)


def _normal_quantile(probability: float) -> float:
    return torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)).item()
