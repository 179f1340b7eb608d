"""Deep convolutional GAN."""

from dataclasses import dataclass

from torch import nn

from ._adversarial_networks import NORMS, ConvDiscriminator, ConvGenerator
from .gan import GAN, GANConfig
from .system import option


@dataclass(frozen=True)
class DCGANConfig(GANConfig):
    """What a `DCGAN` is built from."""

    width: int = option(32, "channels of the largest feature maps")
    norm: str = option("batch", "normalization: virtual is of the generator alone", choices=tuple(NORMS))


class DCGAN(GAN):
    """A GAN of convolutions; Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
    Adversarial Networks" (2016).

    Strided and transposed convolutions between the image and an image of a quarter of its height and width, batch
    normalization everywhere but at the generator's output and the discriminator's input, ReLU in the generator, leaky
    ReLU in the discriminator, weights from N(0, 0.02^2). norm="virtual" gives the generator virtual batch normalization
    (Salimans et al. 2016). Under a gradient penalty the discriminator has no normalization: the penalty is on the gradient
    of each image, which batch statistics mix (Gulrajani et al. 2017, section 4).

    Adam as published but for its rate, 1e-3 in place of 2e-4: samples come from averaged weights, and a thousand steps on
    small images must do.

    Raises:
        ValueError: an image_shape whose sides are not divisible by 4, or a field of the configuration outside its range.
    """

    Config = DCGANConfig
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
