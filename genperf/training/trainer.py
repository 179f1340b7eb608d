# SPDX-License-Identifier: Apache-2.0
"""The training loop. A run resumed at any step equals an uninterrupted one.

The trainer supports bf16 and DDP; a multi-process run matches a single-process run up to rounding.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from tqdm import tqdm

from .._choices import TrainingPrecision
from .._errors import UserError
from ..models import System
from ..models.system import share
from ..ops import reference_ops, sample_offset
from .checkpoint import random_state, restore_random_state
from .data import LabeledImages
from .interrupt import DeferredInterrupt
from .runs import Settings

_SECONDS_BETWEEN_CHECKPOINTS = 600

# Fabric's names of the precisions of `genperf train`.
_PRECISIONS: dict[TrainingPrecision, Literal["32-true", "bf16-mixed"]] = {"32": "32-true", "bf16": "bf16-mixed"}


def make_fabric(device: torch.device, precision: TrainingPrecision) -> Fabric:
    """Set up a single process on the device, or under torchrun a DDP rank on the GPU of its local rank (or on the CPU)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # A step has gradients for the parameters of one player only. Buffers agree on all ranks, as statistics are all-reduced.
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if world > 1 else "auto"
    devices = [device.index or 0] if world == 1 and device.type == "cuda" else local
    fabric = Fabric(
        accelerator=device.type,
        devices=devices,
        num_nodes=world // local,
        strategy=strategy,
        precision=_PRECISIONS[precision],
    )
    fabric.launch()
    return fabric


class _TrainingStep(nn.Module):
    """Calls the training step from `forward`, where Fabric applies autocast and DDP."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, images: Tensor, labels: Tensor | None, player: str) -> dict[str, Tensor]:
        return self.system.training_step(images, labels, player=player)


class Training:
    """Trains a system; `genperf.models.System` documents a training step.

    The order of the images depends only on seed and epoch, so a run resumes from its position and state. Every rank holds all images and
    the same random state, and takes its rows of each global batch. The last batch of an epoch is dropped if it is incomplete.
    """

    def __init__(self, fabric: Fabric, system: System, images: LabeledImages, settings: Settings) -> None:
        self.fabric = fabric
        self.system = system
        self.images = images
        self.settings = settings
        self.batch_size = min(settings.batch_size, len(images.images))
        if self.batch_size % fabric.world_size:
            raise UserError(
                f"the batch must be divisible by the number of processes, got --batch-size {self.batch_size} and {fabric.world_size}."
            )
        try:
            optimizers = system.optimizers()
        except ValueError as error:
            raise UserError(f"{type(system).__name__}: {error}.") from error
        self._module, *wrapped = fabric.setup(_TrainingStep(system), *optimizers.values())
        self.optimizers = dict(zip(optimizers, wrapped, strict=True))
        self._learning_rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
        self.epoch = 0  # number of finished epochs
        self.step = 0  # number of finished steps in the current epoch
        self.totals: dict[str, Tensor] = {}  # sums of losses over the steps of the current epoch
        self.counts: dict[str, int] = {}  # number of terms of each sum
        self.history: list[dict[str, float]] = []  # mean losses of each finished epoch
        self.seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images.images) // self.batch_size

    def run(self, epochs: int, save: Callable[[], None]) -> None:
        """Train until `epochs` epochs are finished.

        Calls `save` after each epoch, every ten minutes, and after Ctrl-C, which raises KeyboardInterrupt once the current step has
        finished. A KeyboardInterrupt from within a step does not save, as the system may be partially updated. Under DDP Ctrl-C ends the
        run immediately without saving, as ranks may be at different steps.
        """
        self._module.train()
        steps = self.steps_per_epoch
        bar = tqdm(
            total=epochs * steps,
            initial=self.epoch * steps + self.step,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not self.fabric.is_global_zero,
        )
        reference = reference_ops() if self.settings.impl == "reference" else nullcontext()
        single_process = self.fabric.world_size == 1
        with DeferredInterrupt() if single_process else nullcontext() as interrupt, bar, reference:
            saved = time.monotonic()
            while self.epoch < epochs:
                start_seconds, start_step = self.seconds, self.step
                for batch in self.batches()[self.step :]:
                    self._train_on(batch, epochs)
                    bar.update()
                    if interrupt is not None and interrupt.requested:
                        save()
                        raise KeyboardInterrupt
                    if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                        save()
                        saved = time.monotonic()
                self._finish_epoch()
                shown = ", ".join(f"{name} {value:.4f}" for name, value in self.history[-1].items() if name.endswith("loss"))
                # 0 images, if the resumed run had finished the steps of this epoch.
                rate = (steps - start_step) * self.batch_size / max(self.seconds - start_seconds, 1e-9)
                bar.set_postfix_str(f"epoch {self.epoch}, {shown}, {rate:.0f} images/s")
                save()
                saved = time.monotonic()

    def batches(self) -> list[Tensor]:
        """Indices of the images of each batch of the current epoch."""
        order = np.random.default_rng([self.settings.seed, self.epoch]).permutation(len(self.images.images))
        return list(torch.from_numpy(order)[: self.steps_per_epoch * self.batch_size].split(self.batch_size))

    def local_batch(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and labels of this rank's rows of the global batch, on its device."""
        rows = share(batch)
        images, labels = self.images
        return images[rows].to(self.fabric.device), None if labels is None else labels[rows].to(self.fabric.device)

    def state(self) -> dict[str, Any]:
        """State for `restore`."""
        return {
            "model": self.system.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": random_state(self.fabric.device),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals,
            "counts": self.counts,
            "history": self.history,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of an earlier run, including its random state.

        Raises:
            Exception: of any class, for the state of another system or version.
        """
        self.system.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            for parameter, moments in optimizer.state.items():
                for moment in moments.values():
                    if isinstance(moment, Tensor) and moment.dim() and moment.shape != parameter.shape:
                        raise ValueError(f"the optimizer has a state {list(moment.shape)} for a parameter {list(parameter.shape)}")
        restore_random_state(state["random"], self.fabric.device)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.totals = {name: total.to(self.fabric.device) for name, total in state["totals"].items()}
        self.counts = dict(state["counts"])
        self.history = list(state["history"])

    def _train_on(self, batch: Tensor, epochs: int) -> None:
        start = time.perf_counter()
        images, labels = self.local_batch(batch)
        step = self.epoch * self.steps_per_epoch + self.step
        self.system.progress = step / (epochs * self.steps_per_epoch)
        for player in self.system.players_at(step):
            optimizer = self.optimizers[player]
            self._set_learning_rates(player, optimizer)
            with sample_offset(self.fabric.global_rank * len(images)):
                losses = self._module(images, labels, player)
                self.system.zero_grad(set_to_none=True)
                self.fabric.backward(losses["loss"])
            optimizer.step()
            self.system.step_done(player)
            prefix = f"{player}_" if len(self.system.players) > 1 else ""
            for name, loss in losses.items():
                name = prefix + name
                self.totals[name] = self.totals.get(name, 0) + loss.detach().double()
                self.counts[name] = self.counts.get(name, 0) + 1
        self.step += 1
        self.seconds += time.perf_counter() - start

    def _set_learning_rates(self, player: str, optimizer: torch.optim.Optimizer) -> None:
        """Decay the learning rates linearly to 0 over the last `lr_decay` of the steps."""
        decay = self.settings.lr_decay
        factor = min(1.0, (1 - self.system.progress) / decay) if decay else 1.0
        for group, rate in zip(optimizer.param_groups, self._learning_rates[player], strict=True):
            group["lr"] = rate * factor

    def _finish_epoch(self) -> None:
        totals: dict[str, Any] = {name: self.fabric.all_reduce(total, reduce_op="mean") for name, total in self.totals.items()}
        losses = {name: total.item() / self.counts[name] for name, total in totals.items()}
        for name, loss in losses.items():
            if name.endswith("loss") and not math.isfinite(loss):
                raise UserError(f"the {name} became {loss} in epoch {self.epoch + 1}; a smaller --lr may keep it finite.")
        self.history.append(losses)
        self.totals = {}
        self.counts = {}
        self.epoch += 1
        self.step = 0
