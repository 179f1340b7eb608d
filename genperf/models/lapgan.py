"""LAPGAN: a GAN for each band of a Laplacian pyramid."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.batch_norm import BatchNorm
from ..nn.laplacian_pyramid import KERNELS, LaplacianPyramid
from ._adversarial_networks import score_layer
from .gan import GAN, GANConfig
from .system import System, option, standard_normal


@dataclass(frozen=True)
class LAPGANConfig(GANConfig):
    """What a `LAPGAN` is built from; the game of every level is configured alike."""

    levels: int = option(2, "how often images are halved; the pyramid has one band more")
    kernel: str = option("binomial", "filter of the pyramid", choices=tuple(KERNELS))
    width: int = option(16, "channels of the bands' networks")
    hidden: int = option(256, "units of the layers of the networks for the coarse image")
    lr: float = option(5e-4, "learning rate of the generators")
    lr_discriminator: float | None = option(2e-3, "learning rate of the discriminators, none: the generators'")
    ema: float = option(0.995, "decay of the moving average of the generators that samples are drawn from, 0: none")


class LAPGAN(System):
    """A GAN for each band of a pyramid of images, from coarse to fine; Denton et al., "Deep Generative Image Models using a
    Laplacian Pyramid of Adversarial Networks" (2015).

    With I_0 the image and I_(k+1) = down(I_k), the band h_k = I_k - up(I_(k+1)) is what is lost on the way. The coarsest
    image comes from a GAN of its own, each band from a GAN that is told l_k = up(I_(k+1)):
        generator:          (noise plane, l_k) -> h_k
        discriminator:      (h_k + l_k, l_k) -> logit
    Each game is on bands of real images in training, independent of the others, so all learn from every batch: the losses
    of the levels are summed. Samples go from coarse to fine, I_k = h_k + up(I_(k+1)). All that `GAN` offers is there.

    Attributes:
        pyramid: `LaplacianPyramid`; pyramid.reconstruct(pyramid.decompose(images)) is the images.
        games: K + 1 GANs, of the finest band first, of the coarsest image last.

    Raises:
        ValueError: images too small for the levels, or a field of the configuration outside its range.
    """

    Config = LAPGANConfig
    players = ("discriminator", "generator")

    def __init__(self, config: LAPGANConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        self.pyramid = LaplacianPyramid(config.levels, config.kernel)
        channels, *sides = config.image_shape
        if channels < 1 or min(sides) < 2 ** (config.levels + 1):
            raise ValueError(
                f"LAPGAN: images must have at least 1 channel and sides of at least {2 ** (config.levels + 1)} for "
                f"{config.levels} levels, got {list(config.image_shape)}."
            )
        if not config.hidden >= 1:
            raise ValueError(f"LAPGAN: hidden must be at least 1, got {config.hidden!r}.")
        games = []
        for _ in range(config.levels):
            games.append(BandGAN(dataclasses.replace(config, image_shape=(channels, *sides))))
            sides = [(side + 1) // 2 for side in sides]
        games.append(CoarseGAN(dataclasses.replace(config, image_shape=(channels, *sides), width=config.hidden)))
        self.games = nn.ModuleList(games)

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str) -> dict[str, Tensor]:
        """The player's losses of a batch: "loss" is the sum of the levels', "level0" the finest band's and so on.

        Raises:
            ValueError: images of another shape, or no player of that name.
        """
        self.check_images(images)
        self.check_player(player)
        losses = []
        for game, (image, low) in zip(self.games, self._levels(images), strict=True):
            game.progress = self.progress
            losses.append(game.training_step(image, low, player=player)["loss"])
        return {"loss": sum(losses), **{f"level{k}": loss.detach() for k, loss in enumerate(losses)}}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each player, of all levels; see `GAN.optimizers`."""
        games = [game.optimizers() for game in self.games]
        return {player: torch.optim.Adam([group for game in games for group in game[player].param_groups]) for player in self.players}

    def players_at(self, step: int) -> Sequence[str]:
        return self.games[0].players_at(step)

    def step_done(self, player: str) -> None:
        for game in self.games:
            game.step_done(player)

    @torch.no_grad()
    def sample(self, n: int, labels: None = None) -> Tensor:
        """Images [n, C, H, W] in [0, 1] from noise, from coarse to fine.

        Raises:
            ValueError: n below 1, or labels, which nothing here depends on.
        """
        self.check_sample(n, labels)
        *bands, coarse = self.games
        images = coarse.sample(n)
        for game in reversed(bands):
            low = self.pyramid.up(images, game.config.image_shape[1:])
            images = low + _band(game.sample(n, low))
        return images.clamp(0, 1)

    def _levels(self, images: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """What each game learns, as images in [0, 1], and what it is told."""
        levels = []
        for _ in range(self.config.levels):
            coarse = self.pyramid.down(images)
            low = self.pyramid.up(coarse, images.shape[-2:])
            levels.append((_image(images - low), low))
            images = coarse
        return [*levels, (images, None)]


class CoarseGAN(GAN):
    """The game of the coarsest image."""

    name = "LAPGAN"


class BandGAN(GAN):
    """The game of one band in [-1, 1]; "labels" are the low-pass images [B, C, H, W] in [0, 1] that it is told."""

    name = "LAPGAN"

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
    """A plane of noise [B, 1, H, W] and a low-pass image [B, C, H, W] to a band, by way of half the size."""

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
        return self.body(torch.cat([condition * 2 - 1, z], 1))[..., :height, :width]  # odd sides come back one larger


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
    """A band in [-1, 1] as a game takes it, in [0, 1]."""
    return (band + 1) / 2


def _band(image: Tensor) -> Tensor:
    return image * 2 - 1
