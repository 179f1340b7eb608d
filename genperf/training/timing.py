"""Time of a training step with genperf's ops and with their references in plain PyTorch."""

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
    """Medians over several training steps, each of every player once, in milliseconds."""

    genperf_ms: float
    reference_ms: float


def time_steps(
    system: System, images: Tensor, labels: Tensor | None, *, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> StepTimes:
    """Time both on a batch, with copies of the system: it stays as it is, and so do torch's generators.

    Among several processes each must call it, with its share of the batch.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        ours, reference = (_Step(system, images, labels, autocast) for _ in range(2))
        times = []
        for repeat in range(_REPEATS + 1):
            # In turns, so that a change in the load of the machine meets both.
            pair = [ours.milliseconds()]
            with reference_ops():
                pair.append(reference.milliseconds())
            if repeat:  # the first warms up
                times.append(pair)
    return StepTimes(*(statistics.median(column) for column in zip(*times, strict=True)))


class _Step:
    def __init__(self, system: System, images: Tensor, labels: Tensor | None, autocast: Callable[[], AbstractContextManager]) -> None:
        self.system = copy.deepcopy(system).train()
        self.optimizers = self.system.optimizers()
        self.batch = images, labels
        self.autocast = autocast

    def milliseconds(self) -> float:
        _wait_for(self.batch[0].device)
        start = time.perf_counter()
        for player, optimizer in self.optimizers.items():
            with self.autocast():
                losses = self.system.training_step(*self.batch, player=player)
            self.system.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()
            self.system.step_done(player)
        _wait_for(self.batch[0].device)
        return (time.perf_counter() - start) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
