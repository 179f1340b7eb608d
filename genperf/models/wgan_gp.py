# SPDX-License-Identifier: Apache-2.0
"""Wasserstein GAN with gradient penalty."""

from dataclasses import dataclass

from .._choices import AdversarialLoss, Penalty
from .dcgan import DCGAN, DCGANConfig
from .system import option


@dataclass(frozen=True)
class WGANGPConfig(DCGANConfig):
    """Configuration of a `WGANGP`."""

    loss: AdversarialLoss = option("wasserstein", "adversarial loss")
    critic_steps: int = option(5, "critic steps per generator step")
    beta2: float = option(0.9, "decay of the squared-gradient mean in Adam")
    penalty: Penalty = option("wgan-gp", "gradient penalty of the critic")


class WGANGP(DCGAN):
    """Wasserstein GAN with a gradient penalty and the networks of `DCGAN`; Gulrajani et al., "Improved Training of Wasserstein
    GANs" (2017).

        critic:     mean d(g(z)) - mean d(x) + penalty_weight * mean (|grad d(mixed)| - 1)^2
        generator:  -mean d(g(z))

    with mixed = genperf.interpolate(x, g(z)). The critic has no batch normalization. The paper has critic_steps=5, and lr=1e-4
    and beta1=0.0 for about a hundred thousand steps; the defaults are for one or two thousand steps on small images.
    """

    Config = WGANGPConfig
    config: WGANGPConfig
