"""Generative models built from the layers of genperf and torch.nn."""

from .vqvae import VQVAE, VQVAEConfig, VQVAEOutput

__all__ = ["VQVAE", "VQVAEConfig", "VQVAEOutput"]
