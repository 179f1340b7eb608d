# SPDX-License-Identifier: Apache-2.0
"""tr (cov1 cov2)^(1/2), the nuclear norm of F1' F2, and its gradients, from eigenvalues or from polar iterations."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._messages import warn_caller
from . import _polar
from ._blocks import congruence, gram, is_lower, lower_times, times_lower
from ._device_rates import has_fast_double
from ._precision import full_float32
from ._products import symmetric_product
from ._symmetric_eigenvalues import symmetric_eigenvalues
from .covariance_factor import INDEFINITE, SyncFreeFactor, factor_without_sync, nearest_factor

Gradients = list[Tensor | None]


class Side(NamedTuple):
    """A covariance [d, d], or a factor F [d, r] of one, F F'."""

    tensor: Tensor
    is_factor: bool


def eigen_route(sides: tuple[Side, Side], needed: tuple[bool, bool]) -> tuple[Tensor, Tensor, Gradients]:
    """Trace, error (0) and gradients from the eigenvalues of F' cov F, where F is a factor of one side and cov the other side."""
    largest = [_largest_value(side.tensor) for side in sides]
    error = sides[0].tensor.new_zeros(())
    if 0 in largest or not all(map(math.isfinite, largest)):
        trace = 0.0 if all(map(math.isfinite, largest)) else math.nan
        gradients = [torch.full_like(side.tensor, trace) if need else None for side, need in zip(sides, needed, strict=True)]
        return torch.full_like(error, trace), error, gradients
    # Rescale tiny and huge matrices, so that a product of four of them neither underflows nor overflows.
    limit = torch.finfo(error.dtype).max ** 0.2
    scales = [1.0 if 1 / limit < size < limit else size for size in largest]
    scaled = [side if scale == 1 else Side(side.tensor / scale, side.is_factor) for side, scale in zip(sides, scales, strict=True)]
    narrow = [_narrow(side, 1) for side in scaled]

    base = _choose_base(narrow, needed)
    factor = _factor(narrow[base])
    trace, of_base, of_other = _nuclear_norm(factor, narrow[1 - base], needed[base], needed[1 - base])
    gradients = [of_base, of_other] if base == 0 else [of_other, of_base]
    if needed[base] and not narrow[base].is_factor:
        gradients[base] = _nuclear_norm(_factor(narrow[1 - base]), narrow[base], False, True)[2]

    unit = math.prod(scale if side.is_factor else math.sqrt(scale) for side, scale in zip(sides, scales, strict=True))
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            if scaled[index].is_factor and not narrow[index].is_factor:
                gradient = 2 * gradient @ scaled[index].tensor
            gradients[index] = gradient * (unit / scales[index]) if unit != 1 else gradient
    return trace * unit, error, gradients


def _largest_value(t: Tensor) -> float:
    """The largest absolute value, on the host; NaN if there is one."""
    if t.numel() == 0:
        return 0.0
    low, high = (t.T if t.stride(0) == 1 else t).aminmax()  # many times slower on a transposed matrix
    return max(-low.item(), high.item()) if not low.isnan() else math.nan


def _narrow(side: Side, aspect: int) -> Side:
    """The side; a factor with more than `aspect` times as many columns as rows is replaced by its covariance."""
    if side.is_factor and side.tensor.shape[1] > aspect * side.tensor.shape[0]:
        return Side(gram(side.tensor, mirror=True), False)
    return side


def _choose_base(sides: list[Side], needed: tuple[bool, bool]) -> int:
    """The side to use as the factor: one given as a factor, the narrower of two, or a covariance that needs no gradient."""

    def cost(index: int) -> tuple[bool, int]:
        return not sides[index].is_factor, sides[index].tensor.shape[1] if sides[index].is_factor else needed[index]

    return min((0, 1), key=cost)


def _nuclear_norm(factor: Tensor, other: Side, need_factor: bool, need_other: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The nuclear norm of factor' F2, where F2 is a factor of the other side, and its gradients in `factor` and in the other side."""
    triangular = is_lower(factor)
    cross = product = None
    if other.is_factor:
        cross = times_lower(other.tensor.T, factor).T if triangular else factor.T @ other.tensor  # [r1, r2]
        square = gram(cross, mirror=False)
    elif triangular and not need_factor:
        square = congruence(factor, other.tensor)
    else:
        product = other.tensor @ factor
        square = factor.T @ product
    if not (need_factor or need_other):
        values = symmetric_eigenvalues(square)
        return _roots(values, factor, other).sum(), None, None

    values, vectors = torch.linalg.eigh(square)
    roots = _roots(values, factor, other)
    kept = (roots > 0) & (values > len(values) * torch.finfo(values.dtype).eps * values.amax()) if len(values) else values > 0
    inverse = torch.where(kept, values, 1).rsqrt() * kept
    of_factor = of_other = None
    if cross is not None:
        polar = gram(vectors * inverse.sqrt(), mirror=True) @ cross  # the polar factor of cross
        if need_other:
            of_other = lower_times(factor, polar) if triangular else factor @ polar
        if need_factor:
            of_factor = lower_times(other.tensor, polar.T) if is_lower(other.tensor) else other.tensor @ polar.T
    else:
        if need_other:
            scaled = vectors * (inverse / 2).sqrt()
            of_other = gram(lower_times(factor, scaled) if triangular else factor @ scaled, mirror=True)
        if need_factor and product is not None:
            of_factor = product @ gram(vectors * inverse.sqrt(), mirror=True)
    return roots.sum(), of_factor, of_other


def _roots(values: Tensor, factor: Tensor, other: Side) -> Tensor:
    """Square roots of ascending eigenvalues.

    Rounding may make eigenvalues negative; those that are no larger than twice the most negative one in size count as zero.
    """
    if len(values) == 0:
        return values
    noise = 2 * (-values[0]).clamp(min=0)
    if not other.is_factor:
        rounding = len(factor) * torch.finfo(values.dtype).eps * factor.square().sum() * other.tensor.diagonal().abs().max()
        if values[0] < -rounding:  # the covariance itself is indefinite, from float32 rounding or worse
            noise = torch.minimum(noise, 1e-5 * values[-1].clamp(min=0))
            if values[0] < -INDEFINITE * values[-1].abs():
                _warn_indefinite()
    return torch.where(values > noise, values, 0).sqrt()


def _factor(side: Side) -> Tensor:
    """A factor of the side, or of the positive part of a covariance that is far from positive semi-definite."""
    if side.is_factor:
        return side.tensor
    factor, residual = nearest_factor(side.tensor)
    if residual <= INDEFINITE:
        return factor
    _warn_indefinite()
    values, vectors = torch.linalg.eigh(side.tensor)
    return (vectors * values.clamp(min=0).sqrt())[:, values > 0]


def _warn_indefinite() -> None:
    warn_caller("trace_sqrt_product: a covariance is far from positive semi-definite; only its positive part is used.", UserWarning)


def _scale_of(t: Tensor) -> Tensor:
    """The largest absolute value, at least the smallest normal number, without a host sync."""
    return torch.linalg.vector_norm(t, ord=torch.inf).clamp_min(torch.finfo(t.dtype).tiny)


def polar_route(sides: tuple[Side, Side], needed: tuple[bool, bool], precision: str, with_error: bool) -> tuple[Tensor, Tensor, Gradients]:
    """Trace, error bound and gradients from matrix products, Cholesky factorizations and triangular solves, without a host sync."""
    if any(side.tensor.numel() == 0 for side in sides):
        zero = sides[0].tensor.new_zeros(())
        return zero, zero.clone(), [torch.zeros_like(side.tensor) if need else None for side, need in zip(sides, needed, strict=True)]
    scales = [_scale_of(side.tensor) for side in sides]
    scaled = [Side(side.tensor / scale, side.is_factor) for side, scale in zip(sides, scales, strict=True)]
    narrow = [_narrow(side, 2) for side in scaled]  # below an aspect of 2 Cholesky costs more than it saves
    mixed = precision == "mixed"
    factored = _factor_both(narrow, needed, exact=not mixed)
    factors = [side.tensor if found is None else found.factor for side, found in zip(narrow, factored, strict=True)]
    if mixed and not has_fast_double(factors[0].device):
        with full_float32():
            cross = (factors[0].float().T @ factors[1].float()).to(factors[0].dtype)
    else:
        cross = factors[0].T @ factors[1]  # [r1, r2]
    u = _polar.polar(cross, precision=precision, accurate=any(needed)).to(cross.dtype)
    trace = (u * cross).sum()
    error = torch.zeros_like(trace)
    if with_error:
        # With s the singular values of cross and t <= 1 those of U: sum s (1 - t) <= sum s (1 - t^2) <= r^(1/2) |cross - U U' cross|.
        projected = u @ (u.T @ cross) if u.shape[0] > u.shape[1] else (u @ u.T) @ cross
        error = min(u.shape) ** 0.5 * torch.linalg.matrix_norm(cross - projected)

    unit = math.prod(scale if side.is_factor else scale.sqrt() for side, scale in zip(sides, scales, strict=True))
    gradients: Gradients = [None, None]
    for index in (0, 1):
        if needed[index]:
            gradient = factors[1 - index] @ (u.T if index == 0 else u)
            found = factored[index]
            if found is not None:
                gradient = _of_covariance(gradient / 2, narrow[index].tensor, found)
            if scaled[index].is_factor and not narrow[index].is_factor:
                gradient = 2 * gradient @ scaled[index].tensor
            gradients[index] = gradient * (unit / scales[index])
    return trace * unit, error * unit, gradients


def _factor_both(sides: list[Side], needed: tuple[bool, bool], exact: bool) -> list[SyncFreeFactor | None]:
    """Factors of the sides that are covariances, in one batch. Without `exact`, a covariance that needs no gradient may be shifted."""
    places = [index for index, side in enumerate(sides) if not side.is_factor]
    factored: list[SyncFreeFactor | None] = [None, None]
    if places:
        gradient = any(needed[index] for index in places)
        covs = torch.stack([sides[index].tensor for index in places])
        found = factor_without_sync(covs, regular=exact or gradient, shifted=gradient)
        for row, index in enumerate(places):
            factored[index] = SyncFreeFactor(*(t.select(0, row) if t.numel() else t for t in found))
    return factored


def _of_covariance(of_factor: Tensor, cov: Tensor, found: SyncFreeFactor) -> Tensor:
    """The gradient in the covariance: the symmetric G with G factor = of_factor.

    If the covariance is singular, the block of G on its null space is zero.
    """
    inverse = torch.linalg.solve_triangular(found.factor, of_factor, upper=False, left=False)
    both = torch.cat([cov, found.factor @ of_factor.T], 1)
    projector, on_range = torch.cholesky_solve(both, found.shifted).chunk(2, 1)  # onto the range; factor of_factor' = cov G
    on_range = on_range.T @ projector  # G projector
    twice = symmetric_product(projector.T, on_range.T)
    completed = on_range + on_range.T - twice
    return torch.where(found.regular, (inverse + inverse.T) / 2, completed)
