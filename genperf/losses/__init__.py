# SPDX-License-Identifier: Apache-2.0
"""Losses over the ops of genperf."""

from .adversarial import ADVERSARIAL_LOSSES, discriminator_loss, generator_loss
from .divergences import js_divergence, kl_divergence, wasserstein_1d
from .feature_matching import feature_matching
from .frechet_loss import FrechetLoss
from .gradient_penalty import gradient_penalty
from .historical_averaging import HistoricalAveraging

__all__ = [
    "ADVERSARIAL_LOSSES",
    "FrechetLoss",
    "HistoricalAveraging",
    "discriminator_loss",
    "feature_matching",
    "generator_loss",
    "gradient_penalty",
    "js_divergence",
    "kl_divergence",
    "wasserstein_1d",
]
