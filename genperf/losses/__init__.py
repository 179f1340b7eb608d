"""Losses over the ops of genperf."""

from .gradient_penalty import gradient_penalty

__all__ = ["gradient_penalty"]
