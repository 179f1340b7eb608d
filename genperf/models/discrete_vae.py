# SPDX-License-Identifier: Apache-2.0
"""Discrete variational autoencoder."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.batch_norm import BatchNorm
from ..nn.gumbel_quantizer import GumbelQuantizer
from ._code_autoencoder import CodeAutoencoder, CodeAutoencoderConfig
from ._convolutional import DOWNSAMPLING, check_convolutional, image_decoder, image_encoder
from .system import evaluating, option, shifted

# Initial standard deviation of the logits of a code, above that of the Gumbel noise, 1.28.
LOGIT_SCALE = 3.0


@dataclass(frozen=True)
class DiscreteVAEConfig(CodeAutoencoderConfig):
    """Configuration of a `DiscreteVAE`."""

    num_codes: int = option(256, "number of codes")
    dim: int = option(32, "length of a code")
    hidden: int = option(64, "channels of the convolutions, an even number")
    hard: bool = option(False, "train with hard, straight-through samples instead of soft mixtures")
    tau_start: float = option(1.0, "temperature at the start of training")
    tau_end: float = option(1 / 16, "temperature at the end of training")
    kl_weight: float = option(0.0, "weight of the mean KL divergence of a position from the uniform prior, in nats")
    lr: float = option(2e-3, "learning rate of Adam")
    lr_prior: float = option(4e-3, "learning rate of Adam for the prior")
    prior_width: int = option(64, "width of the prior over the codes, 0: no prior and no samples")
    prior_layers: int = option(2, "number of layers of the prior")
    prior_every: int = option(4, "the prior trains on one in this many batches")


class DiscreteVAE(CodeAutoencoder):
    """An autoencoder with categorical latents, sampled with the Gumbel-softmax.

    Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (2016); Maddison et al., "The Concrete Distribution" (2016);
    as the first stage of an image generator, Ramesh et al., "Zero-Shot Text-to-Image Generation" (2021).

    Equivalent to:
        tau = tau_start * (tau_end / tau_start) ** progress
        logits = normalization(encoder(images))                             # BatchNorm
        sample, indices, kl = genperf.gumbel_sample(logits, codebook, tau=tau, hard=hard, dim=1)
        reconstruction = F.mse_loss(decoder(sample), images)
        loss = reconstruction + kl_weight * kl.mean()                       # kl in nats per position

    Batch normalization of the logits keeps many codes in use, as before a vector quantizer: Lancucki et al., "Robust Training of
    Vector Quantized Bottleneck Models" (2020). Without it the codebook collapses to a few codes.

    As the temperature decreases, the soft mixtures approach single codes, which evaluation uses. Images [B, C, H, W] are encoded to
    indices [B, H/4, W/4]. The player "prior" trains an autoregressive model of the indices, `IndexPrior`, on some of the
    batches, or after the model (`prior_only`); `sample` draws from it. Labels count only with `class_conditional`.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = DiscreteVAEConfig
    config: DiscreteVAEConfig

    def __init__(self, config: DiscreteVAEConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        check_convolutional("DiscreteVAE", config)
        if config.num_codes < 1:
            raise ValueError(f"DiscreteVAE: num_codes must be at least 1, got {config.num_codes}.")
        for name in ("tau_start", "tau_end"):
            if not 0 < getattr(config, name) < math.inf:
                raise ValueError(f"DiscreteVAE: {name} must be a finite number above 0, got {getattr(config, name)}.")
        if not 0 <= config.kl_weight < math.inf:
            raise ValueError(f"DiscreteVAE: kl_weight must be a finite number, at least 0, got {config.kl_weight}.")
        self.check_prior_options()
        channels = config.image_shape[0]
        self.encoder = image_encoder(channels, config.hidden, config.num_codes)
        self.normalization = BatchNorm(config.num_codes)
        nn.init.constant_(self.normalization.weight, LOGIT_SCALE)
        self.quantizer = GumbelQuantizer(config.num_codes, config.dim, tau=config.tau_start, hard=config.hard, channel_dim=1)
        self.decoder = image_decoder(config.dim, config.hidden, channels)
        self.prior = self.make_prior() if config.prior_width else None
        self.players = ("model", "prior") if config.prior_width else ("model",)

    @property
    def tau(self) -> float:
        """The temperature at the current progress of the training."""
        start, end = self.config.tau_start, self.config.tau_end
        return start * (end / start) ** self.model_progress

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        self.check_player(player)
        if player == "prior":
            assert self.prior is not None
            indices = self.encode(shifted(images, self.config.prior_shift))
            return {"loss": self.prior.loss(indices, labels=self.prior_labels(labels))}
        self.quantizer.set_tau(self.tau)
        quantized, _, kl = self.quantizer(self._logits(images))
        reconstruction, kl = F.mse_loss(self.decoder(quantized).to(images.dtype), images), kl.mean()
        loss = reconstruction + self.config.kl_weight * kl
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Most likely indices [B, H/4, W/4] of images [B, C, H, W]."""
        with evaluating(self):
            return self.quantizer.encode(self._logits(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images [B, C, 4h, 4w] of indices [B, h, w]."""
        with evaluating(self):
            return self.decoder(self.quantizer.decode(indices)).clamp(0, 1)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Decode n samples from the prior.

        Raises:
            ValueError: n below 1, or labels of an unconditional model; those of a conditional one are [n].
            RuntimeError: a model without a prior.
        """
        labels = self.sample_labels(n, labels)
        if self.prior is None:
            raise RuntimeError("DiscreteVAE.sample: sampling needs a prior, got prior_width=0.")
        height, width = (side // DOWNSAMPLING for side in self.config.image_shape[1:])
        with evaluating(self):
            return self.decode(self.prior.sample(n, height, width, labels=labels, temperature=self.config.sample_temperature))

    def _logits(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.normalization(self.encoder(images))
