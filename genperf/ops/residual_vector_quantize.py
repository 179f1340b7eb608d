# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantization: each quantizer quantizes the residual of the previous ones.

Above 400 lines: two ops share the checks, the reference and the residuals, and a quarter is documentation.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._choices import Gradient, Impl, Metric
from .._deprecation import renamed_arguments
from ._autograd import (
    Function,
    ValueOf,
    apply,
    call,
    differentiate,
    need_function,
    need_graph,
    saved_tensors,
)
from ._dispatch import Reasons, choose_impl, implement_on_cuda, native_unavailable, register_fake, remembered
from ._layout import Positions, as_positions, positions_shape
from ._precision import accumulator_dtype
from ._validate import can_branch_on, check_codes, check_index_range, check_mask, check_tensor
from .code_statistics import code_statistics_reference, is_finite
from .code_statistics import unavailable as statistics_unavailable
from .nearest_code import check_metric, search
from .nearest_code import unavailable as search_unavailable
from .vector_quantize import GRADIENTS, rotate


@renamed_arguments("residual_vector_quantize", levels="num_quantizers")
def residual_vector_quantize(
    x: Tensor,  # [..., D, ...]
    codebooks: Tensor,  # [Q, K, D]
    *,
    codebook_weight: float = 1.0,
    commitment_weight: float = 0.25,
    gradient: Gradient = "straight_through",
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    num_quantizers: int | Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each vector with Q quantizers in turn; Zeghidour et al., "SoundStream" (2021), algorithm 1.

    Equivalent to (channel_dim=-1, no mask):
        residual, quantized, indices, losses = x.float(), 0, [], []
        for codebook in codebooks[:num_quantizers]:
            index = nearest_code(residual.detach(), codebook, metric=metric)
            code = codebook[index]
            losses.append(codebook_weight * F.mse_loss(code, residual.detach()) + commitment_weight * F.mse_loss(residual, code.detach()))
            residual, quantized = residual - code.detach(), quantized + code.detach()
            indices.append(index)
        quantized = x + (quantized - x).detach()                            # but bitwise equal to the sum
        return quantized, torch.stack(indices, -1), torch.stack(losses)

    The residual is float32 (float64 for a float64 x), rounded after each subtraction; every index is the exact nearest code of
    that residual. A block of vectors runs through all quantizers while its residual stays in cache: on the CPU forward and
    backward, on CUDA forward, in one launch for codebooks of up to 4096 codes and 128 dimensions. No tensor of size
    positions x K or positions x Q x D is stored, and images [B, D, H, W] (channel_dim=1) are read and written in place.

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        codebooks: Q >= 1 codebooks of K >= 1 codes each, of x's dtype, or float32 with a half-precision x. One codebook shared by
            all quantizers is `codebook.expand(Q, -1, -1)`.
        codebook_weight: weight of the loss term that moves each quantizer's codes to its residuals; 0 for EMA codebooks.
        commitment_weight: weight of the commitment loss, which moves x to codes. Each residual counts as x minus a constant.
        gradient: how the gradient of `quantized` reaches x, once for the sum of the codes: "straight_through" unchanged,
            "rotation" through the rotation and scaling that map x to the sum (see `vector_quantize`).
        metric: of the search, as in `nearest_code`; the losses are squared distances in either case.
        channel_dim: the dimension of x that holds a vector.
        mask: bool, x's shape without channel_dim; where False, quantized and the gradients are 0, the indices are -1, and
            the losses exclude the vector.
        num_quantizers: run only this many quantizers, the first ones: an int in 1 ... Q, or an int64 tensor of one element on x's
            device, which is clamped to that range and never read by the host.
        impl: "native", "triton" (CUDA; the searches alone, the rest in plain PyTorch), "reference", or None to choose automatically.

    Returns:
        quantized, of x's shape and dtype;
        indices, int64, x's shape without channel_dim and with the quantizers as its last dimension, [..., Q]; -1 for quantizers
            that did not run;
        losses [Q], float32 (float64 for a float64 x): a mean over all valid elements, 0 if there are none.
        NaN and infinity propagate into losses and gradients; the index is that of `nearest_code`. Deterministic.
        Differentiable in x and codebooks; the second derivative (create_graph=True) runs in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "residual_vector_quantize"
    channel = _check_codebooks(op, x, codebooks, channel_dim)
    check_metric(op, metric)
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}.")
    check_mask(op, mask, x, channel)
    check_num_quantizers(op, num_quantizers, codebooks.shape[0], x.device)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x, codebooks)
    positions = Positions(x, channel)
    quantized, indices, losses = quantize_residual(
        positions.vectors,
        codebooks,
        positions.view_mask(mask),
        num_quantizers,
        metric,
        ResidualOptions(codebook_weight, commitment_weight, gradient == "rotation"),
        chosen,
    )
    return positions.restore(quantized), positions.restore_indices(indices, codebooks.shape[0]), losses


class ResidualOptions(NamedTuple):
    """Weights and gradient of `quantize_residual`."""

    codebook_weight: float
    commitment_weight: float
    rotation: bool
    per_quantizer: bool = False
    """Each quantizer passes the gradient of `quantized` to x, unchanged or through the rotation of its residual to its code; x
    gets the sum. Otherwise x gets it once, as for one quantizer with the sum of the codes."""


def quantize_residual(
    x: Tensor,  # [outer, D, inner]
    codebooks: Tensor,  # [Q, K, D]
    mask: Tensor | None,  # [outer, inner]
    num_quantizers: int | Tensor | None,
    metric: Metric,
    options: ResidualOptions,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor]:  # [outer, D, inner], [outer, inner, Q], [Q]
    """`residual_vector_quantize` of checked arguments."""
    total = codebooks.shape[0]
    used = num_quantizers if isinstance(num_quantizers, int) else total
    limit = num_quantizers if isinstance(num_quantizers, Tensor) else None
    codes = (codebooks if used == total else codebooks[:used]).to(accumulator_dtype(x.dtype))
    if impl != "native":
        indices = _search_levels(x.detach(), codes.detach(), mask, limit, metric, impl)
        quantized, losses = _quantize_reference(x, codes, indices, *options)
    elif need_function(x, codes):
        quantized, indices, losses, _ = apply(_ResidualVectorQuantize, x, codes, mask, limit, metric, *options)
    else:
        quantized, indices, error, _ = torch.ops.genperf.residual_vector_quantize(x, codes, mask, limit, metric == "cosine")
        losses = error * (options.codebook_weight + options.commitment_weight)
    if used < total:
        indices, losses = F.pad(indices, (0, total - used), value=-1), F.pad(losses, (0, total - used))
    return quantized, indices, losses


def residual_code_statistics(
    x: Tensor,  # [..., D, ...]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [..., Q]
    *,
    channel_dim: int = -1,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:  # [Q, K], [Q, K, D]
    """`code_statistics` of every quantizer: number and sum of the residuals assigned to each code.

    Equivalent to (channel_dim=-1):
        residual = x.float()
        for q, codebook in enumerate(codebooks):
            counts[q], sums[q] = code_statistics(residual, indices[..., q], len(codebook))
            residual = residual - codebook[indices[..., q]]

    Args:
        x, codebooks, channel_dim: as given to `residual_vector_quantize`.
        indices: as returned by it.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        counts and sums, float32 (float64 for a float64 x), deterministic. Not differentiable.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
        IndexError: an index outside -1 ... K - 1 (on CUDA indices are not checked, since that would synchronize).
    """
    op = "residual_code_statistics"
    channel = _check_codebooks(op, x, codebooks, channel_dim)
    check_tensor(op, "indices", indices)
    expected = [*positions_shape(x, channel), codebooks.shape[0]]
    if list(indices.shape) != expected:
        raise ValueError(f"{op}: indices must have shape {expected}, got {list(indices.shape)}.")
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices must be int64, got {indices.dtype}.")
    if indices.device != x.device:
        raise ValueError(f"{op}: indices and x must be on one device, got {indices.device} and {x.device}.")
    check_index_range(op, indices, codebooks.shape[1])
    chosen = choose_impl(op, impl, statistics_unavailable(x.device, x.dtype))
    vectors = as_positions(x, channel)
    return residual_statistics(vectors, codebooks, indices.reshape(vectors.shape[0], vectors.shape[2], codebooks.shape[0]), chosen)


@torch.no_grad()
def residual_statistics(
    x: Tensor,  # [outer, D, inner]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [outer, inner, Q]
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """`residual_code_statistics` of checked arguments."""
    codes, indices = codebooks.detach().to(accumulator_dtype(x.dtype)), indices.contiguous()
    if impl != "native":
        return _statistics_reference(x.detach(), codes, indices)
    return call(torch.ops.genperf.residual_code_statistics, x.detach(), codes, indices, False)


@torch.no_grad()
def finite_residual_statistics(x: Tensor, codebooks: Tensor, indices: Tensor, impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_statistics` without vectors that are not finite; also the indices, with -1 for those vectors."""
    if can_branch_on(x):
        counts, sums = residual_statistics(x, codebooks, indices, impl)
        if math.isfinite(sums.sum().item()):  # faster than a look at each; a sum that overflows only takes the longer way
            return counts, sums, indices
    indices = torch.where(is_finite(x, 1).unsqueeze(-1), indices, -1)
    return (*residual_statistics(x, codebooks, indices, impl), indices)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    native, triton = native_unavailable("residual_vector_quantize", device, dtype), search_unavailable(device, dtype)["triton"]
    if device.type == "cuda":
        native = native or triton
    return {"native": native, "triton": triton, "reference": None}


def _check_codebooks(op: str, x: Tensor, codebooks: Tensor, channel_dim: int) -> int:
    """Check x against the codebooks. Returns the channel dimension as a non-negative number."""
    check_tensor(op, "codebooks", codebooks)
    if codebooks.dim() != 3 or codebooks.shape[0] == 0:
        raise ValueError(f"{op}: codebooks must have shape [Q, K, D] with at least one codebook, got {list(codebooks.shape)}.")
    return check_codes(op, x, codebooks, channel_dim)


def check_num_quantizers(op: str, num_quantizers: int | Tensor | None, total: int, device: torch.device) -> None:
    """`num_quantizers` must lie in 1 ... total; the value of a tensor is not read."""
    if isinstance(num_quantizers, Tensor):
        if num_quantizers.dtype != torch.int64 or num_quantizers.numel() != 1:
            got = f"{num_quantizers.dtype} of {list(num_quantizers.shape)}"
            raise ValueError(f"{op}: a tensor of num_quantizers must be int64 with one element, got {got}.")
        if num_quantizers.device != device:
            raise ValueError(f"{op}: num_quantizers and x must be on one device, got {num_quantizers.device} and {device}.")
    elif num_quantizers is not None and not 1 <= num_quantizers <= total:
        raise ValueError(f"{op}: num_quantizers must lie in 1 ... {total}, the number of codebooks, got {num_quantizers}.")


class _ResidualVectorQuantize(Function):
    @staticmethod
    def forward(
        x: Tensor,
        codebooks: Tensor,
        mask: Tensor | None,
        num_quantizers: Tensor | None,
        metric: Metric,
        codebook_weight: float,
        commitment_weight: float,
        rotation: bool,
        per_quantizer: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, error, valid = torch.ops.genperf.residual_vector_quantize(
            x, codebooks, mask, num_quantizers, metric == "cosine"
        )
        return quantized, indices, error * (codebook_weight + commitment_weight), valid

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        x, codebooks, _, _, _, *ctx.options = inputs
        _, indices, _, valid = outputs
        ctx.save_for_backward(x, codebooks, indices, valid)
        ctx.mark_non_differentiable(indices, valid)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor | None, _indices: None, grad_losses: Tensor | None, _valid: None
    ) -> tuple[Tensor | None, ...]:
        x, codebooks, indices, valid = saved_tensors(ctx)
        codebook_weight, commitment_weight, rotation, per_quantizer = ctx.options
        rest = (None,) * 7
        if need_graph((grad_quantized, grad_losses), (x, codebooks)):

            def reference(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
                return _quantize_reference(x, codebooks, indices, *ctx.options)

            return (*differentiate(reference, (grad_quantized, grad_losses), (x, codebooks), ctx.needs_input_grad[:2]), *rest)
        grad_x = grad_codebooks = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.genperf.residual_vector_quantize_backward(
                grad_quantized, grad_losses, x, codebooks, indices, valid, commitment_weight, rotation, per_quantizer
            )
        if ctx.needs_input_grad[1] and grad_losses is not None:
            grad_codebooks = torch.ops.genperf.residual_vector_quantize_backward_codebooks(
                grad_losses, x, codebooks, indices, valid, codebook_weight
            )
        return grad_x, grad_codebooks, *rest


def _code_of(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes [outer, D, inner] of indices [outer, inner], zeros where an index is -1."""
    code = codebook[indices.clamp(min=0)].transpose(1, 2)
    return torch.where((indices >= 0).unsqueeze(1), code, 0)


def _running(mask: Tensor | None, x: Tensor, q: int, num_quantizers: Tensor | None) -> Tensor | None:
    """The mask of quantizer q's search: False everywhere from number `num_quantizers` on; the first one always runs."""
    if num_quantizers is None or q == 0:
        return mask
    runs = (num_quantizers > q).reshape(1, 1)
    return runs.expand(x.shape[0], x.shape[2]) if mask is None else mask & runs


def _search_levels(x: Tensor, codebooks: Tensor, mask: Tensor | None, limit: Tensor | None, metric: Metric, impl: Impl) -> Tensor:
    """Indices [outer, inner, Q]; a search for each quantizer, the rest in plain PyTorch."""
    residual = x.to(codebooks.dtype)
    found = []
    for q, codebook in enumerate(codebooks):
        found.append(search(residual, codebook, _running(mask, x, q, limit), metric, impl))
        residual = residual - _code_of(codebook, found[-1])
    return torch.stack(found, -1)


def _quantize_reference(
    x: Tensor,  # [outer, D, inner]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [outer, inner, Q]
    codebook_weight: float,
    commitment_weight: float,
    rotation: bool,
    per_quantizer: bool,
) -> tuple[Tensor, Tensor]:
    """Quantized and losses in plain PyTorch, differentiated by autograd."""
    wide = x.to(codebooks.dtype)
    elements = ((indices[..., 0] >= 0).sum() * x.shape[1]).clamp(min=1)
    residual, total, losses = wide, torch.zeros_like(wide), []
    carried = total
    for q, codebook in enumerate(codebooks):
        index = indices[..., q]
        valid = (index >= 0).unsqueeze(1)
        code = _code_of(codebook, index)
        fixed = code.detach()

        def mean_square(difference: Tensor, valid: Tensor = valid) -> Tensor:
            return torch.where(valid, difference, 0).square().sum() / elements

        losses.append(codebook_weight * mean_square(residual.detach() - code) + commitment_weight * mean_square(residual - fixed))
        if per_quantizer:
            carried = carried + torch.where(valid, rotate(residual, fixed) if rotation else residual, 0)
        residual, total = residual - fixed, total + fixed
    if not per_quantizer:
        carried = rotate(wide, total) if rotation else x
    quantized = ValueOf.apply(total.to(x.dtype), carried.to(x.dtype))
    return torch.where((indices[..., 0] >= 0).unsqueeze(1), quantized, 0), torch.stack(losses)


def _statistics_reference(x: Tensor, codebooks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    residual, found = x.to(codebooks.dtype), []
    for q, codebook in enumerate(codebooks):
        index = indices[..., q]
        found.append(code_statistics_reference(residual.transpose(1, 2), index, codebook.shape[0]))
        residual = residual - _code_of(codebook, index)
    counts, sums = zip(*found, strict=True)
    return torch.stack(counts), torch.stack(sums)


@implement_on_cuda("residual_vector_quantize")
def _launch(x: Tensor, codebooks: Tensor, mask: Tensor | None, num_quantizers: Tensor | None, cosine: bool) -> tuple[Tensor, ...]:
    """All quantizers in one launch where that pays, and otherwise in a search and a launch for each."""
    # A checkout has these files in kernels/.
    from genperf.kernels.nearest_code import residual_launch  # pyright: ignore[reportMissingImports]

    if not residual_launch.pays(x, codebooks):
        return torch.ops.genperf.residual_vector_quantize_in_steps(x, codebooks, mask, num_quantizers, cosine)
    with torch.cuda.device_of(x):
        return residual_launch.residual_vector_quantize(x, codebooks, mask, num_quantizers, cosine)


@register_fake("residual_vector_quantize_in_steps")
@register_fake("residual_vector_quantize")
def _(x: Tensor, codebooks: Tensor, mask: Tensor | None, num_quantizers: Tensor | None, cosine: bool) -> tuple[Tensor, ...]:
    total = codebooks.shape[0]
    indices = x.new_empty(x.shape[0], x.shape[2], total, dtype=torch.int64)
    return torch.empty_like(x), indices, x.new_empty(total, dtype=codebooks.dtype), x.new_empty((), dtype=torch.int64)


@register_fake("residual_vector_quantize_backward")
def _(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    valid: Tensor,
    commitment_weight: float,
    rotation: bool,
    per_quantizer: bool,
) -> Tensor:
    return torch.empty_like(x)


@register_fake("residual_code_statistics")
def _(x: Tensor, codebooks: Tensor, indices: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(codebooks.shape[:2], dtype=codebooks.dtype), x.new_empty(codebooks.shape, dtype=codebooks.dtype)


@register_fake("residual_vector_quantize_backward_codebooks")
def _(grad_mse: Tensor, x: Tensor, codebooks: Tensor, indices: Tensor, valid: Tensor, codebook_weight: float) -> Tensor:
    return codebooks.new_empty(codebooks.shape)
