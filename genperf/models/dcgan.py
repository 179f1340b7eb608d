# SPDX-License-Identifier: Apache-2.0
"""Deep convolutional GAN."""

from dataclasses import dataclass

from torch import nn

from .._choices import Normalization
from ._adversarial_networks import ConvDiscriminator, ConvGenerator
from .gan import GAN, GANConfig
from .system import option


@dataclass(frozen=True)
class DCGANConfig(GANConfig):
    """Configuration of a `DCGAN`."""

    width: int = option(32, "channels of the largest feature maps")
    norm: Normalization = option("batch", "normalization; virtual applies to the generator only")


class DCGAN(GAN):
    """A convolutional GAN; Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
    Adversarial Networks" (2016).

    Strided and transposed convolutions between images and a quarter of their height and width, batch normalization except
    at the generator's output and the discriminator's input, ReLU in the generator, leaky ReLU in the discriminator, weights
    initialized from N(0, 0.02^2). norm="virtual" uses virtual batch normalization in the generator (Salimans et al. 2016).
    With a gradient penalty the discriminator has no normalization, since the penalty is on the gradients of single images
    (Gulrajani et al. 2017, section 4).

    Adam as in the paper, except for a learning rate of 1e-3 instead of 2e-4, for about a thousand steps on small images;
    samples come from averaged weights.

    Raises:
        ValueError: an image_shape with a height or width that is not divisible by 4, or another invalid configuration.
    """

    Config = DCGANConfig
    config: DCGANConfig
    downsampling = 4
    condition_dim = 0

    def build_generator(self) -> nn.Module:
        config = self.config
        return ConvGenerator(config.image_shape, config.latent_dim, config.width, norm=config.norm, condition_dim=self.condition_dim)

    def build_discriminator(self) -> nn.Module:
        config = self.config
        return ConvDiscriminator(
            config.image_shape,
            config.width,
            norm="none" if config.norm == "none" or config.penalty is not None else "batch",
            minibatch_kernels=config.minibatch_kernels,
            condition_dim=self.condition_dim,
        )
