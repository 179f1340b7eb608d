# SPDX-License-Identifier: Apache-2.0
"""Training steps that gradient checkpointing runs a second time, in backward.

The second run must see the codes and the random choices of the first one, and must not update anything again.
"""

import weakref
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils._python_dispatch import _disable_current_modes

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
        self._steps: list[tuple[Tensor, Kept, weakref.ref[_Graph] | None]] = []
        self._used = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_steps": [], "_used": False}

    def record(self, x: Tensor, step: Kept, output: Tensor | None = None) -> None:
        """Keep a step on input x, if it may be run again; x or the step's `output` has the graph, with which a step ends."""
        if not may_run_again() or in_backward():
            return
        if self._used:  # of a backward pass that is over
            self._steps, self._used = [], False
        kept = [each for each in self._steps if each[2] is None or each[2]() is not None]
        self._steps = [*kept[1 - _MOST_STEPS :], (_fingerprint(x), step, _graph_of(x if output is None else output))]

    def recall(self, x: Tensor) -> Kept | None:
        """The step on input x, if this is its second run."""
        if not self._steps or torch.compiler.is_compiling() or not in_backward():
            return None
        self._used = True
        fingerprint = _fingerprint(x)
        like = [each for each in self._steps if each[0].shape == fingerprint.shape]
        if len(like) > 1:  # only then does the host look at values
            with _disable_current_modes():
                like = [each for each in like if torch.equal(each[0], fingerprint)] or like
        return like[-1][1] if like else None


class _Graph:
    """Lives as long as an autograd graph, which a step of the past may outlive."""


def may_run_again() -> bool:
    """Whether gradient checkpointing may run this step again: saved tensors are packed by hooks (non-reentrant), or the step runs
    within forward of a Function (reentrant), where forward-mode gradients are off, as they are not under torch.no_grad."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled():
        return _top_saved_tensors_default_hooks(True) is not None
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def in_backward() -> bool:
    """Whether a backward pass is running, which is when gradient checkpointing runs a step again."""
    return torch._C._current_graph_task_id() != -1


def _graph_of(x: Tensor) -> "weakref.ref[_Graph] | None":
    """A reference that ends with the graph of x; None if x has none."""
    if x.grad_fn is None:
        return None
    metadata = cast("dict[str, Any]", x.grad_fn.metadata)
    return weakref.ref(metadata.setdefault("genperf", _Graph()))


def _fingerprint(x: Tensor) -> Tensor:
    """The size of x, the sum of its bits and the bits of some values: NaN equals itself, and the sum does not depend on its order."""
    with _disable_current_modes():  # selective checkpointing counts the operations of both runs
        flat = x.detach().reshape(-1)
        bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        values = bits[:: max(1, flat.numel() // 64)].to(torch.int64)
        return torch.cat([bits.sum().reshape(1), values.new_full((1,), flat.numel()), values])
