"""Lookup-free quantization: every channel is one bit of the code, its sign."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import ValueOf, apply, differentiate
from ._dispatch import choose_impl, register_fake, streaming_unavailable
from ._layout import as_positions, from_positions, positions_shape
from ._validate import check_channel_dim, check_float, check_tensor
from .finite_scalar_quantize import check_indices

MAX_BITS = 63


def lookup_free_quantize(
    x: Tensor,  # [..., D, ...]
    *,
    scale: float = 1.0,
    spherical: bool = False,
    channel_dim: int = -1,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize every channel by its sign: LFQ, Yu et al. (arXiv 2310.05737); BSQ, Zhao et al. (arXiv 2406.07548).

    Equivalent to (channel_dim=-1):
        sign = torch.where(x > 0, scale, -scale)
        quantized = x + (sign - x).detach()                                 # but equal to the sign bit for bit
        indices = ((x > 0) << torch.arange(D - 1, -1, -1)).sum(-1)
    and with spherical=True, where codes and vectors are of length `scale`:
        x = scale * F.normalize(x, dim=-1)
        sign = torch.where(x > 0, scale, -scale) / D**0.5

    One kernel forward, none backward (one with `spherical`); both layouts are read and written where they lie, and there
    is no table of codes. The losses that go with it: `lookup_free_entropy`.

    Args:
        x: float32, bfloat16, float16 or float64, 1 to 63 channels; any strides.
        scale: positive; the size of a code's components, with `spherical` the length of a code.
        channel_dim: the dimension of x that holds the D channels.
        impl: None picks; "native" and "reference" insist.

    Returns:
        quantized, of x's shape and dtype; indices, int64, x's shape without channel_dim, the first channel the most
        significant bit. Zero counts as negative; NaN is NaN in its channel and a bit of 0.
        Differentiable in x: the gradient passes the sign unchanged, and the normalization as it is (an x shorter than
        1e-12 counts as that long). The second derivative (create_graph=True) runs in plain PyTorch.

    Raises:
        ValueError, TypeError: a bad argument, as a sentence.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "lookup_free_quantize"
    check_tensor(op, "x", x)
    check_float(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    check_bits(op, x.shape[channel])
    check_scale(op, scale)
    positions = as_positions(x, channel)
    if choose_impl(op, impl, unavailable(x.device, x.dtype), x) == "reference":
        quantized, indices = lookup_free_quantize_reference(positions, scale, spherical)
    elif torch.is_grad_enabled() and x.requires_grad:
        quantized, indices = apply(_LookupFreeQuantize, positions, scale, spherical)
    else:
        quantized, indices = torch.ops.genperf.lookup_free_quantize(positions, scale, spherical)
    return from_positions(quantized, x, channel), indices.reshape(positions_shape(x, channel))


def lookup_free_decode(
    indices: Tensor,  # [...]
    bits: int,
    *,
    scale: float = 1.0,
    spherical: bool = False,
    channel_dim: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The codes of indices of `lookup_free_quantize`, bit for bit what it returned as `quantized` in this dtype.

    Equivalent to (channel_dim=-1, not spherical):
        codes = torch.where(indices.unsqueeze(-1) >> torch.arange(D - 1, -1, -1) & 1 == 1, scale, -scale)

    Args:
        indices: an integer dtype; a negative index, of a masked position, gives zeros.
        bits: D, 1 to 63.
        scale, spherical: as there.
        channel_dim: where the channels go in the result.
        dtype: of the codes; None for torch's default.

    Returns:
        [..., D, ...].

    Raises:
        ValueError, TypeError: a bad argument, as a sentence.
    """
    op = "lookup_free_decode"
    check_tensor(op, "indices", indices)
    check_indices(op, indices)
    check_bits(op, bits)
    check_scale(op, scale)
    places = torch.arange(bits - 1, -1, -1, device=indices.device)
    signs = (indices.long().unsqueeze(-1) >> places & 1).to(dtype or torch.get_default_dtype()) * 2 - 1
    codes = signs * code_size(scale, spherical, bits)
    return torch.where(indices.unsqueeze(-1) >= 0, codes, 0).movedim(-1, channel_dim).contiguous()


def check_bits(op: str, bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{op}: the number of channels, which are the bits of an index, must be 1 to {MAX_BITS}, got {bits}.")


def check_scale(op: str, scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale!r}.")


def code_size(scale: float, spherical: bool, bits: int) -> float:
    """The size of the components of a code."""
    return scale / bits**0.5 if spherical else scale


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Which implementations cannot run, and why; best first."""
    return streaming_unavailable("lookup_free_quantize", device, dtype)


class _LookupFreeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(x, scale, spherical):
        return torch.ops.genperf.lookup_free_quantize(x, scale, spherical)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, ctx.scale, ctx.spherical = inputs
        if ctx.spherical:
            ctx.save_for_backward(x)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_quantized, _indices):
        if grad_quantized is None or not ctx.spherical:
            return grad_quantized, None, None
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again
            quantized, _ = lookup_free_quantize_reference(x, ctx.scale, True)
            (grad_x,) = differentiate((quantized,), (grad_quantized,), (x,), (True,))
        else:
            grad_x = torch.ops.genperf.lookup_free_quantize_backward(grad_quantized, x, ctx.scale)
        return grad_x, None, None


def lookup_free_quantize_reference(x: Tensor, scale: float, spherical: bool) -> tuple[Tensor, Tensor]:  # x [outer, D, inner]
    """The quantizer in plain PyTorch, differentiated by autograd; results laid out as the compiled op does."""
    bits = x.shape[1]
    positive = x > 0
    value = (positive.to(x.dtype) * 2 - 1) * code_size(scale, spherical, bits)
    value = torch.where(x.isnan(), x, value)
    carried = scale * F.normalize(x, dim=1) if spherical else x
    places = torch.arange(bits - 1, -1, -1, device=x.device).reshape(1, -1, 1)
    return ValueOf.apply(value, carried), (positive.long() << places).sum(1)


@register_fake("lookup_free_quantize")
def _(x: Tensor, scale: float, spherical: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]), dtype=torch.int64)


@register_fake("lookup_free_quantize_backward")
def _(grad_quantized: Tensor, x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)
