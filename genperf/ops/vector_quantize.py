# SPDX-License-Identifier: Apache-2.0
"""Vector quantization: nearest code, straight-through or rotated gradient, and the loss of vectors and codes."""

from typing import Any, get_args

import torch
from torch import Tensor

from .._choices import Gradient, Impl, Metric
from ._autograd import Function, ValueOf, apply, differentiate, need_function, need_graph, saved_tensors, viewing
from ._dispatch import Reasons, choose_impl, native_unavailable, register_fake, remembered
from ._layout import Positions, as_one_codebook
from ._precision import accumulator_dtype
from ._validate import check_mask, check_vectors
from .code_statistics import check_indices
from .nearest_code import check_metric, search
from .nearest_code import unavailable as search_unavailable

GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


def vector_quantize(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D]
    *,
    codebook_weight: float = 1.0,
    commitment_weight: float = 0.25,
    gradient: Gradient = "straight_through",
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    indices: Tensor | None = None,  # [...]
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace every vector by its nearest code; van den Oord et al., "Neural Discrete Representation Learning" (2017).

    Equivalent to (channel_dim=-1, no mask):
        indices = nearest_code(x, codebook, metric=metric)
        code = codebook[indices]
        loss = codebook_weight * F.mse_loss(code, x.detach()) + commitment_weight * F.mse_loss(x, code.detach())
        quantized = x + (code - x).detach()                                 # but bitwise equal to the code

    No tensor of size positions x K is stored in forward or backward, images [B, D, H, W] (channel_dim=1) are read and written
    in place, and half-precision inputs are not copied to float32. The codebook's gradient is summed in a fixed order.

    gradient="rotation" passes the gradient through the rotation and scaling that map x to its code, which are treated as
    constants (Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", 2024). Where x or the code is zero, or
    they point in opposite directions, it is the straight-through gradient.

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        codebook: K >= 1 codes, of x's dtype, or float32 with a half-precision x.
        codebook_weight: weight of the term that moves codes to vectors; 0 for EMA codebooks.
        commitment_weight: weight of the commitment loss, which moves vectors to codes.
        metric: of the search, as in `nearest_code`; the loss is the squared distance in either case.
        channel_dim: the dimension of x that holds a vector.
        mask: bool, x's shape without channel_dim; where False, quantized and the gradients are 0, the index is -1, and
            the loss excludes the vector.
        indices: int64, x's shape without channel_dim: codes to use instead of the nearest ones; -1 excludes a vector like the mask.
        impl: "native", "triton" (CUDA; the search alone, the rest in plain PyTorch), "reference", or None to choose automatically.

    Returns:
        quantized, of x's shape and dtype (a float32 code is rounded to a half-precision x's dtype);
        indices, int64, x's shape without channel_dim;
        loss, a float32 scalar (float64 for a float64 x): a mean over all valid elements, 0 if there are none.
        NaN and infinity propagate into the loss and the gradients; the index is that of `nearest_code`.
        Differentiable in x and codebook; the second derivative (create_graph=True) runs in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
        IndexError: an index outside -1 ... K - 1 (on CUDA indices are not checked, since that would synchronize).
    """
    op = "vector_quantize"
    channel = check_vectors(op, x, codebook, channel_dim)
    check_metric(op, metric)
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}.")
    check_mask(op, mask, x, channel)
    if indices is not None:
        check_indices(op, indices, x, channel, codebook.shape[0])
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x, codebook)

    positions = Positions(x, channel)
    vectors, mask = positions.vectors, positions.view_mask(mask)
    if indices is None:
        found = search(vectors.detach(), codebook.detach(), mask, metric, chosen)
    else:
        found = indices.reshape(positions.outer, positions.inner).contiguous()
        found = found if mask is None else found.masked_fill(~mask, -1)
    quantized, loss = quantize(vectors, codebook, found, codebook_weight, commitment_weight, gradient, chosen)
    return positions.restore(quantized), positions.restore_indices(found), loss


def quantize(
    x: Tensor,  # [outer, D, inner]
    codebook: Tensor,  # [K, D]
    indices: Tensor,  # [outer, inner]
    codebook_weight: float,
    commitment_weight: float,
    gradient: Gradient,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """Quantized and loss of `vector_quantize` for given indices; arguments already checked."""
    if impl != "native":
        return _quantize_reference(x, codebook, indices, codebook_weight, commitment_weight, gradient)
    if need_function(x, codebook):
        rotation = gradient == "rotation"
        return apply(_VectorQuantize, x, codebook, indices, codebook_weight, commitment_weight, rotation)[:2]
    return torch.ops.genperf.vector_quantize(x, codebook, indices, codebook_weight + commitment_weight)[:2]


def quantize_codebooks(
    x: Tensor,  # [codebooks, outer, D, inner]
    codebook: Tensor,  # [codebooks, K, D]; with `source` possibly [K, D]
    mask: Tensor | None,  # [codebooks, outer, inner]
    indices: Tensor | None,  # [codebooks, outer, inner]
    codebook_weight: float,
    commitment_weight: float,
    gradient: Gradient,
    metric: Metric,
    queries: Tensor | None = None,  # [codebooks, outer, D, inner]
    searched: Tensor | None = None,  # [codebooks, K, D], or [K, D]
    source: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [outer * codebooks, D, inner], [codebooks, outer, inner], []
    """`vector_quantize` of checked arguments with several codebooks and one loss; `indices` replace the search.

    The search is of `queries` in `searched` where these are given: vectors and codes before they were rounded to unit vectors.

    Args:
        source: with one codebook, the tensor [..., D, ...] that x and `queries` are a view of and its channel dimension, for which
            `can_view_within`. It gets the gradient in place of x, and quantized has its shape.
    """
    impl = choose_impl("vector_quantize", None, unavailable(x.device, x.dtype), x if source is None else source[0], codebook)
    if source is not None and impl == "native":
        codes = codebook if codebook.dim() == 2 else codebook.squeeze(0)
        valid, given = (None if t is None else t.squeeze(0) for t in (mask, indices))
        options = codebook_weight, commitment_weight, gradient, metric
        return _quantize_source(x.squeeze(0), codes, valid, given, *options, *source)
    if source is not None:
        x, codebook = Positions(*source).vectors.unsqueeze(0), codebook.view(1, *codebook.shape[-2:])
    if indices is None:
        queries, searched = x if queries is None else queries, codebook if searched is None else searched.view(codebook.shape)
        indices = search(queries.detach(), searched.detach(), mask, metric, impl)
    folded, numbered = as_one_codebook(x, indices, codebook.shape[1])
    quantized, loss = quantize(folded, codebook.flatten(0, 1), numbered, codebook_weight, commitment_weight, gradient, impl)
    return quantized if source is None else Positions(*source).restore(quantized), indices, loss


def _quantize_source(
    vectors: Tensor,  # [outer, D, inner], without a gradient
    codebook: Tensor,  # [K, D]
    mask: Tensor | None,  # [outer, inner]
    indices: Tensor | None,  # [outer, inner]
    codebook_weight: float,
    commitment_weight: float,
    gradient: Gradient,
    metric: Metric,
    x: Tensor,  # [..., D, ...]
    channel: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [..., D, ...], [1, outer, inner], []
    if indices is None:
        indices = search(vectors, codebook.detach(), mask, metric, "native")
    if need_function(x, codebook):
        options = codebook_weight, commitment_weight, gradient == "rotation", vectors.shape, channel
        quantized, loss, _ = apply(_VectorQuantizeViewing, x, codebook, indices, *options)
    else:
        quantized, loss, _ = torch.ops.genperf.vector_quantize(vectors, codebook, indices, codebook_weight + commitment_weight)
        quantized = quantized.view(*x.shape)
    return quantized, indices.unsqueeze(0), loss


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    native, triton = native_unavailable("vector_quantize", device, dtype), search_unavailable(device, dtype)["triton"]
    if device.type == "cuda":
        native = native or triton
    return {"native": native, "triton": triton, "reference": None}


class _VectorQuantize(Function):
    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, indices: Tensor, codebook_weight: float, commitment_weight: float, rotation: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.genperf.vector_quantize(x, codebook, indices, codebook_weight + commitment_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, codebook, indices, ctx.codebook_weight, ctx.commitment_weight, ctx.rotation = inputs
        valid = outputs[2]
        ctx.save_for_backward(x, codebook, indices, valid)
        ctx.mark_non_differentiable(valid)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, grad_loss: Tensor | None, _valid: None) -> tuple[Tensor | None, ...]:
        x, codebook, indices, valid = saved_tensors(ctx)
        if need_graph((grad_quantized, grad_loss), (x, codebook)):

            def reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
                gradient = "rotation" if ctx.rotation else "straight_through"
                return _quantize_reference(x, codebook, indices, ctx.codebook_weight, ctx.commitment_weight, gradient)

            gradients = differentiate(reference, (grad_quantized, grad_loss), (x, codebook), ctx.needs_input_grad[:2])
            return (*gradients, None, None, None, None)
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.genperf.vector_quantize_backward(
                grad_quantized, grad_loss, x, codebook, indices, valid, ctx.commitment_weight, ctx.rotation
            )
        if ctx.needs_input_grad[1] and grad_loss is not None:
            grad_codebook = torch.ops.genperf.vector_quantize_backward_codebook(grad_loss, x, codebook, indices, valid, ctx.codebook_weight)
        return grad_x, grad_codebook, None, None, None, None


_VectorQuantizeViewing = viewing(_VectorQuantize)


def vector_quantize_reference(
    x: Tensor,  # [outer, D, inner]
    codebook: Tensor,  # [K, D]
    codebook_weight: float,
    commitment_weight: float,
    gradient: Gradient,
    metric: Metric,
    mask: Tensor | None,  # [outer, inner]
) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer in plain PyTorch, differentiated by autograd."""
    indices = search(x.detach(), codebook.detach(), mask, metric, "reference")
    quantized, loss = _quantize_reference(x, codebook, indices, codebook_weight, commitment_weight, gradient)
    return quantized, indices, loss


def _quantize_reference(
    x: Tensor, codebook: Tensor, indices: Tensor, codebook_weight: float, commitment_weight: float, gradient: Gradient
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
    valid = (indices >= 0).unsqueeze(1)  # [outer, 1, inner]
    code = codebook[indices.clamp(min=0)].transpose(1, 2)  # [outer, D, inner]

    def mean_square(difference: Tensor) -> Tensor:
        elements = (valid.sum() * x.shape[1]).clamp(min=1)
        return torch.where(valid, difference, 0).square().sum() / elements

    wide, wide_code = x.to(dtype), code.to(dtype)
    loss = codebook_weight * mean_square(wide.detach() - wide_code) + commitment_weight * mean_square(wide - wide_code.detach())
    value = code.detach().to(x.dtype)
    carried = rotate(wide, wide_code.detach()).to(x.dtype) if gradient == "rotation" else x
    quantized = ValueOf.apply(value, carried)
    return torch.where(valid, quantized, 0), loss


def rotate(x: Tensor, code: Tensor) -> Tensor:
    """Apply the constant rotation and scaling that map x to its code along dim 1; x is unchanged where they are undefined."""
    with torch.no_grad():
        x_norm, code_norm = x.norm(dim=1, keepdim=True), code.norm(dim=1, keepdim=True)
        half = x / x_norm + code / code_norm
        half_norm = half.norm(dim=1, keepdim=True)
        usable = (x_norm > 0) & (code_norm > 0) & (half_norm > 1e-3)
        axis = torch.where(usable, half / half_norm, 0)
        x_unit, code_unit = torch.where(usable, x / x_norm, 0), torch.where(usable, code / code_norm, 0)
        ratio = torch.where(usable, code_norm / x_norm, 1)
    rotated = x - 2 * axis * (axis * x).sum(1, keepdim=True) + 2 * code_unit * (x_unit * x).sum(1, keepdim=True)
    return ratio * rotated


@register_fake("vector_quantize")
def _(x: Tensor, codebook: Tensor, indices: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=accumulator_dtype(x.dtype))
    return torch.empty_like(x), loss, x.new_empty((), dtype=torch.int64)


@register_fake("vector_quantize_backward")
def _(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    valid: Tensor,
    commitment_weight: float,
    rotation: bool,
) -> Tensor:
    return torch.empty_like(x)


@register_fake("vector_quantize_backward_codebook")
def _(grad_mse: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, valid: Tensor, codebook_weight: float) -> Tensor:
    return codebook.new_empty(codebook.shape)
