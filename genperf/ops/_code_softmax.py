# SPDX-License-Identifier: Apache-2.0
"""What `code_entropy`, `code_cross_entropy` and `sample_code` share: the softmax over all codes, without the positions x codes matrix."""

import math
from typing import Any, get_args

import torch
from torch import Tensor

from .. import _library
from .._choices import Impl, Logits
from ._autograd import Function, apply, differentiate, need_function, need_graph, saved_tensors
from ._code_softmax_chunks import MIN_SQUARED_DISTANCE
from ._dispatch import Reasons, choose_impl, remembered
from ._layout import as_positions
from ._precision import accumulator_dtype
from ._validate import check_mask
from .nearest_code import _as_head_positions, _check_search

LOGITS: tuple[Logits, ...] = get_args(Logits)


def check_arguments(op: str, x: Tensor, codebook: Tensor, temperature: float, logits: Logits, channel_dim: int, mask: Tensor | None) -> int:
    """Check the arguments that the ops share. Returns channel_dim as a non-negative number."""
    channel = _check_search(op, x, codebook, channel_dim)
    if logits not in LOGITS:
        raise ValueError(f"{op}: logits must be one of {', '.join(LOGITS)}, got {logits!r}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{op}: temperature must not be negative, got {temperature!r}.")
    check_mask(op, mask, x, channel)
    return channel


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return {"native": _library.cpu_failure, "reference": None}


def with_heads(x: Tensor, codebook: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    """View x as [heads, outer, D, inner] and the codebook as [heads, K, D]; a [K, D] codebook is one head."""
    if codebook.dim() == 2:
        return as_positions(x, channel).unsqueeze(0), codebook.unsqueeze(0)
    return _as_head_positions(x, channel), codebook


def code_softmax(
    op: str,
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D] or [heads, K, D]
    channel: int,
    mask: Tensor | None,
    indices: Tensor | None,
    logits: Logits,
    temperature: float,
    impl: Impl | None,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Entropy of the softmax, or with `indices` the cross-entropy, of each position. Expects validated arguments.

    Returns:
        value [heads, outer, inner], 0 where the mask is False or the index is -1;
        usage, float64 [heads, K]: the sum of the probabilities of each code, empty with `indices`;
        count: the number of positions that are not masked, at least 1: [heads], or one number for all heads.
    """
    if temperature == 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature!r}.")
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x, codebook)
    positions, codes = with_heads(x, codebook, channel)
    shape = (positions.shape[0], positions.shape[1], positions.shape[3])
    mask = None if mask is None else mask.reshape(shape)
    if indices is not None:
        indices = indices.reshape(shape)
        indices = indices if mask is None else indices.masked_fill(~mask, -1)
        mask = None
    arguments = (positions, codes, mask, indices, logits, float(temperature))
    if chosen == "reference":
        value, usage = code_softmax_reference(*arguments)
    elif need_function(x, codebook):
        value, usage, _ = apply(_CodeSoftmax, *arguments)
    else:
        value, usage, _ = torch.ops.genperf.code_softmax(*arguments)
    valid = mask if indices is None else indices >= 0
    count = shape[1] * shape[2] if valid is None else valid.sum((1, 2))
    return value, usage, count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


class _CodeSoftmax(Function):
    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, mask: Tensor | None, indices: Tensor | None, logits: Logits, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.genperf.code_softmax(x, codebook, mask, indices, logits, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, codebook, mask, indices, ctx.logits, ctx.temperature = inputs
        ctx.save_for_backward(x, codebook, mask, indices, outputs[2])
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, grad_usage: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
        x, codebook, mask, indices, statistics = saved_tensors(ctx)
        needed = ctx.needs_input_grad[:2]
        if grad_value is None and grad_usage is None:
            return (None,) * 6
        if need_graph((grad_value, grad_usage), (x, codebook)):

            def reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
                return code_softmax_reference(x, codebook, mask, indices, ctx.logits, ctx.temperature)

            return (*differentiate(reference, (grad_value, grad_usage), (x, codebook), needed), None, None, None, None)
        grad_x, grad_codebook = torch.ops.genperf.code_softmax_backward(
            grad_value, grad_usage, x, codebook, mask, indices, statistics, ctx.logits, ctx.temperature, *needed
        )
        return grad_x if needed[0] else None, grad_codebook if needed[1] else None, None, None, None, None


def code_softmax_reference(
    x: Tensor,  # [heads, outer, D, inner]
    codebook: Tensor,  # [heads, K, D]
    mask: Tensor | None,  # [heads, outer, inner]
    indices: Tensor | None,  # [heads, outer, inner]
    logits: Logits,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd."""
    heads, outer, _, inner = x.shape
    valid = mask if indices is None else indices >= 0
    log_p = (logits_reference(x, codebook, valid, logits) / temperature).log_softmax(-1)  # [heads, N, K]
    if indices is not None:
        value = -log_p.gather(2, indices.reshape(heads, outer * inner, 1).clamp(min=0)).squeeze(2)
        usage = value.new_zeros(0, dtype=torch.float64)
    else:
        p = log_p.exp()
        value = -(p * torch.where(log_p == -math.inf, 0, log_p)).sum(-1)
        usage = (p if valid is None else torch.where(valid.reshape(heads, outer * inner, 1), p, 0)).sum(1).double()
    value = value.reshape(heads, outer, inner)
    return value if valid is None else torch.where(valid, value, 0), usage


def logits_reference(x: Tensor, codebook: Tensor, valid: Tensor | None, logits: Logits) -> Tensor:
    """The logits [heads, N, K]; where `valid` is False, finite logits of another vector."""
    dtype = accumulator_dtype(x.dtype)
    rows, codes = x.transpose(2, 3).flatten(1, 2).to(dtype), codebook.to(dtype)
    if logits != "dot":
        center = codes.detach().mean(1, keepdim=True)
        rows, codes = rows - center, codes - center
    if valid is not None:
        rows = torch.where(valid.reshape(*rows.shape[:2], 1), rows, 0)
    with torch.autocast(x.device.type, enabled=False):
        products = rows @ codes.mT
    if logits == "dot":
        return products
    squared = rows.square().sum(-1).unsqueeze(2) + codes.square().sum(-1).unsqueeze(1) - 2 * products
    return -squared.clamp(min=MIN_SQUARED_DISTANCE).sqrt() if logits == "distance" else -squared
