# SPDX-License-Identifier: Apache-2.0
"""Samples from a trained system."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._errors import UserError
from ..models.system import System


def sampling_unavailable(system: System) -> str | None:
    """Why the system cannot be sampled from, or None."""
    if not hasattr(system, "sample"):
        return "it generates nothing"
    if getattr(system.config, "prior_width", None) == 0:
        return "it was trained without a prior over its codes (prior_width is 0)"
    return None


def num_conditions(system: System) -> int:
    """Number of classes that the system can be conditioned on; 0 if it samples unconditionally."""
    sample = getattr(system, "sample", None)
    if sample is None or "labels" not in inspect.signature(sample).parameters:
        return 0
    # A system that classifies has classes, but samples unconditionally.
    return 0 if hasattr(system, "classify") else getattr(system.config, "num_classes", 0)


def sample_labels(name: str, system: System, n: int, labels: Sequence[int] | None = None) -> Tensor | None:
    """Labels [n] for `n` samples: the given ones, or else all classes, repeated in turn; None for an unconditional system.

    Args:
        name: of the system, for error messages.

    Raises:
        UserError: labels for an unconditional system, or labels out of range.
    """
    classes = num_conditions(system)
    if not classes:
        if labels is not None:
            raise UserError(f"--labels are for conditional systems, got them for {name}.")
        return None
    chosen = torch.arange(classes) if labels is None else torch.tensor(labels)
    if chosen.max() >= classes:
        raise UserError(f"--labels must lie in 0 ... {classes - 1}, got {int(chosen.max())}.")
    return chosen[torch.arange(n) % len(chosen)]


def sample_batches(system: System, n: int, labels: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    """Draw `n` samples in batches [B, C, H, W], clamped to [0, 1], on the system's device.

    Args:
        labels: [n] for a conditional system.

    Raises:
        UserError: samples with NaN or infinity.
    """
    sample: Any = system.sample
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        batch_labels = None if labels is None else labels[start : start + size].to(system.device)
        samples = sample(size, batch_labels)
        if not samples.isfinite().all():
            raise UserError("the system's samples must be finite, got NaN or infinity; its training may have diverged.")
        yield samples.float().clamp(0, 1)


def draw(system: System, n: int, labels: Tensor | None = None, batch_size: int = 250) -> Tensor:
    """Draw `n` samples [n, C, H, W], on the CPU."""
    return torch.cat([batch.cpu() for batch in sample_batches(system, n, labels, batch_size)])
