# SPDX-License-Identifier: Apache-2.0
"""Time of a training step with genperf's kernels and with the reference implementations."""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import System
from ..ops import reference_ops

_REPEATS = 7


class StepTimes(NamedTuple):
    """Median times of a training step of all players, in milliseconds."""

    genperf_ms: float
    reference_ms: float


def time_steps(
    system: System, images: Tensor, labels: Tensor | None, *, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> StepTimes:
    """Time a training step on one batch with both implementations.

    The steps run on copies of the system; the system itself and torch's random state do not change. Under DDP every rank must call it
    with its rows of the global batch.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        native, reference = (_Step(system, images, labels, autocast) for _ in range(2))
        times = []
        for repeat in range(_REPEATS + 1):
            # Alternate, so that a change of the machine's load affects both.
            pair = [native.milliseconds()]
            with reference_ops():
                pair.append(reference.milliseconds())
            if repeat:  # the first is a warm-up
                times.append(pair)
    return StepTimes(*(statistics.median(column) for column in zip(*times, strict=True)))


class _Step:
    """A training step of a copy of the system."""

    def __init__(
        self, system: System, images: Tensor, labels: Tensor | None, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.system = copy.deepcopy(system).train()
        self.optimizers = self.system.optimizers()
        self.batch = images, labels
        self.autocast = autocast

    def milliseconds(self) -> float:
        """Run the step and return its time."""
        _synchronize(self.batch[0].device)
        start = time.perf_counter()
        for player, optimizer in self.optimizers.items():
            with self.autocast():
                losses = self.system.training_step(*self.batch, player=player)
            self.system.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()
            self.system.step_done(player)
        _synchronize(self.batch[0].device)
        return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
