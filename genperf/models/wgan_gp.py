"""Wasserstein GAN with gradient penalty."""

from dataclasses import dataclass

from ..losses.adversarial import ADVERSARIAL_LOSSES
from ..losses.gradient_penalty import CENTERS
from .dcgan import DCGAN, DCGANConfig
from .system import option


@dataclass(frozen=True)
class WGANGPConfig(DCGANConfig):
    """What a `WGANGP` is built from."""

    loss: str = option("wasserstein", "adversarial loss", choices=ADVERSARIAL_LOSSES)
    critic_steps: int = option(5, "steps of the critic for each of the generator")
    beta2: float = option(0.9, "of Adam")
    penalty: str = option("wgan-gp", "kind of gradient penalty of the critic", choices=tuple(CENTERS))


class WGANGP(DCGAN):
    """A Wasserstein GAN whose critic is kept Lipschitz by a gradient penalty, with the networks of `DCGAN`; Gulrajani et al.,
    "Improved Training of Wasserstein GANs" (2017).

        critic:     mean d(g(z)) - mean d(x) + penalty_weight * mean (|grad d(mixed)| - 1)^2
        generator:  -mean d(g(z))

    mixed = genperf.interpolate(x, g(z)). The critic has no batch normalization. As published are critic_steps=5 and,
    for a hundred thousand steps, lr=1e-4 and beta1=0.0; the defaults suit a thousand or two on small images.
    """

    Config = WGANGPConfig
