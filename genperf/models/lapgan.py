# SPDX-License-Identifier: Apache-2.0
"""LAPGAN: a GAN for each band of a Laplacian pyramid."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._choices import PyramidKernel
from ..nn.batch_norm import BatchNorm
from ..nn.laplacian_pyramid import LaplacianPyramid
from ._adversarial_networks import score_layer
from .gan import GAN, GANConfig
from .system import System, option, standard_normal


@dataclass(frozen=True)
class LAPGANConfig(GANConfig):
    """Configuration of a `LAPGAN`; the options of `GAN` apply to every level."""

    levels: int = option(2, "number of times images are halved; the pyramid has one band more")
    kernel: PyramidKernel = option("binomial", "filter of the pyramid")
    width: int = option(16, "channels of the networks for the bands")
    hidden: int = option(256, "units of the hidden layers of the networks for the coarse image")
    lr: float = option(5e-4, "learning rate of the generators")
    lr_discriminator: float | None = option(2e-3, "learning rate of the discriminators, none: that of the generators")
    ema: float = option(0.995, "decay of the moving average of the generators, used for sampling, 0: none")


class LAPGAN(System):
    """A GAN for each band of a Laplacian pyramid; Denton et al., "Deep Generative Image Models using a Laplacian Pyramid of
    Adversarial Networks" (2015).

    With I_0 the image and I_(k+1) = down(I_k), the band is h_k = I_k - up(I_(k+1)). A GAN generates the coarsest image, and a
    GAN conditioned on l_k = up(I_(k+1)) each band:
        generator:          (noise plane, l_k) -> h_k
        discriminator:      (h_k + l_k, l_k) -> logit
    The GANs are trained independently on the bands of real images, all in every step: the losses of the levels are
    summed. Samples are generated from coarse to fine, I_k = h_k + up(I_(k+1)). All options of `GAN` are supported.

    Attributes:
        pyramid: the `LaplacianPyramid`.
        games: K + 1 GANs, from the finest band to the coarsest image.

    Raises:
        ValueError: images too small for the levels, or another invalid configuration.
    """

    Config = LAPGANConfig
    config: LAPGANConfig
    players = ("discriminator", "generator")

    def __init__(self, config: LAPGANConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        self.pyramid = LaplacianPyramid(config.levels, config.kernel)
        channels, *sides = config.image_shape
        if channels < 1 or min(sides) < self.least_side(config):
            raise ValueError(
                f"LAPGAN: images must have at least 1 channel and sides of at least {self.least_side(config)} for "
                f"{config.levels} levels, got {list(config.image_shape)}."
            )
        if not config.hidden >= 1:
            raise ValueError(f"LAPGAN: hidden must be at least 1, got {config.hidden!r}.")
        games: list[GAN] = []
        for _ in range(config.levels):
            games.append(BandGAN(dataclasses.replace(config, image_shape=(channels, *sides))))
            sides = [(side + 1) // 2 for side in sides]
        games.append(CoarseGAN(dataclasses.replace(config, image_shape=(channels, *sides), width=config.hidden)))
        self.games = nn.ModuleList(games)

    @classmethod
    def least_side(cls, config: Any) -> int:
        return 1 << min(max(config.levels, 0) + 1, 31)

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str) -> dict[str, Tensor]:
        """The losses of a player for a batch: "loss" is the sum over levels, "level0" that of the finest band, and so on.

        Raises:
            ValueError: images of another shape, or an unknown player.
        """
        self.check_images(images)
        self.check_player(player)
        losses: list[Tensor] = []
        for game, (image, low) in zip(self._gans, self._levels(images), strict=True):
            game.progress = self.progress
            losses.append(game.training_step(image, low, player=player)["loss"])
        return {"loss": sum(losses[1:], losses[0]), **{f"level{k}": loss.detach() for k, loss in enumerate(losses)}}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each player over all levels; see `GAN.optimizers`."""
        games = [game.optimizers() for game in self._gans]
        return {player: torch.optim.Adam([group for game in games for group in game[player].param_groups]) for player in self.players}

    def players_at(self, step: int) -> Sequence[str]:
        return self._gans[0].players_at(step)

    def step_done(self, player: str) -> None:
        for game in self._gans:
            game.step_done(player)

    @torch.no_grad()
    def sample(self, n: int, labels: None = None) -> Tensor:
        """Images [n, C, H, W] in [0, 1] from noise, from coarse to fine.

        Raises:
            ValueError: n below 1, or labels, since the model is unconditional.
        """
        self.check_sample(n, labels)
        *bands, coarse = self._gans
        images = coarse.sample(n)
        for game in reversed(bands):
            low = self.pyramid.up(images, game.config.image_shape[1:])
            images = low + _band(game.sample(n, low))
        return images.clamp(0, 1)

    @property
    def _gans(self) -> list[GAN]:
        return cast("list[GAN]", list(self.games))

    def _levels(self, images: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """The training data of each level, scaled to [0, 1], and its condition."""
        levels: list[tuple[Tensor, Tensor | None]] = []
        for _ in range(self.config.levels):
            coarse = self.pyramid.down(images)
            low = self.pyramid.up(coarse, images.shape[-2:])
            levels.append((_image(images - low), low))
            images = coarse
        return [*levels, (images, None)]


class CoarseGAN(GAN):
    """The GAN of the coarsest image."""

    @property
    def name(self) -> str:
        return "LAPGAN"


class BandGAN(GAN):
    """The GAN of one band in [-1, 1]; its "labels" are low-pass images [B, C, H, W] in [0, 1]."""

    @property
    def name(self) -> str:
        return "LAPGAN"

    def build_generator(self) -> nn.Module:
        return BandGenerator(self.config.image_shape, self.config.width)

    def build_discriminator(self) -> nn.Module:
        return BandDiscriminator(self.config.image_shape, self.config.width, self.config.minibatch_kernels)

    def condition(self, labels: Tensor) -> Tensor:
        return labels

    def _noise(self, n: int) -> Tensor:
        _, height, width = self.config.image_shape
        return standard_normal(n, 1, height, width, device=self.device)


class BandGenerator(nn.Module):
    """A noise plane [B, 1, H, W] and a low-pass image [B, C, H, W] to a band; the hidden layers have half the size."""

    def __init__(self, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels = image_shape[0]
        self.body = nn.Sequential(
            nn.Conv2d(channels + 1, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            BatchNorm(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            BatchNorm(width),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        height, width = condition.shape[-2:]
        return self.body(torch.cat([condition * 2 - 1, z], 1))[..., :height, :width]  # odd sizes come out one too large


class BandDiscriminator(nn.Module):
    """A band and its low-pass image, both [B, C, H, W], to logits [B] and features [B, F]."""

    def __init__(self, image_shape: tuple[int, int, int], width: int, minibatch_kernels: int) -> None:
        super().__init__()
        channels, rows, columns = image_shape
        self.body = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.score = score_layer(2 * width * ((rows + 3) // 4) * ((columns + 3) // 4), minibatch_kernels)

    def forward(self, band: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(torch.cat([condition + band, condition], 1) * 2 - 1)
        return self.score(features).squeeze(1), features


def _image(band: Tensor) -> Tensor:
    """Scale a band from [-1, 1] to [0, 1], the range of images."""
    return (band + 1) / 2


def _band(image: Tensor) -> Tensor:
    """The inverse of `_image`."""
    return image * 2 - 1
