"""Helpers for autograd Functions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    """function.apply(*arguments) without its inspection of forward's signature, which takes longer than a small kernel."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def differentiate(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the needed inputs that can be differentiated again; None where there is no path."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None and out.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outputs, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


class ValueOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another, without the rounding of a + (b - a)."""

    @staticmethod
    def forward(value, carrier):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None, grad
