# SPDX-License-Identifier: Apache-2.0
"""GAN: the training of generator and discriminator, with fully connected networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._choices import AdversarialLoss, Penalty
from ..losses.adversarial import SMOOTHED, discriminator_loss, generator_loss
from ..losses.feature_matching import feature_matching
from ..losses.gradient_penalty import gradient_penalty
from ..losses.historical_averaging import HistoricalAveraging
from ._adversarial_networks import DenseDiscriminator, DenseGenerator
from ._moving_average import update_average
from .system import System, SystemConfig, check_divisible, evaluating, frozen, option, standard_normal


@dataclass(frozen=True)
class GANConfig(SystemConfig):
    """Configuration of a `GAN`; options that improve training are from Salimans et al. (2016) and Sonderby et al. (2017)."""

    latent_dim: int = option(64, "length of the generator's noise")
    width: int = option(256, "units of the hidden layers")
    loss: AdversarialLoss = option("non-saturating", "adversarial loss")
    critic_steps: int = option(1, "discriminator steps per generator step")
    lr: float = option(1e-3, "learning rate of the generator")
    lr_discriminator: float | None = option(None, "learning rate of the discriminator, none: that of the generator")
    beta1: float = option(0.5, "decay of the gradient mean in Adam")
    beta2: float = option(0.999, "decay of the squared-gradient mean in Adam")
    penalty: Penalty | None = option(None, "gradient penalty of the discriminator")
    penalty_weight: float = option(10.0, "weight of the gradient penalty")
    label_smoothing: float = option(0.0, "one-sided: the discriminator's target for real images is 1 minus this")
    instance_noise: float = option(0.0, "standard deviation of noise on the discriminator's input, decreasing to 0 over the training")
    feature_matching: float = option(0.0, "weight of feature matching in the generator's loss")
    historical_averaging: float = option(0.0, "weight of historical averaging in both losses")
    minibatch_kernels: int = option(0, "kernels of minibatch discrimination, 0: none")
    ema: float = option(0.99, "decay of the moving average of the generator, used for sampling, 0: none")


class GAN(System):
    """Generative adversarial network; Goodfellow et al., "Generative Adversarial Nets" (2014).

    With x the images of a batch scaled to [-1, 1], z standard normal noise and logits d(.) (loss="non-saturating"):
        discriminator:  mean softplus(-d(x)) + mean softplus(d(g(z)))
        generator:      mean softplus(-d(g(z)))
    Real and generated images pass through the discriminator in separate batches. Options of `config`:

        penalty               gradient_penalty of the discriminator's logits                        Gulrajani et al. 2017 and others
        label_smoothing       the target of real images is 1 - label_smoothing                      Salimans et al. 2016
        instance_noise        N(0, instance_noise^2 (1 - progress)^2) on real and generated images  Sonderby et al. 2017
        feature_matching      squared distance of mean features, in the generator's loss             Salimans et al. 2016
        historical_averaging  squared distance of the weights from their mean over time             Salimans et al. 2016
        minibatch_kernels     MinibatchDiscrimination before the discriminator's last layer         Salimans et al. 2016
        ema                   samples come from averaged weights of the generator                   Yazici et al. 2019

    Subclasses build other networks. A generator maps noise [B, latent_dim] (and a condition) to images in [-1, 1]; a
    discriminator maps such images (and a condition) to logits [B] and features [B, F], its last hidden layer.

    Raises:
        ValueError: an invalid configuration.
    """

    Config = GANConfig
    config: GANConfig
    players = ("discriminator", "generator")

    def __init__(self, config: GANConfig | None = None) -> None:
        super().__init__(config)
        self._check_config()
        self.generator = self.build_generator()
        self.discriminator = self.build_discriminator()
        self.average = None
        if self.config.ema:
            self.average = AveragedModel(self.generator).requires_grad_(False)
        self.history = nn.ModuleDict()
        if self.config.historical_averaging:
            self.history.update({player: HistoricalAveraging(getattr(self, player).parameters()) for player in self.players})

    def build_generator(self) -> nn.Module:
        return DenseGenerator(self.config.image_shape, self.config.latent_dim, self.config.width)

    def build_discriminator(self) -> nn.Module:
        return DenseDiscriminator(self.config.image_shape, self.config.width, minibatch_kernels=self.config.minibatch_kernels)

    def condition(self, labels: Any) -> Any:
        """The condition of generator and discriminator for these labels; None for an unconditional GAN."""
        return None

    def training_step(self, images: Tensor, labels: Any = None, *, player: str) -> dict[str, Tensor]:
        """The losses of a player for a batch.

        Returns:
            "loss", the weighted sum of "adversarial" and, if configured, "penalty", "feature_matching" and
            "historical_averaging"; for the discriminator also the mean logits "real_score" and "fake_score".

        Raises:
            ValueError: images of another shape, or an unknown player.
        """
        self.check_images(images)
        self.check_player(player)
        real, condition = images * 2 - 1, self._condition_of(len(images), labels)
        if player == "discriminator":
            parts, scores = self._discriminator_losses(real, condition)
        else:
            parts, scores = self._generator_losses(real, condition), {}
        if self.history:
            parts["historical_averaging"] = self.config.historical_averaging * self.history[player]()
        first, *others = parts.values()
        return {"loss": sum(others, first), **{name: value.detach() for name, value in {**parts, **scores}.items()}}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each player; two learning rates give the two time-scale update rule of Heusel et al. (2017)."""
        betas = (self.config.beta1, self.config.beta2)
        return {player: torch.optim.Adam(getattr(self, player).parameters(), lr=self._rate(player), betas=betas) for player in self.players}

    def players_at(self, step: int) -> Sequence[str]:
        """The discriminator trains in each step, the generator in one of every `critic_steps`."""
        return self.players if (step + 1) % self.config.critic_steps == 0 else self.players[:1]

    @torch.no_grad()
    def step_done(self, player: str) -> None:
        if self.history:
            cast("HistoricalAveraging", self.history[player]).update()
        if player == "generator" and self.average is not None:
            update_average(self.average, self.generator, self.config.ema)

    @torch.no_grad()
    def sample(self, n: int, labels: Any = None) -> Tensor:
        """Images [n, C, H, W] in [0, 1] from noise.

        Raises:
            ValueError: n below 1, or labels for an unconditional system.
        """
        self.check_sample(n)
        condition = self._condition_of(n, labels)
        if condition is None:
            self.check_sample(n, labels)
        with evaluating(self):
            images = self.sampler(self._noise(n), condition)
        return images.add(1).div(2)

    @property
    def sampler(self) -> nn.Module:
        """The generator used for sampling: the averaged one, if there is one."""
        return self.generator if self.average is None else self.average

    def _discriminator_losses(self, real: Tensor, condition: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config = self.config
        with torch.no_grad():
            real, fake = self._noisy(real), self._noisy(self.generator(self._noise(len(real)), condition))
        real_logits, _ = self.discriminator(real, condition)
        fake_logits, _ = self.discriminator(fake, condition)
        parts = {"adversarial": discriminator_loss(real_logits, fake_logits, config.loss, label_smoothing=config.label_smoothing)}
        if config.penalty is not None:
            parts["penalty"] = gradient_penalty(
                lambda points: self.discriminator(points, condition)[0], real, fake, kind=config.penalty, weight=config.penalty_weight
            )
        return parts, {"real_score": real_logits.mean(), "fake_score": fake_logits.mean()}

    def _generator_losses(self, real: Tensor, condition: Any) -> dict[str, Tensor]:
        config = self.config
        with frozen(self.discriminator):
            fake = self._noisy(self.generator(self._noise(len(real)), condition))
            logits, features = self.discriminator(fake, condition)
            parts = {"adversarial": generator_loss(logits, config.loss)}
            if config.feature_matching:
                with torch.no_grad():
                    _, real_features = self.discriminator(self._noisy(real), condition)
                parts["feature_matching"] = config.feature_matching * feature_matching(real_features, features)
        return parts

    def _condition_of(self, n: int, labels: Any) -> Any:
        condition = self.condition(labels)
        if isinstance(condition, Tensor) and len(condition) != n:
            raise ValueError(f"{self.name}: there must be a label for each of {n} images, got {len(condition)} labels.")
        return condition

    def _noise(self, n: int) -> Tensor:
        return standard_normal(n, self.config.latent_dim, device=self.device)

    def _noisy(self, images: Tensor) -> Tensor:
        """Add instance noise to the discriminator's input."""
        std = self.config.instance_noise * (1 - self.progress)
        return images + std * standard_normal(*images.shape, device=images.device) if std else images

    def _rate(self, player: str) -> float:
        rate = self.config.lr_discriminator
        return self.config.lr if player == "generator" or rate is None else rate

    def _check_config(self) -> None:
        config, name = self.config, self.name
        check_divisible(name, config.image_shape, self.downsampling)
        for field in ("latent_dim", "width", "critic_steps"):
            if not getattr(config, field) >= 1:
                raise ValueError(f"{name}: {field} must be at least 1, got {getattr(config, field)!r}.")
        for field in ("penalty_weight", "instance_noise", "feature_matching", "historical_averaging", "minibatch_kernels"):
            if not 0 <= getattr(config, field) < math.inf:
                raise ValueError(f"{name}: {field} must be a finite number, at least 0, got {getattr(config, field)!r}.")
        for field in ("label_smoothing", "ema"):
            if not 0 <= getattr(config, field) < 1:
                raise ValueError(f"{name}: {field} must be in [0, 1), got {getattr(config, field)!r}.")
        if config.label_smoothing and config.loss not in SMOOTHED:
            raise ValueError(f"{name}: label_smoothing must be 0 for loss {config.loss!r}, got {config.label_smoothing!r}.")
