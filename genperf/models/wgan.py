# SPDX-License-Identifier: Apache-2.0
"""Wasserstein GAN with weight clipping."""

from dataclasses import dataclass
from typing import Literal

import torch

from .dcgan import DCGAN, DCGANConfig
from .system import option


@dataclass(frozen=True)
class WGANConfig(DCGANConfig):
    """Configuration of a `WGAN`."""

    loss: Literal["wasserstein"] = option("wasserstein", "adversarial loss")
    critic_steps: int = option(5, "critic steps per generator step")
    lr: float = option(5e-4, "learning rate of the generator")
    beta1: float = option(0.0, "momentum of RMSprop")
    beta2: float = option(0.99, "decay of the mean square in RMSprop")
    clip: float = option(0.01, "the critic's parameters are clipped to [-clip, clip]")


class WGAN(DCGAN):
    """A GAN whose critic estimates the Wasserstein distance, with weight clipping and the networks of `DCGAN`; Arjovsky et al.,
    "Wasserstein GAN" (2017).

        critic:     mean d(g(z)) - mean d(x)
        generator:  -mean d(g(z))

    The critic's parameters are clipped after each of its steps, which keeps it Lipschitz. The optimizer is RMSprop, since the
    authors found momentum unstable. The paper has critic_steps=5 and lr=5e-5 for about a hundred thousand steps; the default
    learning rate is for one or two thousand steps on small images.
    """

    Config = WGANConfig
    config: WGANConfig

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        alpha, momentum = self.config.beta2, self.config.beta1
        return {
            player: torch.optim.RMSprop(getattr(self, player).parameters(), lr=self._rate(player), alpha=alpha, momentum=momentum)
            for player in self.players
        }

    @torch.no_grad()
    def step_done(self, player: str) -> None:
        if player == "discriminator":
            for parameter in self.discriminator.parameters():
                parameter.clamp_(-self.config.clip, self.config.clip)
        super().step_done(player)

    def _check_config(self) -> None:
        super()._check_config()
        if not self.config.clip > 0:
            raise ValueError(f"{self.name}: clip must be above 0, got {self.config.clip!r}.")
