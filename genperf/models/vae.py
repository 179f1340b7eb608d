# SPDX-License-Identifier: Apache-2.0
"""Variational autoencoder."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._choices import Likelihood
from .._typing import signature_of
from ..ops.gaussian_sample import gaussian_sample
from ._convolutional import DOWNSAMPLING, check_convolutional, vector_decoder, vector_encoder
from .autoencoder import latent_plane
from .system import System, SystemConfig, evaluating, option, shifted, standard_normal

# Initial value of a learned sigma, about the standard deviation of pixels in [0, 1].
SIGMA_START = 0.3


@dataclass(frozen=True)
class VAEConfig(SystemConfig):
    """Configuration of a `VAE`."""

    dim: int = option(20, "length of a code")
    hidden: int = option(32, "channels of the convolutions, an even number")
    likelihood: Likelihood = option("bernoulli", "distribution of a pixel given the code")
    sigma: float | None = option(None, "standard deviation of a gaussian pixel, none: learned")
    beta: float = option(1.0, "weight of the KL divergence")
    shift: int = option(1, "largest random shift of each training batch in pixels, against overfitting; 0: none")
    lr: float = option(2e-3, "learning rate of Adam")


class VAE(System):
    """Variational autoencoder with a standard normal prior; Kingma and Welling, "Auto-Encoding Variational Bayes" (2013);
    with beta other than 1, Higgins et al., "beta-VAE" (2017).

    Equivalent to (likelihood="bernoulli"):
        sample, kl = genperf.gaussian_sample(encoder(images))               # packed moments [B, 2 * dim]
        reconstruction = F.binary_cross_entropy_with_logits(decoder(sample), images, reduction="none").flatten(1).sum(1)
        loss = (reconstruction + beta * kl).mean()

    Losses are in nats per image: sums over pixels and code dimensions, and the mean over the batch. With beta = 1 the loss
    is the negative evidence lower bound.

    likelihood      reconstruction loss, summed over the pixels x; m is the decoder's output, for bernoulli its sigmoid
    "bernoulli"     -x log m - (1 - x) log(1 - m); a gray pixel counts as the mean of binary pixels
    "gaussian"      ((x - m) / sigma)^2 / 2 + log sigma + log(2 pi) / 2; a density, so the loss can be negative. A learned sigma
                    is shared by all pixels: Rybkin et al., "Simple and Effective VAE Training with Calibrated Decoders" (2021)

    Attributes:
        log_sigma: scalar parameter, with the gaussian likelihood and sigma=None.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = VAEConfig
    config: VAEConfig
    downsampling = DOWNSAMPLING

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        check_convolutional("VAE", config)
        if config.sigma is not None and not 0 < config.sigma < math.inf:
            raise ValueError(f"VAE: sigma must be None or a finite number above 0, got {config.sigma}.")
        if not 0 <= config.beta < math.inf:
            raise ValueError(f"VAE: beta must be a finite number, at least 0, got {config.beta}.")
        if config.shift < 0:
            raise ValueError(f"VAE: shift must not be negative, got {config.shift}.")
        self.encoder = vector_encoder(config.image_shape, config.hidden, 2 * config.dim)
        self.decoder = vector_decoder(config.dim, config.hidden, config.image_shape)
        if config.likelihood == "gaussian" and config.sigma is None:
            self.log_sigma = nn.Parameter(torch.tensor(math.log(SIGMA_START)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms of the negative evidence lower bound, [B] each, in nats: reconstruction loss and KL, for one sampled code."""
        self.check_images(images)
        sample, kl = gaussian_sample(self.encoder(images))
        return self._reconstruction_nats(self.decoder(sample), images), kl

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        self.check_player(player)
        reconstruction, kl = (nats.mean() for nats in self(shifted(images, self.config.shift)))
        return {"loss": reconstruction + self.config.beta * kl, "reconstruction": reconstruction.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def negative_elbo(self, images: Tensor, *, samples: int = 1) -> Tensor:
        """The negative evidence lower bound of each image, [B] in nats, with the reconstruction loss averaged over `samples` codes.

        The weight of the KL is 1, not beta. The KL is exact; more samples reduce the variance of the estimate, not the bound.
        """
        if samples < 1:
            raise ValueError(f"VAE.negative_elbo: samples must be at least 1, got {samples}.")
        self.check_images(images)
        with evaluating(self):
            moments = self.encoder(images)
            total = kl = torch.zeros((), device=images.device)
            for _ in range(samples):
                sample, kl = gaussian_sample(moments)
                total = total + self._reconstruction_nats(self.decoder(sample), images)
            return total / samples + kl

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Means [B, dim] of the codes of images [B, C, H, W]."""
        self.check_images(images)
        with evaluating(self):
            return self.encoder(images).chunk(2, 1)[0]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Mean images [B, C, H, W] given codes [B, dim]."""
        with evaluating(self):
            outputs = self.decoder(codes)
        return outputs.sigmoid() if self.config.likelihood == "bernoulli" else outputs.clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    def sample(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Mean images of n codes from the prior.

        Raises:
            ValueError: n below 1, or labels, since the model is unconditional.
        """
        self.check_sample(n, labels)
        return self.decode(standard_normal(n, self.config.dim, device=self.device))

    def latent_grid(self, n: int, images: Tensor) -> Tensor:
        """Images [n * n, C, H, W], row by row, decoded from the `latent_plane` of the codes of `images`."""
        return self.decode(latent_plane(self.encode(images), n))

    def _reconstruction_nats(self, outputs: Tensor, images: Tensor) -> Tensor:
        outputs = outputs.to(images.dtype)  # sums over pixels are inaccurate in half precision
        if self.config.likelihood == "bernoulli":
            nats = F.binary_cross_entropy_with_logits(outputs, images, reduction="none")
        else:
            sigma = self.config.sigma
            log_sigma = self.log_sigma if sigma is None else torch.tensor(math.log(sigma))
            nats = 0.5 * ((images - outputs) * torch.exp(-log_sigma)).square() + log_sigma + 0.5 * math.log(2 * math.pi)
        return nats.flatten(1).sum(1)
