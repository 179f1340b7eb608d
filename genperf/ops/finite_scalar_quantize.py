# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantization: each channel is rounded to its own levels; the codebook is the product of the levels."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import Function, ValueOf, apply, differentiate, need_function, need_graph, saved_tensors
from ._dispatch import Reasons, choose_impl, register_fake, remembered, streaming_unavailable
from ._layout import Positions
from ._precision import accumulator_dtype, clamp
from ._validate import check_channel_dim, check_float, check_index_range, check_tensor

MAX_CHANNELS = 64
MAX_LEVELS = 2**20
MAX_CODES = 2**63 - 1


def finite_scalar_quantize(
    x: Tensor,  # [..., D, ...]
    levels: Sequence[int],  # D
    *,
    symmetric: bool = False,
    hard_clamp: bool = False,
    channel_dim: int = -1,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Bound each channel and round it to one of its levels; Mentzer et al., "Finite Scalar Quantization" (FSQ, 2023).

    Equivalent to (channel_dim=-1; L the tensor of levels):
        half, offset = (L - 1) * 1.001 / 2, torch.where(L % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(x + torch.atanh(offset / half)) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        quantized = rounded / (L // 2)
        indices = ((rounded + L // 2) * basis).sum(-1).long()              # basis: 1, L[0], L[0] * L[1], ...
    and with symmetric=True, the variant of Parker et al. (arXiv 2411.19842), whose levels are evenly spaced in [-1, 1]:
        place = (L - 1) * (torch.tanh(x) + 1) / 2 + 0.5
        digits = place + (place.floor() - place).detach()
        quantized = 2 / (L - 1) * digits - 1
        indices = (digits * basis).sum(-1).long()

    Forward and backward are one kernel each, which read and write channels-last and channels-first tensors without a copy and need no
    table of codes. Half-precision inputs are computed in float32. Indices are summed in int64, exact for every codebook, and are the same
    on every device. The gradient passes through the rounding unchanged (straight-through estimator).

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        levels: 2 to 2^20 levels for each of 1 to 64 channels; their product, the number of codes, is at most 2^63 - 1.
        symmetric: use the second variant, without the shift for even numbers of levels.
        hard_clamp: bound by a clamp to [-1, 1] instead of tanh, for inputs that are already bounded.
        channel_dim: the dimension of x that holds the D channels.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        quantized, x's shape and dtype, in [-1, 1]; indices, int64, x's shape without channel_dim.
        Ties round to even, with `symmetric` up. Infinity gives the outermost level. NaN stays NaN in its channel, counts as level 0 in the
        index, and has the gradient NaN (0 with hard_clamp). The factor 1.001 can exceed the last level of channels with more than 1000
        levels; such values get the last level.
        Differentiable in x; second derivatives (create_graph=True) run in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "finite_scalar_quantize"
    check_tensor(op, "x", x)
    check_float(op, "x", x)
    levels = check_levels(op, levels)
    if math.prod(levels) > MAX_CODES:
        raise ValueError(f"{op}: the product of levels, the number of codes, must be at most 2^63 - 1, got {math.prod(levels)}.")
    quantized, indices = quantize_levels(op, x, levels, symmetric, hard_clamp, channel_dim, impl)
    assert indices is not None
    return quantized, indices


def finite_scalar_decode(
    indices: Tensor,  # [...]
    levels: Sequence[int],  # D
    *,
    symmetric: bool = False,
    channel_dim: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The codes of the given indices, bitwise equal to `quantized` of `finite_scalar_quantize` in the same dtype.

    Equivalent to (channel_dim=-1):
        digits = indices.unsqueeze(-1) // basis % L                         # basis: 1, L[0], L[0] * L[1], ...
        codes = (digits - L // 2) / (L // 2)                                # symmetric: 2 / (L - 1) * digits - 1

    Args:
        indices: any integer dtype; negative indices, which mark masked positions, give zeros.
        levels, symmetric: as in `finite_scalar_quantize`.
        channel_dim: the position of the channel dimension in the result.
        dtype: of the codes; None for torch's default dtype.

    Returns:
        codes [..., D, ...].

    Raises:
        ValueError, TypeError: an invalid argument.
        IndexError: an index past the last code. On CUDA, where reading it would synchronize, a device assertion fails instead.
    """
    op = "finite_scalar_decode"
    check_tensor(op, "indices", indices)
    levels = check_levels(op, levels)
    indices = check_indices(op, indices, math.prod(levels))
    dtype = torch.get_default_dtype() if dtype is None else dtype
    channels = []
    for count, basis in zip(levels, basis_of(levels), strict=True):  # Python numbers, which need no copy to the device
        digits = (indices // basis % count).to(accumulator_dtype(dtype))
        middle = _middle(count, symmetric)
        channels.append(torch.where(indices >= 0, (digits - middle) / middle, 0).to(dtype))
    return torch.stack(channels, channel_dim)


def check_indices(op: str, indices: Tensor, num_codes: int) -> Tensor:
    """Check indices to decode, which may be negative. Returns them as int64: narrower dtypes may not hold the number of codes."""
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise TypeError(f"{op}: indices must be integers, got {indices.dtype}.")
    indices = indices.long()
    check_index_range(op, indices, num_codes, None)
    if indices.device.type == "cuda" and num_codes <= MAX_CODES and not torch.compiler.is_compiling():
        torch._assert_async((indices < num_codes).all(), f"{op}: an index is past the last of the {num_codes} codes.")
    return indices


def check_levels(op: str, levels: Sequence[int]) -> list[int]:
    levels = [operator.index(count) if hasattr(count, "__index__") else count for count in levels]
    if not 1 <= len(levels) <= MAX_CHANNELS or not all(isinstance(count, int) and 2 <= count <= MAX_LEVELS for count in levels):
        raise ValueError(f"{op}: levels must be 1 to {MAX_CHANNELS} integers of 2 to 2^20, got {levels}.")
    return levels


def basis_of(levels: Sequence[int]) -> list[int]:
    """The weight of each channel's level in the index."""
    return [math.prod(levels[:d]) for d in range(len(levels))]


def quantize_levels(
    op: str, x: Tensor, levels: list[int], symmetric: bool, hard: bool, channel_dim: int, impl: Impl | None, indexed: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`finite_scalar_quantize` of validated levels. Without `indexed` the indices are None, and the number of codes is not limited."""
    channel = check_channel_dim(op, x, channel_dim)
    if x.shape[channel] != len(levels):
        raise ValueError(
            f"{op}: the channel dimension of x must have one channel for each of the {len(levels)} levels, got {x.shape[channel]} "
            f"(x {list(x.shape)}, channel_dim={channel_dim})."
        )
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x)
    positions = Positions(x, channel)
    vectors, options = positions.vectors, (levels, symmetric, hard, indexed)
    if chosen == "reference":
        quantized, indices = finite_scalar_quantize_reference(vectors, *options)
    elif need_function(x):
        quantized, indices = apply(_FiniteScalarQuantize, vectors, *options)
    else:
        quantized, indices = torch.ops.genperf.finite_scalar_quantize(vectors, *options)
    return positions.restore(quantized), positions.restore_indices(indices) if indexed else None


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("finite_scalar_quantize", device, dtype)


class _FiniteScalarQuantize(Function):
    @staticmethod
    def forward(x: Tensor, levels: list[int], symmetric: bool, hard: bool, indexed: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.genperf.finite_scalar_quantize(x, levels, symmetric, hard, indexed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        x, *ctx.options = inputs
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, _indices: None) -> tuple[Tensor | None, ...]:
        (x,) = saved_tensors(ctx)
        levels, symmetric, hard, _ = ctx.options
        if grad_quantized is None:
            grad_x = None
        elif need_graph((grad_quantized,), (x,)):

            def reference(x: Tensor) -> tuple[Tensor]:
                return (finite_scalar_quantize_reference(x, levels, symmetric, hard, False)[0],)

            (grad_x,) = differentiate(reference, (grad_quantized,), (x,), (True,))
        else:
            grad_x = torch.ops.genperf.finite_scalar_quantize_backward(grad_quantized, x, levels, symmetric, hard)
        return grad_x, None, None, None, None


def finite_scalar_quantize_reference(
    x: Tensor,  # [outer, D, inner]
    levels: list[int],
    symmetric: bool,
    hard: bool,
    indexed: bool,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd, with the memory layout of the compiled op."""
    wide = x.to(accumulator_dtype(x.dtype))
    bound = _clamp if hard else torch.tanh
    if symmetric:
        top = _column([count - 1 for count in levels], wide)
        carried = bound(wide)
        digits = (top * (carried + 1) / 2 + 0.5).floor()
    else:
        half = [(count - 1) * 1.001 / 2 for count in levels]
        offset = [0.0 if count % 2 else 0.5 for count in levels]
        shift = [o / h if hard else math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
        width = _column([count // 2 for count in levels], wide)
        bounded = bound(wide + _column(shift, wide)) * _column(half, wide) - _column(offset, wide)
        carried = bounded / width
        digits = bounded.round() + width
    digits = digits.detach().clamp(min=0).minimum(_column([count - 1 for count in levels], wide))
    middle = _column([_middle(count, symmetric) for count in levels], wide)
    quantized = ValueOf.apply((digits - middle) / middle, carried).to(x.dtype)
    if not indexed:
        return quantized, x.new_empty(0, dtype=torch.int64)
    whole = digits.nan_to_num(0).long()
    return quantized, (whole * _column(basis_of(levels), whole)).sum(1)


def _clamp(x: Tensor) -> Tensor:
    return clamp(x, -1, 1)


def _middle(count: int, symmetric: bool) -> float:
    """The digit of the value 0: a digit stands for (digit - middle) / middle."""
    return (count - 1) / 2 if symmetric else count // 2


def numbers_like(numbers: Sequence[float] | float, like: Tensor) -> Tensor | float:
    """The numbers [D] as a factor or divisor of [..., D], in the dtype and on the device of `like`; a number if all are equal."""
    if not isinstance(numbers, Sequence):
        return numbers
    return numbers[0] if len({*numbers}) == 1 else _column(numbers, like).squeeze(1)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """The numbers [D, 1], in the dtype and on the device of `like`."""
    if like.device.type == "cuda":
        return _filled_column(numbers, like.dtype, like.device)
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)


def _filled_column(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers [D, 1], each run of equal ones filled in: a copy to the GPU would wait, and no CUDA graph can capture it."""
    runs = [(number, len(list(group))) for number, group in itertools.groupby(numbers)]
    return torch.cat([torch.full((length, 1), number, dtype=dtype, device=device) for number, length in runs])


@register_fake("finite_scalar_quantize")
def _(x: Tensor, levels: list[int], symmetric: bool, hard: bool, indexed: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[2]) if indexed else (0,)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.int64)


@register_fake("finite_scalar_quantize_backward")
def _(grad_quantized: Tensor, x: Tensor, levels: list[int], symmetric: bool, hard: bool) -> Tensor:
    return torch.empty_like(x)
