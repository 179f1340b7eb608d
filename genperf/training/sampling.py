"""Samples of a trained system, batch by batch."""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor

from .._errors import UserError
from ..models.system import System


def cannot_sample(system: System) -> str | None:
    """Why the system draws no samples, or None."""
    if not hasattr(system, "sample"):
        return "it generates nothing"
    if getattr(system.config, "prior_width", None) == 0:
        return "it was trained without a prior over its codes (prior_width is 0)"
    return None


def num_conditions(system: System) -> int:
    """How many classes the system can be asked to draw; 0 where samples are unconditional."""
    if not hasattr(system, "sample") or "labels" not in inspect.signature(system.sample).parameters:
        return 0
    # One that classifies has classes, but draws from all of them at once.
    return 0 if hasattr(system, "classify") else getattr(system.config, "num_classes", 0)


def sample_batches(system: System, n: int, labels: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    """Samples [B, C, H, W], n in all, within [0, 1], on the system's device; `labels` [n], where they are conditional.

    Raises:
        UserError: samples with NaN or infinity.
    """
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        chosen = None if labels is None else labels[start : start + size].to(system.device)
        samples = system.sample(size, chosen)
        if not samples.isfinite().all():
            raise UserError("the system's samples must be finite, got NaN or infinity; its training may have diverged.")
        yield samples.float().clamp(0, 1)


def draw(system: System, n: int, labels: Tensor | None = None, batch_size: int = 250) -> Tensor:
    """All n samples [n, C, H, W] on the CPU."""
    return torch.cat([batch.cpu() for batch in sample_batches(system, n, labels, batch_size)])
