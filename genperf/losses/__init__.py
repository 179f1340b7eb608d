"""Losses over the ops of genperf."""

from .frechet_loss import FrechetLoss
from .gradient_penalty import gradient_penalty

__all__ = ["FrechetLoss", "gradient_penalty"]
