# SPDX-License-Identifier: Apache-2.0
"""Training steps that gradient checkpointing runs a second time, in backward.

The second run must see the codes and the random choices of the first one, and must not update anything again.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks

_MOST_STEPS = 64  # between two backward passes


class Step(NamedTuple):
    """What a training step used."""

    codebook: Tensor
    """The codes from before the update."""
    indices: Any
    """The codes that were chosen, in the layout of the layer."""
    num_quantizers: int | Tensor | None = None


Kept = TypeVar("Kept")


class StepMemory(Generic[Kept]):
    """The steps that a layer may have to repeat. Empty unless the forward pass runs under gradient checkpointing."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Kept]] = []
        self._used = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_steps": [], "_used": False}

    def record(self, x: Tensor, step: Kept) -> None:
        """Keep a step on input x, if it may be run again."""
        if not may_run_again():
            return
        if self._used:  # of a backward pass that is over
            self._steps, self._used = [], False
        self._steps = [*self._steps[1 - _MOST_STEPS :], (_fingerprint(x), step)]

    def recall(self, x: Tensor) -> Kept | None:
        """The step on input x, if this is its second run."""
        if not self._steps or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return None
        self._used = True
        fingerprint = _fingerprint(x)
        like = [(kept, step) for kept, step in self._steps if kept.shape == fingerprint.shape]
        if len(like) > 1:  # only then does the host look at values
            like = [pair for pair in like if torch.equal(pair[0], fingerprint)] or like
        return like[-1][1] if like else None


def may_run_again() -> bool:
    """Whether gradient checkpointing may run this step again: saved tensors are packed by hooks (non-reentrant), or a training step
    records no gradients (reentrant)."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or _top_saved_tensors_default_hooks(True) is not None


def _fingerprint(x: Tensor) -> Tensor:
    """The size of x and some of its values."""
    flat = x.detach().reshape(-1)
    return torch.cat([flat.new_full((1,), flat.numel() % 2039), flat[:: max(1, flat.numel() // 64)].clone()])
