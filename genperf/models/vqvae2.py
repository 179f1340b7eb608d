# SPDX-License-Identifier: Apache-2.0
"""VQ-VAE-2: a hierarchy of codes at two resolutions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import signature_of
from ..nn.batch_norm import BatchNorm
from ._code_autoencoder import CodeAutoencoder
from ._convolutional import ResidualBlock, check_convolutional
from .system import evaluating, share, shifted
from .vqvae import VQVAEConfig, image_quantizer, quantized_losses


@dataclass(frozen=True)
class VQVAE2Config(VQVAEConfig):
    """Configuration of a `VQVAE2`; hidden, dim and num_codes apply to both levels."""


class HierarchicalCodes(NamedTuple):
    """Indices, int64."""

    top: Tensor
    """[B, H/4, W/4]"""
    bottom: Tensor
    """[B, H/2, W/2]"""


class VQVAE2Output(NamedTuple):
    reconstruction: Tensor
    """[B, C, H, W]"""
    codes: HierarchicalCodes
    quantizer_loss: Tensor
    """Scalar, the sum over both levels."""


class VQVAE2(CodeAutoencoder):
    """An autoencoder with a two-level hierarchy of codes; Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019).

    Equivalent to:
        fine = encoder(images)                                                              # [B, hidden / 2, H/2, W/2]
        top, top_indices, top_loss = VectorQuantizer(top_encoder(fine))                     # [B, dim, H/4, W/4]
        bottom, bottom_indices, bottom_loss = VectorQuantizer(bottom_encoder(cat([fine, top_decoder(top)])))
        loss = mse(decoder(cat([upsample(top), bottom])), images) + top_loss + bottom_loss  # player "model"
        loss = -log p(top_indices | labels)                                                 # player "top_prior"
        loss = -log p(bottom_indices | top, labels)                                         # player "bottom_prior"

    The downsampling factors are 4 and 2, for small images; the paper has 8 and 4. Encodings of the top level are batch-normalized
    before quantization (Lancucki et al., "Robust Training of Vector Quantized Bottleneck Models", 2020): otherwise the top
    codebook collapses, since the bottom level alone can reconstruct the images.

    Images [B, C, H, W], H and W divisible by 4, are encoded to `HierarchicalCodes`. The priors, `IndexPrior`s, train along with
    the model on its current indices, or after it (`prior_only`); with `prior_width=0` there is only one player. Labels count only
    with `class_conditional`.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = VQVAE2Config
    config: VQVAE2Config
    players = ("model", "top_prior", "bottom_prior")

    def __init__(self, config: VQVAE2Config | None = None) -> None:
        super().__init__(config)
        config = self.config
        if config.hidden < 4 or config.hidden % 4:
            raise ValueError(f"VQVAE2: hidden must be a positive multiple of 4, got {config.hidden}.")
        check_convolutional("VQVAE2", config)
        self.check_prior_options()
        channels, hidden, dim = config.image_shape[0], config.hidden, config.dim
        self.encoder = nn.Sequential(nn.Conv2d(channels, hidden // 2, 4, stride=2, padding=1), ResidualBlock(hidden // 2), nn.ReLU())
        self.top_encoder = nn.Sequential(
            nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1),
            ResidualBlock(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, dim, 1),
            BatchNorm(dim, affine=False),
        )
        self.top_decoder = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1),
            ResidualBlock(hidden),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1),
        )
        self.bottom_encoder = nn.Conv2d(hidden, dim, 1)
        self.top_quantizer = image_quantizer(config)
        self.bottom_quantizer = image_quantizer(config)
        self.upsample = nn.ConvTranspose2d(dim, hidden // 2, 4, stride=2, padding=1)
        self.decoder = nn.Sequential(
            nn.Conv2d(hidden // 2 + dim, hidden // 2, 3, padding=1),
            ResidualBlock(hidden // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden // 2, channels, 4, stride=2, padding=1),
        )
        self.top_prior = self.bottom_prior = None
        if config.prior_width:
            self.top_prior, self.bottom_prior = self.make_prior(), self.make_prior(num_conditions=dim)
        else:
            self.players = ("model",)

    def forward(self, images: Tensor) -> VQVAE2Output:
        self.check_images(images)
        fine = self.encoder(images)
        top, top_indices, top_loss = self.top_quantizer(self.top_encoder(fine))
        bottom, bottom_indices, bottom_loss = self.bottom_quantizer(self._bottom_latents(fine, top))
        return VQVAE2Output(self._decode(top, bottom), HierarchicalCodes(top_indices, bottom_indices), top_loss + bottom_loss)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        """The losses of a player for a batch, by name: reconstruction and quantizer loss for "model", nats per code for the priors."""
        self.check_player(player)
        if player != "model":
            assert self.top_prior is not None
            assert self.bottom_prior is not None
            top, bottom = self.encode(shifted(images, self.config.prior_shift))
            labels = self.prior_labels(labels)
            if player == "top_prior":
                loss = self.top_prior.loss(top, labels=labels)
            else:
                loss = self.bottom_prior.loss(bottom, self._condition(top), labels)
            return {"loss": loss, "nats_per_code": loss.detach()}
        return quantized_losses(self(images), images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> HierarchicalCodes:
        """Indices of the images at both levels, in evaluation mode: EMA and dead codes are not updated."""
        self.check_images(images)
        with evaluating(self):
            fine = self.encoder(images)
            top = self.top_quantizer.encode(self.top_encoder(fine))
            bottom = self._bottom_latents(fine, self.top_quantizer.decode(top))
            return HierarchicalCodes(top, self.bottom_quantizer.encode(bottom))

    @torch.no_grad()
    def decode(self, codes: HierarchicalCodes) -> Tensor:
        """Images [B, C, H, W] of the indices (top, bottom)."""
        top, bottom = codes
        with evaluating(self):
            return self._decode(self.top_quantizer.decode(top), self.bottom_quantizer.decode(bottom)).clamp(0, 1)

    def sample(self, n: int, labels: Tensor | None = None, *, temperature: float | None = None) -> Tensor:
        """Decode n samples from the priors, top level first, with config.sample_temperature unless another one is given.

        Raises:
            ValueError: n below 1, or labels of an unconditional model; those of a conditional one are [n].
            RuntimeError: a model without priors.
        """
        labels = self.sample_labels(n, labels)
        temperature = self.config.sample_temperature if temperature is None else temperature
        if self.top_prior is None or self.bottom_prior is None:
            raise RuntimeError("VQVAE2.sample: sampling needs priors, got prior_width=0.")
        height, width = self.config.image_shape[1:]
        top = self.top_prior.sample(n, height // 4, width // 4, labels=labels, temperature=temperature)
        bottom = self.bottom_prior.sample(n, height // 2, width // 2, self._condition(top), labels=labels, temperature=temperature)
        return self.decode(HierarchicalCodes(top, bottom))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Initialize the codes of both levels from encodings of the images, as the first training step would."""
        self.check_images(images)
        fine = self.encoder(share(images))
        latents = self.top_encoder(fine)
        self.top_quantizer.init_codes(latents)
        top = self.top_quantizer.decode(self.top_quantizer.encode(latents))
        self.bottom_quantizer.init_codes(self._bottom_latents(fine, top))

    def _bottom_latents(self, fine: Tensor, top: Tensor) -> Tensor:
        return self.bottom_encoder(torch.cat([fine, self.top_decoder(top)], 1))

    def _decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.upsample(top), bottom], 1))

    @torch.no_grad()
    def _condition(self, top: Tensor) -> Tensor:
        """The codes of the top level, upsampled to the bottom level, [B, dim, H/2, W/2]."""
        return F.interpolate(self.top_quantizer.decode(top), scale_factor=2)
