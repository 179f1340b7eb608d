"""The training loop: resumable at any step with the result of an uninterrupted run."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import random_state, restore_random_state
from .errors import UserError
from .interrupt import DeferredInterrupt


class Training:
    """Trains a model that has `training_step(batch) -> losses by name`, "loss" being the one to minimise.

    The order of the images depends on seed and epoch alone, so position and state are all that a resumed run needs.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, *, batch_size: int, seed: int) -> None:
        self.model = model
        self.optimizer = optimizer
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.device = next(model.parameters()).device
        self.epoch = 0  # finished ones
        self.step = 0  # finished ones of the current epoch
        self.totals: dict[str, Tensor] = {}  # losses summed over the images of the current epoch
        self.history: list[dict[str, float]] = []  # mean losses of each finished epoch
        self.seconds = 0.0

    def run(self, epochs: int, save: Callable[[], None]) -> None:
        """Train until `epochs` are finished; `save` is called after each, and before KeyboardInterrupt ends the run.

        Ctrl-C lets the step finish first. A KeyboardInterrupt from within a step leaves the last checkpoint alone: it
        is whole, while the model may be half updated.
        """
        self.model.train()
        steps = len(self.batches())
        bar = tqdm(
            total=epochs * steps, initial=self.epoch * steps + self.step, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10
        )
        with DeferredInterrupt() as interrupt, bar:
            while self.epoch < epochs:
                for batch in self.batches()[self.step :]:
                    self._train_on(self.images[batch].to(self.device))
                    bar.update()
                    if interrupt.requested:
                        save()
                        raise KeyboardInterrupt
                self._finish_epoch()
                bar.set_postfix_str(f"epoch {self.epoch}, loss {self.history[-1]['loss']:.4f}")
                save()

    def batches(self) -> list[Tensor]:
        """Indices of the images of each batch of the current epoch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.images))
        return list(torch.from_numpy(order).split(self.batch_size))

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(self.device),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals,
            "history": self.history,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"], self.device)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        self.history = list(state["history"])

    def _train_on(self, batch: Tensor) -> None:
        start = time.perf_counter()
        losses = self.model.training_step(batch)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        for name, loss in losses.items():
            self.totals[name] = self.totals.get(name, 0) + loss.detach().double() * len(batch)
        self.step += 1
        self.seconds += time.perf_counter() - start

    def _finish_epoch(self) -> None:
        losses = {name: total.item() / len(self.images) for name, total in self.totals.items()}
        if not math.isfinite(losses["loss"]):
            raise UserError(f"the loss became {losses['loss']} in epoch {self.epoch + 1}; a smaller --lr may keep it finite.")
        self.history.append(losses)
        self.totals = {}
        self.epoch += 1
        self.step = 0
