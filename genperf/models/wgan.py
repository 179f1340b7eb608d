"""Wasserstein GAN with clipped weights."""

from dataclasses import dataclass

import torch

from .dcgan import DCGAN, DCGANConfig
from .system import option


@dataclass(frozen=True)
class WGANConfig(DCGANConfig):
    """What a `WGAN` is built from."""

    loss: str = option("wasserstein", "adversarial loss", choices=("wasserstein",))
    critic_steps: int = option(5, "steps of the critic for each of the generator")
    lr: float = option(5e-4, "learning rate of the generator")
    beta1: float = option(0.0, "momentum of RMSprop")
    beta2: float = option(0.99, "decay of RMSprop's mean square")
    clip: float = option(0.01, "the critic's parameters are kept in [-clip, clip]")


class WGAN(DCGAN):
    """A GAN whose critic estimates the Wasserstein distance, kept Lipschitz by clipped weights, with the networks of `DCGAN`;
    Arjovsky et al., "Wasserstein GAN" (2017).

        critic:     mean d(g(z)) - mean d(x)
        generator:  -mean d(g(z))

    After each of its steps the critic's parameters are clipped, so that it stays Lipschitz; RMSprop, since the authors
    found momentum unstable here. As published are critic_steps=5 and, for a hundred thousand steps, lr=5e-5; the default
    suits a thousand or two on small images.
    """

    Config = WGANConfig

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
