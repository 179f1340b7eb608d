# SPDX-License-Identifier: Apache-2.0
"""Helpers for autograd Functions, which also run under the transforms of torch.func."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._C._functorch as _functorch
from torch import Tensor


class Function(torch.autograd.Function):
    """Base class of the ops' Functions. Within torch.vmap, forward runs once for each sample of the batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        batched = [isinstance(t, Tensor) and dim is not None for t, dim in zip(arguments, in_dims, strict=True)]

        def run(sample: Callable[[Tensor, int], Tensor]) -> Any:
            return cls.apply(*(sample(t, dim) if on else t for t, dim, on in zip(arguments, in_dims, batched, strict=True)))

        def stack(found: list[Any] | tuple[Any, ...]) -> Any:
            return torch.stack(found)[: info.batch_size]

        if info.batch_size:
            found = [run(lambda t, dim, i=i: t.select(dim, i)) for i in range(info.batch_size)]
        else:  # a sample of zeros gives the shapes of the results
            found = [run(lambda t, dim: t.sum(dim, dtype=t.dtype))]
        if isinstance(found[0], tuple):
            return tuple(map(stack, zip(*found, strict=True))), (0,) * len(found[0])
        return stack(found), 0


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

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, int | None], *pair: Tensor) -> tuple[Tensor, int]:
        return cls.apply(
            *(t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(pair, in_dims, strict=True))
        ), 0


class _Call(Function):
    @staticmethod
    def forward(op: Callable[..., Any], *arguments: Any) -> Any:
        return op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        ctx.mark_non_differentiable(*(outputs if isinstance(outputs, tuple) else (outputs,)))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def call(op: Callable[..., Any], *arguments: object) -> Any:
    """`op(*arguments)` of a compiled op, without a gradient, also within the transforms of torch.func."""
    # torch.compile runs a compiled op once a sample by itself.
    return _Call.apply(op, *arguments) if transformed() and not torch.compiler.is_compiling() else op(*arguments)


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """`function.apply(*arguments)` without its inspection of forward's signature, which takes longer than a small kernel."""
    if torch.compiler.is_dynamo_compiling():
        # With dynamic shapes a float is an input of the graph. If Dynamo (torch 2.13) reads it first within a Function, its next use fails.
        return function.apply(*[argument * 1.0 if isinstance(argument, float) else argument for argument in arguments])
    if torch.compiler.is_compiling() or transformed():
        return function.apply(*arguments)
    c_function: Any = super(torch.autograd.Function, function)
    return c_function.apply(*arguments)


# Whether a transform of torch.func is active (vmap, grad, vjp, jvp, ...).
transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active


def can_view_within(x: Tensor) -> bool:
    """Whether x can be passed to a Function of `viewing`: not where torch.compile or a transform of torch.func sees its views."""
    return x.is_contiguous() and not torch.compiler.is_compiling() and not transformed()


def viewing(function: type[Function]) -> type[Function]:
    """A Function of contiguous x [..., D, ...] from one of vectors [outer, D, inner], so that autograd records one node instead of three.

    These are its first argument, the first tensor that it saves, its first output and their gradients. Two further arguments are the
    sizes of the vectors and the dimension of x that holds the channels.
    """

    class Viewing(Function):
        @staticmethod
        def forward(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
            *options, sizes, channel = arguments
            first, *rest = function.forward(x.view(*sizes), *options)
            shape, channels = x.shape, first.shape[1]
            if shape[channel] != channels:
                shape = (*shape[:channel], channels, *shape[channel + 1 :])
            # Autograd forbids to modify a view in place that a Function returns, unless it is detached.
            return first.view(*shape).detach(), *rest

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            *arguments, ctx.sizes, ctx.channel = inputs
            ctx.shape = inputs[0].shape
            function.setup_context(ctx, tuple(arguments), outputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor | None, *gradients: Any) -> tuple[Any, ...]:
            if gradient is not None:
                outer, _, inner = ctx.sizes
                gradient = gradient.reshape(outer, gradient.shape[ctx.channel], inner)
            grad_x, *rest = function.backward(ctx, gradient, *gradients)
            return None if grad_x is None else grad_x.reshape(*ctx.shape), *rest, None, None

    Viewing.__name__ = Viewing.__qualname__ = function.__name__
    return Viewing


def need_function(*tensors: Tensor | None) -> bool:
    """Whether an op must run as a Function: an input requires a gradient, or a transform of torch.func is active.

    Within torch.vmap no tensor requires a gradient, even if one passes through the transform.
    """
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    if not transformed():
        return False
    if torch.compiler.is_compiling() and any(t is not None and _functorch.is_batchedtensor(t) for t in tensors):
        torch._dynamo.graph_break("an op within torch.vmap")  # whose gradient the graph would lose
    return True


def requires_grad(value: object) -> bool:
    """Whether a gradient of `value` is needed, also by an outer transform of torch.func."""
    if not isinstance(value, Tensor) or not torch.is_grad_enabled():
        return False
    if transformed():
        if torch.compiler.is_compiling():  # which cannot look beneath a transform
            return True
        while not value.requires_grad and _functorch.is_functorch_wrapped_tensor(value):
            value = _functorch.get_unwrapped(value)
    return value.requires_grad


def values_of(t: Tensor) -> Tensor:
    """The tensor beneath the transforms of torch.func, whose values can be read. Within torch.vmap it holds the whole batch."""
    if transformed():
        while _functorch.is_functorch_wrapped_tensor(t):
            t = _functorch.get_unwrapped(t)
    return t


def is_batched(t: Tensor) -> bool:
    """Whether torch.vmap maps over t."""
    if torch.compiler.is_compiling() or not transformed():
        return False
    while not _functorch.is_batchedtensor(t):
        if not _functorch.is_functorch_wrapped_tensor(t):
            return False
        t = _functorch.get_unwrapped(t)
    return True


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, free of the wrappers of a transform that has ended, as when the function of torch.func.vjp calls backward."""
    saved: tuple[Any, ...] = ctx.saved_tensors
    if (torch.is_grad_enabled() or transformed()) and not torch.compiler.is_compiling():
        saved = tuple(None if t is None else _functorch.unwrap_if_dead(t) for t in saved)
    sizes = getattr(ctx, "sizes", None)  # set by `viewing`
    return saved if sizes is None else (saved[0].view(*sizes), *saved[1:])


def need_graph(gradients: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> bool:
    """Whether backward, called with `gradients`, must run in plain PyTorch.

    That is with create_graph=True, for gradients that can be differentiated again, under a transform of torch.func, and for the batched
    gradients of `torch.autograd.grad(..., is_grads_batched=True)`.

    Args:
        saved: the saved tensors that may require a gradient.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.is_grad_enabled()
    if torch.is_grad_enabled():
        # The function that torch.func.vjp returns calls backward in grad mode also if nothing requires a gradient.
        return transformed() or any(t is not None and t.requires_grad for t in (*gradients, *saved))
    if transformed():
        return True
    for gradient in gradients:  # noqa: SIM110 (slower)
        if gradient is not None and _functorch.is_legacy_batchedtensor(gradient):
            return True
    return False


def differentiate(
    function: Callable[..., Sequence[Tensor]],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` in the needed inputs, which can be differentiated again if grad mode is on.

    Args:
        function: returns a tensor for each of `gradients`.
        gradients: those of its outputs; None for an output that does not count.

    Returns:
        a gradient for each input; None for one that is not needed, or that no output depends on.
    """
    wanted = [(place, t) for place, (t, need) in enumerate(zip(inputs, needed, strict=True)) if need and t is not None]
    found: list[Tensor | None] = [None] * len(inputs)
    if not wanted or all(gradient is None for gradient in gradients):
        return found

    def outputs_of(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for (place, _), t in zip(wanted, tensors, strict=True):
            arguments[place] = t
        return tuple(out for out, gradient in zip(function(*arguments), gradients, strict=True) if gradient is not None)

    upstream = tuple(gradient for gradient in gradients if gradient is not None)
    if transformed():
        pull_back = torch.func.vjp(outputs_of, *(t for _, t in wanted))[1]
        values = pull_back(upstream)
    else:
        # Views, so that no gradient passes from one input to another that it was computed from.
        with torch.enable_grad():
            views = [t.view_as(t) for _, t in wanted]
            views = [t if t.requires_grad else t.detach().requires_grad_() for t in views]
            outputs = outputs_of(*views)
        pairs = [(out, gradient) for out, gradient in zip(outputs, upstream, strict=True) if out.requires_grad]
        if not pairs:
            return found
        used, upstream = zip(*pairs, strict=True)
        values = torch.autograd.grad(used, views, upstream, create_graph=torch.is_grad_enabled(), allow_unused=True)
    for (place, _), value in zip(wanted, values, strict=True):
        found[place] = value
    return found
