# SPDX-License-Identifier: Apache-2.0
"""What `code_entropy`, `code_cross_entropy` and `sample_code` share: the softmax over all codes, without the positions x codes matrix."""

import math
from typing import Any, get_args

import torch
from torch import Tensor

from .. import _library
from .._choices import Impl, Logits
from ._autograd import Function, apply, differentiate, need_function, need_graph, saved_tensors, transformed
from ._code_softmax_chunks import FORMS, MIN_SQUARED_DISTANCE, mean_and_entropy
from ._dispatch import Reasons, choose_impl, register_fake, remembered
from ._layout import as_positions, positions_shape
from ._precision import accumulator_dtype
from ._validate import check_index_range, check_mask
from .nearest_code import _as_head_positions, _check_search

LOGITS: tuple[Logits, ...] = get_args(Logits)

# Where the kernel of small inputs is faster: it has less to do around the matrix products, for which the library takes less time.
MAX_SMALL = 1 << 16
MAX_SMALL_LOGITS = 1 << 18
MAX_SMALL_PRODUCTS = 1 << 22


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


def by_head(
    x: Tensor, codebook: Tensor, mask: Tensor | None, indices: Tensor | None, channel: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x as [heads, outer, D, inner], codebook as [heads, K, D], mask and indices as [heads, outer, inner]; [K, D] codes are of one head."""
    if codebook.dim() == 2:
        x, codebook = as_positions(x, channel).unsqueeze(0), codebook.unsqueeze(0)
    else:
        x = _as_head_positions(x, channel)
    sizes = x.shape[0], x.shape[1], x.shape[3]
    return x, codebook, None if mask is None else mask.reshape(sizes), None if indices is None else indices.reshape(sizes)


def is_small(x: Tensor, codebook: Tensor, *per_position: Tensor | None) -> bool:
    """Whether one kernel computes the op, because the logits of all positions are in cache. Not where a graph or a batch is made."""
    if torch.compiler.is_compiling() or transformed() or x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    size = x.numel()
    products = size * codebook.shape[-2]
    if size > MAX_SMALL or products > MAX_SMALL_PRODUCTS or products > MAX_SMALL_LOGITS * codebook.shape[-1]:
        return False
    if codebook.numel() > MAX_SMALL:
        return False
    for t in (x, codebook, *per_position):  # noqa: SIM110 (slower)
        if t is not None and not t.is_contiguous():
            return False
    return True


def code_softmax(
    op: str,
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D] or [heads, K, D]
    channel: int,
    mask: Tensor | None,
    indices: Tensor | None,
    logits: Logits,
    temperature: float,
    floor: float,
    impl: Impl | None,
) -> tuple[Tensor, Tensor]:
    """Mean entropy of the softmax, or with `indices` the mean cross-entropy, of the positions.

    Expects arguments that are checked, except for the values of the indices.

    Returns:
        mean, a scalar or [heads], of the positions whose mask is True and whose index is not -1;
        entropy of the mean probabilities, which are at least `floor` in the logarithm: likewise, or empty with `indices`.
    """
    if temperature == 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature!r}.")
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x, codebook)
    temperature = float(temperature)
    small = chosen != "reference" and is_small(x, codebook, mask, indices)
    if indices is not None and (mask is not None or not small):
        check_index_range(op, indices, codebook.shape[-2])
        if mask is not None:
            indices, mask = indices.masked_fill(~mask, -1), None
    if small:
        arguments = (x, codebook, mask, indices, logits, temperature, floor, channel)
        try:
            found = apply(_CodeSoftmax, *arguments) if need_function(x, codebook) else _forward(*arguments)
        except RuntimeError:
            if indices is not None:  # which the kernel checks too
                check_index_range(op, indices, codebook.shape[-2])
            raise
        return found[0], found[1]
    if chosen == "reference":
        return _reference(x, codebook, mask, indices, logits, temperature, floor, channel)
    arguments = (*by_head(x, codebook, mask, indices, channel), logits, temperature, floor, None)
    found = apply(_CodeSoftmax, *arguments) if need_function(x, codebook) else _forward(*arguments)
    return _like_codebook(found[0], found[1], codebook)


def _like_codebook(mean: Tensor, entropy: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Results [heads], or scalars for a codebook [K, D]. An empty entropy stays as it is, since its dimension is not of size 1."""
    return (mean, entropy) if codebook.dim() == 3 else (mean.squeeze(0), entropy.squeeze(0))


def _forward(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    logits: Logits,
    temperature: float,
    floor: float,
    channel: int | None,  # that of a small input, else None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if channel is None:
        return torch.ops.genperf.code_softmax(x, codebook, mask, indices, logits, temperature, floor)
    return torch.ops.genperf.small_code_softmax(x, codebook, mask, indices, FORMS[logits], temperature, floor, channel)


class _CodeSoftmax(Function):
    @staticmethod
    def forward(
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        indices: Tensor | None,
        logits: Logits,
        temperature: float,
        floor: float,
        channel: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(x, codebook, mask, indices, logits, temperature, floor, channel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        x, codebook, mask, indices, ctx.logits, ctx.temperature, ctx.floor, ctx.channel = inputs
        _, entropy, usage, statistics = outputs
        ctx.save_for_backward(x, codebook, mask, indices, usage, statistics)
        ctx.mark_non_differentiable(usage, statistics, *(() if indices is None else (entropy,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, codebook, mask, indices, usage, statistics = saved_tensors(ctx)
        needed = ctx.needs_input_grad[:2]
        if grad_mean is None and grad_entropy is None:
            return (None,) * 8
        if need_graph((grad_mean, grad_entropy), (x, codebook)):

            def reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
                return _reference(x, codebook, mask, indices, ctx.logits, ctx.temperature, ctx.floor, ctx.channel)

            return (*differentiate(reference, (grad_mean, grad_entropy), (x, codebook), needed), *(None,) * 6)
        arguments = (grad_mean, grad_entropy, x, codebook, mask, indices, usage, statistics)
        if ctx.channel is None:
            grad_x, grad_codebook = torch.ops.genperf.code_softmax_backward(*arguments, ctx.logits, ctx.temperature, ctx.floor, *needed)
        else:
            grad_x, grad_codebook = torch.ops.genperf.small_code_softmax_backward(
                *arguments, FORMS[ctx.logits], ctx.temperature, ctx.floor, ctx.channel, *needed
            )
        return grad_x if needed[0] else None, grad_codebook if needed[1] else None, None, None, None, None, None, None


def _reference(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    logits: Logits,
    temperature: float,
    floor: float,
    channel: int | None,
) -> tuple[Tensor, Tensor]:
    """`code_softmax_reference` of what `_forward` takes, with results of the same shapes."""
    if channel is None:
        return code_softmax_reference(x, codebook, mask, indices, logits, temperature, floor)
    found = code_softmax_reference(*by_head(x, codebook, mask, indices, channel), logits, temperature, floor)
    return _like_codebook(*found, codebook)


def code_softmax_reference(
    x: Tensor,  # [heads, outer, D, inner]
    codebook: Tensor,  # [heads, K, D]
    mask: Tensor | None,  # [heads, outer, inner]
    indices: Tensor | None,  # [heads, outer, inner]
    logits: Logits,
    temperature: float,
    floor: float,
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
    return mean_and_entropy(value if valid is None else torch.where(valid, value, 0), usage, valid, floor)


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


@register_fake("small_code_softmax")
def _(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    form: int,
    temperature: float,
    floor: float,
    channel: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, codes = codebook.shape[:-2], codebook.shape[-2]
    return (
        x.new_empty(heads, dtype=torch.float32),
        x.new_empty(heads if indices is None else (0,), dtype=torch.float32),
        x.new_empty((*heads, codes) if indices is None else (0,), dtype=torch.float64),
        x.new_empty((3, heads.numel(), x.numel() // (heads.numel() * codebook.shape[-1])), dtype=torch.float32),
    )


@register_fake("small_code_softmax_backward")
def _(
    grad_mean: Tensor | None,
    grad_entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    usage: Tensor,
    statistics: Tensor,
    form: int,
    temperature: float,
    floor: float,
    channel: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(codebook) if need_codebook else codebook.new_empty(0)


@register_fake("small_sample_code")
def _(
    x: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, first: int, form: int, temperature: float, channel: int
) -> Tensor:
    return x.new_empty(positions_shape(x, channel), dtype=torch.int64)
