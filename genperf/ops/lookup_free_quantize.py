# SPDX-License-Identifier: Apache-2.0
"""Lookup-free quantization: the sign of each channel is one bit of the code."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._choices import Impl
from ._autograd import Function, ValueOf, apply, differentiate, need_function, need_graph, saved_tensors
from ._dispatch import Reasons, choose_impl, register_fake, remembered, streaming_unavailable
from ._layout import Positions
from ._validate import check_channel_dim, check_float, check_tensor
from .finite_scalar_quantize import check_indices

MAX_BITS = 63


def lookup_free_quantize(
    x: Tensor,  # [..., D, ...]
    *,
    scale: float = 1.0,
    spherical: bool = False,
    channel_dim: int = -1,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize each channel to its sign: LFQ, Yu et al. (arXiv 2310.05737); BSQ, Zhao et al. (arXiv 2406.07548).

    Equivalent to (channel_dim=-1):
        sign = torch.where(x > 0, scale, -scale)
        quantized = x + (sign - x).detach()                                 # bitwise equal to sign
        indices = ((x > 0) << torch.arange(D - 1, -1, -1)).sum(-1)
    and with spherical=True, where codes and vectors have length `scale`:
        x = scale * F.normalize(x, dim=-1)
        sign = torch.where(x > 0, scale, -scale) / D**0.5

    Forward is one kernel, which reads and writes channels-last and channels-first tensors without a copy and needs no table of codes.
    Backward is none, or one with `spherical`. `lookup_free_entropy` computes the entropy losses for these codes.

    Args:
        x: float32, bfloat16, float16 or float64, 1 to 63 channels; any strides.
        scale: positive; the absolute value of the components of a code, with `spherical` the length of a code.
        spherical: normalize x to length `scale` first.
        channel_dim: the dimension of x that holds the D channels.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        quantized, x's shape and dtype; indices, int64, x's shape without channel_dim, with the first channel as the most significant bit.
        Zero counts as negative. NaN stays NaN in its channel and has the bit 0.
        Differentiable in x: the gradient passes through the sign unchanged (straight-through estimator); norms below 1e-12 count as 1e-12.
        Second derivatives (create_graph=True) run in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "lookup_free_quantize"
    check_tensor(op, "x", x)
    check_float(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    check_bits(op, x.shape[channel])
    check_scale(op, scale)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x)
    positions = Positions(x, channel)
    vectors = positions.vectors
    if chosen == "reference":
        quantized, indices = lookup_free_quantize_reference(vectors, scale, spherical)
    elif need_function(x):
        quantized, indices = apply(_LookupFreeQuantize, vectors, scale, spherical)
    else:
        quantized, indices = torch.ops.genperf.lookup_free_quantize(vectors, scale, spherical)
    return positions.restore(quantized), positions.restore_indices(indices)


def lookup_free_decode(
    indices: Tensor,  # [...]
    bits: int,
    *,
    scale: float = 1.0,
    spherical: bool = False,
    channel_dim: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The codes of the given indices, bitwise equal to `quantized` of `lookup_free_quantize` in the same dtype.

    Equivalent to (channel_dim=-1, not spherical):
        codes = torch.where(indices.unsqueeze(-1) >> torch.arange(D - 1, -1, -1) & 1 == 1, scale, -scale)

    Args:
        indices: any integer dtype; negative indices, which mark masked positions, give zeros.
        bits: D, 1 to 63.
        scale, spherical: as in `lookup_free_quantize`.
        channel_dim: the position of the channel dimension in the result.
        dtype: of the codes; None for torch's default dtype.

    Returns:
        codes [..., D, ...].

    Raises:
        ValueError, TypeError: an invalid argument.
        IndexError: an index past the last code. On CUDA, where reading it would synchronize, a device assertion fails instead.
    """
    op = "lookup_free_decode"
    check_tensor(op, "indices", indices)
    check_bits(op, bits)
    check_scale(op, scale)
    indices = check_indices(op, indices, 1 << bits)
    places = torch.arange(bits - 1, -1, -1, device=indices.device)
    signs = (indices.unsqueeze(-1) // 2**places % 2).to(dtype or torch.get_default_dtype()) * 2 - 1
    codes = signs * code_size(scale, spherical, bits)
    return torch.where(indices.unsqueeze(-1) >= 0, codes, 0).movedim(-1, channel_dim).contiguous()


def check_bits(op: str, bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{op}: the number of channels, the bits of an index, must be 1 to {MAX_BITS}, got {bits}.")


def check_scale(op: str, scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale!r}.")


def code_size(scale: float, spherical: bool, bits: int) -> float:
    """The absolute value of the components of a code."""
    return scale / bits**0.5 if spherical else scale


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("lookup_free_quantize", device, dtype)


class _LookupFreeQuantize(Function):
    @staticmethod
    def forward(x: Tensor, scale: float, spherical: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.genperf.lookup_free_quantize(x, scale, spherical)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        x, ctx.scale, ctx.spherical = inputs
        if ctx.spherical:
            ctx.save_for_backward(x)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, _indices: None) -> tuple[Tensor | None, ...]:
        if grad_quantized is None or not ctx.spherical:
            return grad_quantized, None, None
        (x,) = saved_tensors(ctx)
        if need_graph((grad_quantized,), (x,)):

            def reference(x: Tensor) -> tuple[Tensor]:
                return (lookup_free_quantize_reference(x, ctx.scale, True)[0],)

            (grad_x,) = differentiate(reference, (grad_quantized,), (x,), (True,))
        else:
            grad_x = torch.ops.genperf.lookup_free_quantize_backward(grad_quantized, x, ctx.scale)
        return grad_x, None, None


def lookup_free_quantize_reference(
    x: Tensor,  # [outer, D, inner]
    scale: float,
    spherical: bool,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd, with the memory layout of the compiled op."""
    bits = x.shape[1]
    positive = x > 0
    value = (positive.to(x.dtype) * 2 - 1) * code_size(scale, spherical, bits)
    value = torch.where(x.isnan(), x, value)
    carried = scale * F.normalize(x, dim=1) if spherical else x
    places = torch.arange(bits - 1, -1, -1, device=x.device).reshape(1, -1, 1)
    return ValueOf.apply(value, carried), (positive * 2**places).sum(1)


@register_fake("lookup_free_quantize")
def _(x: Tensor, scale: float, spherical: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]), dtype=torch.int64)


@register_fake("lookup_free_quantize_backward")
def _(grad_quantized: Tensor, x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)
