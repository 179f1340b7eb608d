"""The training loop: resumable at any step with the result of an uninterrupted run, in one process or many."""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from tqdm import tqdm

from .._errors import UserError
from ..models import System
from ..models.system import share
from ..ops import reference_ops, sample_offset
from .checkpoint import random_state, restore_random_state
from .data import LabelledImages
from .interrupt import DeferredInterrupt
from .runs import Settings

_SECONDS_BETWEEN_CHECKPOINTS = 600


def make_fabric(device: torch.device, precision: str) -> Fabric:
    """One process on the device, or one of those that torchrun started, each on the GPU of its rank (or on the CPU)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # A step moves the parameters of one player. Buffers are the same everywhere, since statistics are joined.
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if world > 1 else "auto"
    devices = [device.index or 0] if world == 1 and device.type == "cuda" else local
    fabric = Fabric(
        accelerator=device.type,
        devices=devices,
        num_nodes=world // local,
        strategy=strategy,
        precision={"32": "32-true", "bf16": "bf16-mixed"}[precision],
    )
    fabric.launch()
    return fabric


class _TrainingStep(nn.Module):
    """A system as the engine wants it, whose precision and gradient exchange apply to `forward` alone."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, images: Tensor, labels: Tensor | None, player: str) -> dict[str, Tensor]:
        return self.system.training_step(images, labels, player=player)


class Training:
    """Trains a system; see `genperf.models.System` for the steps.

    The order of the images depends on seed and epoch alone, so position and state are all that a resumed run needs. Every
    process has all images, the same random state and its share of each batch. Images that do not fill the last batch of an
    epoch are left out of it.
    """

    def __init__(self, fabric: Fabric, system: System, images: LabelledImages, settings: Settings) -> None:
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
        self._rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
        self.epoch = 0  # finished ones
        self.step = 0  # finished ones of the current epoch
        self.totals: dict[str, Tensor] = {}  # losses summed over the steps of the current epoch
        self.counts: dict[str, int] = {}  # of those steps
        self.history: list[dict[str, float]] = []  # mean losses of each finished epoch
        self.seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images.images) // self.batch_size

    def run(self, epochs: int, save: Callable[[], None]) -> None:
        """Train until `epochs` are finished; `save` is called after each, and before KeyboardInterrupt ends the run.

        Ctrl-C lets the step finish first. A KeyboardInterrupt from within a step leaves the last checkpoint alone: it
        is whole, while the system may be half updated. Among several processes, which cannot agree on a step, Ctrl-C ends at once.
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
        alone = self.fabric.world_size == 1
        with DeferredInterrupt() if alone else nullcontext() as interrupt, bar, reference:
            saved = time.monotonic()
            while self.epoch < epochs:
                start, began = self.seconds, self.step
                for batch in self.batches()[self.step :]:
                    self._train_on(batch, epochs)
                    bar.update()
                    if alone and interrupt.requested:
                        save()
                        raise KeyboardInterrupt
                    if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                        save()
                        saved = time.monotonic()
                self._finish_epoch()
                shown = ", ".join(f"{name} {value:.4f}" for name, value in self.history[-1].items() if name.endswith("loss"))
                rate = (steps - began) * self.batch_size / max(self.seconds - start, 1e-9)  # 0 where the last run ended with the epoch
                bar.set_postfix_str(f"epoch {self.epoch}, {shown}, {rate:.0f} images/s")
                save()
                saved = time.monotonic()

    def batches(self) -> list[Tensor]:
        """Indices of the images of each batch of the current epoch."""
        order = np.random.default_rng([self.settings.seed, self.epoch]).permutation(len(self.images.images))
        return list(torch.from_numpy(order)[: self.steps_per_epoch * self.batch_size].split(self.batch_size))

    def share(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and labels of this process's share of the batch, on its device."""
        rows = share(batch)
        images, labels = self.images
        return images[rows].to(self.fabric.device), None if labels is None else labels[rows].to(self.fabric.device)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue."""
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
        self.system.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        restore_random_state(state["random"], self.fabric.device)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.totals = {name: total.to(self.fabric.device) for name, total in state["totals"].items()}
        self.counts = dict(state["counts"])
        self.history = list(state["history"])

    def _train_on(self, batch: Tensor, epochs: int) -> None:
        start = time.perf_counter()
        images, labels = self.share(batch)
        step = self.epoch * self.steps_per_epoch + self.step
        self.system.progress = step / (epochs * self.steps_per_epoch)
        for player in self.system.players_at(step):
            optimizer = self.optimizers[player]
            self._set_rates(player, optimizer)
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

    def _set_rates(self, player: str, optimizer: torch.optim.Optimizer) -> None:
        """The rates fall linearly to 0 over the last part of the training."""
        decay = self.settings.lr_decay
        factor = min(1.0, (1 - self.system.progress) / decay) if decay else 1.0
        for group, rate in zip(optimizer.param_groups, self._rates[player], strict=True):
            group["lr"] = rate * factor

    def _finish_epoch(self) -> None:
        totals = {name: self.fabric.all_reduce(total, reduce_op="mean") for name, total in self.totals.items()}
        losses = {name: total.item() / self.counts[name] for name, total in totals.items()}
        for name, loss in losses.items():
            if name.endswith("loss") and not math.isfinite(loss):
                raise UserError(f"the {name} became {loss} in epoch {self.epoch + 1}; a smaller --lr may keep it finite.")
        self.history.append(losses)
        self.totals = {}
        self.counts = {}
        self.epoch += 1
        self.step = 0
