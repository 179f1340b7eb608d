"""Residual vector quantization: every level quantizes what the levels before it leave."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import ValueOf, apply, differentiate
from ._dispatch import choose_impl, implement_on_cuda, native_unavailable, register_fake
from ._layout import as_positions, from_positions, positions_shape
from ._precision import accumulator_dtype
from ._validate import check_positions, check_tensor, check_vectors
from .code_statistics import code_statistics_reference
from .nearest_code import check_metric, search
from .nearest_code import unavailable as search_unavailable
from .vector_quantize import GRADIENTS, rotate


def residual_vector_quantize(
    x: Tensor,  # [..., D, ...]
    codebooks: Tensor,  # [Q, K, D]
    *,
    codebook_weight: float = 1.0,
    commitment_weight: float = 0.25,
    gradient: str = "straight_through",
    metric: str = "euclidean",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    levels: int | Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write every vector as a sum of codes, one of each level; Zeghidour et al., "SoundStream" (2021), algorithm 1.

    Equivalent to (channel_dim=-1, no mask):
        residual, quantized, indices, losses = x.float(), 0, [], []
        for codebook in codebooks[:levels]:
            index = nearest_code(residual.detach(), codebook, metric=metric)
            code = codebook[index]
            losses.append(codebook_weight * F.mse_loss(code, residual.detach()) + commitment_weight * F.mse_loss(residual, code.detach()))
            residual, quantized = residual - code.detach(), quantized + code.detach()
            indices.append(index)
        quantized = x + (quantized - x).detach()                            # but equal to the sum bit for bit
        return quantized, torch.stack(indices, -1), torch.stack(losses)

    The residual is float32 (float64 for a float64 x) and is rounded after the subtraction of every level, the first
    level's code first; every index is the exact nearest code of that residual. On the CPU a block of vectors goes through
    all levels while its residual stays in cache, forward and backward; nothing of size positions x K or positions x Q x D
    exists, and images [B, D, H, W] (channel_dim=1) are read and written where they lie.

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        codebooks: Q >= 1 codebooks of K >= 1 codes each, of x's dtype, or float32 with a half-precision x. A codebook that
            all levels share is `codebook.expand(Q, -1, -1)`.
        codebook_weight: weight of the term that moves codes to residuals, in every level the level's own codes only; 0 for
            codebooks that learn by moving averages.
        commitment_weight: weight of the term that moves x to codes. The residual of every level counts as x less a constant.
        gradient: how the gradient of `quantized` reaches x, once for the sum of the codes: "straight_through" unchanged,
            "rotation" through the rotation and scaling that carry x to the sum (see `vector_quantize`).
        metric: of the search, as in `nearest_code`; the losses are of squared distances in either case.
        channel_dim: the dimension of x that holds a vector.
        mask: bool, x's shape without channel_dim; where False, quantized and the gradients are 0, the indices are -1, and
            the losses leave the vector out.
        levels: run only the first so many levels, 1 ... Q; an int, or an int64 tensor of one element on x's device, which the
            host does not wait for, and which is taken as 1 or Q where it lies beyond them.
        impl: None picks; "native" and "reference" insist.

    Returns:
        quantized, of x's shape and dtype;
        indices, int64, x's shape without channel_dim and with the levels as its last dimension, [..., Q]; -1 in levels that
            were not run;
        losses [Q], float32 (float64 for a float64 x): in each level a mean over all valid elements, 0 where there is none.
        NaN and infinity propagate into losses and gradients; the index then follows `nearest_code`. Deterministic.
        Differentiable in x and codebooks; the second derivative (create_graph=True) runs in plain PyTorch.

    Raises:
        ValueError, TypeError, NotImplementedError: as `vector_quantize`, and for codebooks that are not [Q, K, D] or levels
            outside 1 ... Q.
    """
    return quantize_residual(
        x,
        codebooks,
        codebook_weight=codebook_weight,
        commitment_weight=commitment_weight,
        gradient=gradient,
        metric=metric,
        channel_dim=channel_dim,
        mask=mask,
        levels=levels,
        impl=impl,
    )


def quantize_residual(
    x: Tensor,
    codebooks: Tensor,
    *,
    codebook_weight: float = 1.0,
    commitment_weight: float = 0.25,
    gradient: str = "straight_through",
    metric: str = "euclidean",
    channel_dim: int = -1,
    mask: Tensor | None = None,
    levels: int | Tensor | None = None,
    per_level: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_vector_quantize`; with `per_level`, every level is a quantizer of its own, whose input is x less a constant.

    The gradient of x is then the sum over the levels of the gradient of `quantized`, unchanged or through the rotation that
    carries the level's residual to the level's code.
    """
    op = "residual_vector_quantize"
    channel = _check_codebooks(op, x, codebooks, channel_dim)
    check_metric(op, metric)
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}.")
    if mask is not None:
        check_tensor(op, "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}.")
        check_positions(op, "mask", mask, x, channel)
    number = codebooks.shape[0]
    used = _check_levels(op, levels, number, x)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x, codebooks)

    positions = as_positions(x, channel)
    if mask is not None:
        mask = mask.reshape(positions.shape[0], positions.shape[2])
    codes = codebooks[:used].to(accumulator_dtype(x.dtype))
    limit = levels if isinstance(levels, Tensor) else None
    options = codebook_weight, commitment_weight, gradient == "rotation", per_level
    if chosen == "reference":
        indices = _search_reference(positions.detach(), codes.detach(), mask, limit, metric)
        quantized, losses = _quantize_reference(positions, codes, indices, *options)
    elif torch.is_grad_enabled() and (x.requires_grad or codes.requires_grad):
        quantized, indices, losses, _ = apply(_ResidualVectorQuantize, positions, codes, mask, limit, metric, *options)
    else:
        quantized, indices, error, _ = torch.ops.genperf.residual_vector_quantize(positions, codes, mask, limit, metric == "cosine")
        losses = error * (codebook_weight + commitment_weight)
    if used < number:
        indices, losses = F.pad(indices, (0, number - used), value=-1), F.pad(losses, (0, number - used))
    return from_positions(quantized, x, channel), indices.reshape(*positions_shape(x, channel), number), losses


def residual_code_statistics(
    x: Tensor,  # [..., D, ...]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [..., Q]
    *,
    channel_dim: int = -1,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # [Q, K], [Q, K, D]
    """How many residuals each code of each level was given, and their sum: `code_statistics` of every level.

    Equivalent to (channel_dim=-1):
        residual = x.float()
        for level, codebook in enumerate(codebooks):
            counts[level], sums[level] = code_statistics(residual, indices[..., level], len(codebook))
            residual = residual - codebook[indices[..., level]]

    Args:
        x, codebooks, channel_dim: as given to `residual_vector_quantize`.
        indices: as returned by it.
        impl: None picks; "native" and "reference" insist.

    Returns:
        counts and sums, float32 (float64 for a float64 x), deterministic. Not differentiable.

    Raises:
        ValueError, TypeError: shapes and dtypes that do not fit.
    """
    op = "residual_code_statistics"
    channel = _check_codebooks(op, x, codebooks, channel_dim)
    check_tensor(op, "indices", indices)
    expected = [*positions_shape(x, channel), codebooks.shape[0]]
    if list(indices.shape) != expected:
        raise ValueError(f"{op}: indices must have shape {expected}, got {list(indices.shape)}.")
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices must be int64, got {indices.dtype}.")
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    positions = as_positions(x.detach(), channel)
    indices = indices.reshape(positions.shape[0], positions.shape[2], codebooks.shape[0]).contiguous()
    codes = codebooks.detach().to(accumulator_dtype(x.dtype))
    if chosen == "reference":
        return _statistics_reference(positions, codes, indices)
    return torch.ops.genperf.residual_code_statistics(positions, codes, indices, False)


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Implementations of the quantizer, best first, and why each cannot run on this device and dtype."""
    native = native_unavailable("residual_vector_quantize", device, dtype)
    if native is None and device.type == "cuda":
        native = search_unavailable(device, dtype)["triton"]
    return {"native": native, "reference": None}


def _check_codebooks(op: str, x: Tensor, codebooks: Tensor, channel_dim: int) -> int:
    """Check x against the codebooks; the channel dimension as a non-negative number."""
    check_tensor(op, "codebooks", codebooks)
    if codebooks.dim() != 3 or codebooks.shape[0] == 0:
        raise ValueError(f"{op}: codebooks must have shape [Q, K, D] with at least one level, got {list(codebooks.shape)}.")
    return check_vectors(op, x, codebooks.select(0, 0), channel_dim)


def _check_levels(op: str, levels: int | Tensor | None, number: int, x: Tensor) -> int:
    """How many levels are at hand at most."""
    if isinstance(levels, Tensor):
        if levels.dtype != torch.int64 or levels.numel() != 1:
            raise ValueError(f"{op}: a tensor of levels must be int64 with one element, got {levels.dtype} of {list(levels.shape)}.")
        if levels.device != x.device:
            raise ValueError(f"{op}: levels and x must be on one device, got {levels.device} and {x.device}.")
        return number
    if levels is None:
        return number
    if not 1 <= levels <= number:
        raise ValueError(f"{op}: levels must lie in 1 ... {number}, the number of codebooks, got {levels}.")
    return levels


class _ResidualVectorQuantize(torch.autograd.Function):
    @staticmethod
    def forward(x, codebooks, mask, levels, metric, codebook_weight, commitment_weight, rotation, per_level):
        quantized, indices, error, valid = torch.ops.genperf.residual_vector_quantize(x, codebooks, mask, levels, metric == "cosine")
        return quantized, indices, error * (codebook_weight + commitment_weight), valid

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, codebooks, _, _, _, *ctx.options = inputs
        _, indices, _, valid = outputs
        ctx.save_for_backward(x, codebooks, indices, valid)
        ctx.mark_non_differentiable(indices, valid)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_quantized, _indices, grad_losses, _valid):
        x, codebooks, indices, valid = ctx.saved_tensors
        codebook_weight, commitment_weight, rotation, per_level = ctx.options
        rest = (None,) * 7
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again
            outputs = _quantize_reference(x, codebooks, indices, *ctx.options)
            return (*differentiate(outputs, (grad_quantized, grad_losses), (x, codebooks), ctx.needs_input_grad[:2]), *rest)
        grad_x = grad_codebooks = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.genperf.residual_vector_quantize_backward(
                grad_quantized, grad_losses, x, codebooks, indices, valid, commitment_weight, rotation, per_level
            )
        if ctx.needs_input_grad[1] and grad_losses is not None:
            _, left = torch.ops.genperf.residual_code_statistics(x, codebooks, indices, True)
            scale = grad_losses * (-2 * codebook_weight) / (valid * x.shape[1]).clamp(min=1)
            grad_codebooks = left * scale.view(-1, 1, 1)
        return grad_x, grad_codebooks, *rest


def _limited(mask: Tensor | None, x: Tensor, level: int, limit: Tensor | None) -> Tensor | None:
    """The mask of a level's search: no position from level number `limit` on; the first level is always run."""
    if limit is None or level == 0:
        return mask
    run = (limit > level).reshape(1, 1)
    return run.expand(x.shape[0], x.shape[2]) if mask is None else mask & run


def _code_of(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes [outer, D, inner] of indices [outer, inner], zeros where an index is -1."""
    code = codebook[indices.clamp(min=0)].transpose(1, 2)
    return torch.where((indices >= 0).unsqueeze(1), code, 0)


def _search_reference(x: Tensor, codebooks: Tensor, mask: Tensor | None, limit: Tensor | None, metric: str) -> Tensor:
    residual = x.to(codebooks.dtype)
    found = []
    for level, codebook in enumerate(codebooks):
        found.append(search(residual, codebook, _limited(mask, x, level, limit), metric, "reference"))
        residual = residual - _code_of(codebook, found[-1])
    return torch.stack(found, -1)


def _quantize_reference(
    x: Tensor,  # [outer, D, inner]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [outer, inner, Q]
    codebook_weight: float,
    commitment_weight: float,
    rotation: bool,
    per_level: bool,
) -> tuple[Tensor, Tensor]:
    """Quantized and losses in plain PyTorch, differentiated by autograd."""
    wide = x.to(codebooks.dtype)
    elements = ((indices[..., 0] >= 0).sum() * x.shape[1]).clamp(min=1)
    residual, total, carried, losses = wide, torch.zeros_like(wide), 0, []
    for level, codebook in enumerate(codebooks):
        index = indices[..., level]
        valid = (index >= 0).unsqueeze(1)
        code = _code_of(codebook, index)
        fixed = code.detach()

        def mean_square(difference: Tensor, valid: Tensor = valid) -> Tensor:
            return torch.where(valid, difference, 0).square().sum() / elements

        losses.append(codebook_weight * mean_square(residual.detach() - code) + commitment_weight * mean_square(residual - fixed))
        if per_level:
            carried = carried + torch.where(valid, rotate(residual, fixed) if rotation else residual, 0)
        residual, total = residual - fixed, total + fixed
    if not per_level:
        carried = rotate(wide, total) if rotation else x
    quantized = ValueOf.apply(total.to(x.dtype), carried.to(x.dtype))
    return torch.where((indices[..., 0] >= 0).unsqueeze(1), quantized, 0), torch.stack(losses)


def _statistics_reference(x: Tensor, codebooks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    residual, found = x.to(codebooks.dtype), []
    for level, codebook in enumerate(codebooks):
        index = indices[..., level]
        found.append(code_statistics_reference(residual.transpose(1, 2), index, codebook.shape[0]))
        residual = residual - _code_of(codebook, index)
    counts, sums = zip(*found, strict=True)
    return torch.stack(counts), torch.stack(sums)


@register_fake("residual_vector_quantize")
def _(x: Tensor, codebooks: Tensor, mask: Tensor | None, levels: Tensor | None, cosine: bool) -> tuple[Tensor, ...]:
    number = codebooks.shape[0]
    indices = x.new_empty(x.shape[0], x.shape[2], number, dtype=torch.int64)
    return torch.empty_like(x), indices, x.new_empty(number, dtype=codebooks.dtype), x.new_empty((), dtype=torch.int64)


@register_fake("residual_vector_quantize_backward")
def _(grad_quantized, grad_mse, x, codebooks, indices, valid, commitment_weight, rotation, per_level) -> Tensor:
    return torch.empty_like(x)


@register_fake("residual_code_statistics")
def _(x: Tensor, codebooks: Tensor, indices: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(codebooks.shape[:2], dtype=codebooks.dtype), x.new_empty(codebooks.shape, dtype=codebooks.dtype)


# On CUDA the levels are composed of the ops of one level. A residual in float32 stays in the L2 cache of such a device up to
# sizes at which a search fills it, and the search of a level takes many times as long as reading the residual does.


def compose_forward(x: Tensor, codebooks: Tensor, mask: Tensor | None, levels: Tensor | None, cosine: bool) -> tuple[Tensor, ...]:
    ops = torch.ops.genperf
    residual, total, found, errors, valid = x.to(codebooks.dtype), None, [], [], None
    for level, codebook in enumerate(codebooks):
        index = ops.nearest_code(residual, codebook, _limited(mask, x, level, levels), cosine)
        code, error, number = ops.vector_quantize(residual, codebook, index)  # zeros where the index is -1
        residual, total = residual - code, code if total is None else total + code
        valid = number if valid is None else valid
        found.append(index)
        errors.append(error)
    quantized = torch.empty_like(x).copy_(total)
    return quantized, torch.stack(found, -1), torch.stack(errors), valid


def compose_backward(grad_quantized, grad_mse, x, codebooks, indices, valid, commitment_weight, rotation, per_level) -> Tensor:
    ops = torch.ops.genperf
    dtype = codebooks.dtype
    residual = x.to(dtype)
    upstream = None if grad_quantized is None else grad_quantized.to(dtype)
    total, gradient = torch.zeros_like(residual), torch.zeros_like(residual)
    for level, codebook in enumerate(codebooks):
        index = indices[..., level].contiguous()
        slope = None if grad_mse is None else grad_mse[level]
        passed = upstream if per_level else None
        if passed is not None or slope is not None:
            gradient += ops.vector_quantize_backward(passed, slope, residual, codebook, index, valid, commitment_weight, rotation)
        code, _, _ = ops.vector_quantize(residual, codebook, index)
        residual, total = residual - code, total + code
    if upstream is not None and not per_level:  # one level, whose codes are the sums
        sums = total.transpose(1, 2).reshape(-1, x.shape[1])
        own = torch.arange(sums.shape[0], device=x.device).view(x.shape[0], x.shape[2])
        own = torch.where(indices[..., 0] >= 0, own, -1)
        if sums.shape[0] > 0:
            gradient += ops.vector_quantize_backward(upstream, None, x.to(dtype), sums, own, valid, 0.0, rotation)
    return torch.empty_like(x).copy_(gradient)


def compose_statistics(x: Tensor, codebooks: Tensor, indices: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    ops = torch.ops.genperf
    residual, found = x.to(codebooks.dtype), []
    for level, codebook in enumerate(codebooks):
        index = indices[..., level].contiguous()
        found.append(ops.code_statistics(residual, index, codebook.shape[0], None, codebook if left else None))
        residual = residual - ops.vector_quantize(residual, codebook, index)[0]
    counts, sums = zip(*found, strict=True)
    return torch.stack(counts), torch.stack(sums)


implement_on_cuda("residual_vector_quantize")(compose_forward)
implement_on_cuda("residual_vector_quantize_backward")(compose_backward)
implement_on_cuda("residual_code_statistics")(compose_statistics)
