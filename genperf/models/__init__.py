# SPDX-License-Identifier: Apache-2.0
"""Generative systems built from the ops, layers and losses of genperf and torch.nn; `System` is their common interface."""

from .anomaly_detector import AnomalyDetector, AnomalyDetectorConfig
from .autoencoder import Autoencoder, AutoencoderConfig, latent_plane
from .conditional_gan import ConditionalGAN, ConditionalGANConfig
from .dcgan import DCGAN, DCGANConfig
from .denoising_autoencoder import DenoisingAutoencoder, DenoisingAutoencoderConfig
from .discrete_vae import DiscreteVAE, DiscreteVAEConfig
from .gan import GAN, GANConfig
from .index_prior import IndexPrior
from .lapgan import LAPGAN, LAPGANConfig
from .latent import attribute_vector, interpolations, lerp, slerp
from .semi_supervised_gan import SemiSupervisedGAN, SemiSupervisedGANConfig
from .stackgan import StackGAN, StackGANConfig
from .system import System, SystemConfig, option
from .vae import VAE, VAEConfig
from .vqvae import VQVAE, VQVAEConfig, VQVAEOutput
from .vqvae2 import VQVAE2, HierarchicalCodes, VQVAE2Config, VQVAE2Output
from .wgan import WGAN, WGANConfig
from .wgan_gp import WGANGP, WGANGPConfig

SYSTEMS: dict[str, type[System]] = {
    "autoencoder": Autoencoder,
    "denoising-autoencoder": DenoisingAutoencoder,
    "anomaly-detector": AnomalyDetector,
    "vae": VAE,
    "discrete-vae": DiscreteVAE,
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
    "gan": GAN,
    "dcgan": DCGAN,
    "wgan": WGAN,
    "wgan-gp": WGANGP,
    "conditional-gan": ConditionalGAN,
    "semi-supervised-gan": SemiSupervisedGAN,
    "stackgan": StackGAN,
    "lapgan": LAPGAN,
}
"""The systems by their names on the command line."""

__all__ = [
    "DCGAN",
    "GAN",
    "LAPGAN",
    "SYSTEMS",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "WGAN",
    "WGANGP",
    "AnomalyDetector",
    "AnomalyDetectorConfig",
    "Autoencoder",
    "AutoencoderConfig",
    "ConditionalGAN",
    "ConditionalGANConfig",
    "DCGANConfig",
    "DenoisingAutoencoder",
    "DenoisingAutoencoderConfig",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "GANConfig",
    "HierarchicalCodes",
    "IndexPrior",
    "LAPGANConfig",
    "SemiSupervisedGAN",
    "SemiSupervisedGANConfig",
    "StackGAN",
    "StackGANConfig",
    "System",
    "SystemConfig",
    "VAEConfig",
    "VQVAE2Config",
    "VQVAE2Output",
    "VQVAEConfig",
    "VQVAEOutput",
    "WGANConfig",
    "WGANGPConfig",
    "attribute_vector",
    "interpolations",
    "latent_plane",
    "lerp",
    "option",
    "slerp",
]
