"""Helpers for autograd Functions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """`function.apply(*arguments)` without its inspection of forward's signature, which takes longer than a small kernel."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    c_function: Any = super(torch.autograd.Function, function)
    return c_function.apply(*arguments)


def differentiate(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Differentiable gradients of the needed inputs (create_graph=True); None for an input that no output depends on."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None and out.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    used, upstream = ([pair[side] for pair in pairs] for side in (0, 1))
    found = iter(torch.autograd.grad(used, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


class ValueOf(torch.autograd.Function):
    """`ValueOf.apply(value, carrier)` has the value of `value` and the gradient of `carrier`, without the rounding of a + (b - a)."""

    @staticmethod
    def forward(value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
