# SPDX-License-Identifier: Apache-2.0
"""VQ-VAE."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._typing import signature_of
from ..nn.vector_quantizer import VectorQuantizer
from ._code_autoencoder import CodeAutoencoder, CodeAutoencoderConfig
from ._convolutional import DOWNSAMPLING, check_convolutional, image_decoder, image_encoder
from .system import evaluating, option, share, shifted

if TYPE_CHECKING:
    from .vqvae2 import VQVAE2Output


@dataclass(frozen=True)
class VQVAEConfig(CodeAutoencoderConfig):
    """Configuration of a `VQVAE`."""

    hidden: int = option(64, "channels of the convolutions, an even number")
    dim: int = option(32, "length of a code")
    num_codes: int = option(256, "number of codes")
    decay: float | None = option(0.99, "decay of the EMA codebook, in [0, 1), none: a codebook trained by gradient")
    commitment_weight: float = option(0.25, "weight of the commitment loss")
    replace_dead_below: float = option(0.0, "replace codes whose EMA count falls below this by latents of the batch, 0: never")
    lr: float = option(2e-3, "learning rate of Adam")
    lr_prior: float = option(4e-3, "learning rate of Adam for the prior")
    prior_width: int = option(64, "width of the prior over the codes, 0: no prior and no samples")
    prior_layers: int = option(2, "number of layers of the prior")
    prior_every: int = option(4, "the prior trains on one in this many batches")


class VQVAEOutput(NamedTuple):
    reconstruction: Tensor
    """[B, C, H, W]"""
    indices: Tensor
    """[B, H/4, W/4], int64"""
    quantizer_loss: Tensor
    """Scalar."""


class VQVAE(CodeAutoencoder):
    """A convolutional autoencoder with vector-quantized latents; van den Oord et al., "Neural Discrete Representation Learning" (2017).

    Equivalent to:
        quantized, indices, quantizer_loss = VectorQuantizer(encoder(images))
        loss = mse(decoder(quantized), images) + quantizer_loss                     # player "model"
        loss = -log p(indices | labels)                                             # player "prior"

    Images [B, C, H, W], H and W divisible by 4, are encoded to indices [B, H/4, W/4]. The prior, an `IndexPrior`, trains along
    with the model on its current indices, so `sample` works at any time, or after it (`prior_only`); with `prior_width=0` there is
    only one player. Labels count only with `class_conditional`.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = VQVAEConfig
    config: VQVAEConfig
    players = ("model", "prior")

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        check_convolutional("VQVAE", config)
        self.check_prior_options()
        channels = config.image_shape[0]
        self.encoder = image_encoder(channels, config.hidden, config.dim)
        self.quantizer = image_quantizer(config)
        self.decoder = image_decoder(config.dim, config.hidden, channels)
        self.prior = self.make_prior() if config.prior_width else None
        if self.prior is None:
            self.players = ("model",)

    def forward(self, images: Tensor) -> VQVAEOutput:
        self.check_images(images)
        quantized, indices, loss = self.quantizer(self.encoder(images))
        return VQVAEOutput(self.decoder(quantized), indices, loss)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        """The losses of a player for a batch, by name: reconstruction and quantizer loss for "model", nats per code for "prior"."""
        self.check_player(player)
        if player == "prior":
            assert self.prior is not None
            indices = self.encode(shifted(images, self.config.prior_shift))
            loss = self.prior.loss(indices, labels=self.prior_labels(labels))
            return {"loss": loss, "nats_per_code": loss.detach()}
        return quantized_losses(self(images), images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Indices [B, H/4, W/4] of the images, in evaluation mode: EMA and dead codes are not updated."""
        self.check_images(images)
        with evaluating(self):
            return self.quantizer.encode(self.encoder(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images [B, C, 4h, 4w] of the indices [B, h, w]."""
        with evaluating(self):
            return self.decoder(self.quantizer.decode(indices)).clamp(0, 1)

    def sample(self, n: int, labels: Tensor | None = None, *, temperature: float | None = None) -> Tensor:
        """Decode n samples from the prior, with config.sample_temperature unless another one is given.

        Raises:
            ValueError: n below 1, or labels of an unconditional model; those of a conditional one are [n].
            RuntimeError: a model without a prior.
        """
        labels = self.sample_labels(n, labels)
        temperature = self.config.sample_temperature if temperature is None else temperature
        if self.prior is None:
            raise RuntimeError("VQVAE.sample: sampling needs a prior, got prior_width=0.")
        height, width = (size // DOWNSAMPLING for size in self.config.image_shape[1:])
        return self.decode(self.prior.sample(n, height, width, labels=labels, temperature=temperature))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Initialize the codes from encodings of the images, as the first training step would."""
        self.check_images(images)
        self.quantizer.init_codes(self.encoder(share(images)))


def quantized_losses(output: "VQVAEOutput | VQVAE2Output", images: Tensor) -> dict[str, Tensor]:
    """The losses of a `VQVAE` or `VQVAE2` from its output."""
    reconstruction = F.mse_loss(output.reconstruction, images)
    return {
        "loss": reconstruction + output.quantizer_loss,
        "reconstruction": reconstruction.detach(),
        "quantizer": output.quantizer_loss.detach(),
    }


def image_quantizer(config: VQVAEConfig) -> VectorQuantizer:
    """A quantizer of latents [B, dim, h, w], with codes initialized from the first batch."""
    return VectorQuantizer(
        config.num_codes,
        config.dim,
        decay=config.decay,
        commitment_weight=config.commitment_weight,
        channel_dim=1,
        init="data",
        replace_dead_below=config.replace_dead_below,
    )
