# SPDX-License-Identifier: Apache-2.0
"""A factor of a covariance matrix."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import is_batched
from ._blocks import BLOCK
from ._validate import check_float, check_tensor

# A covariance counts as indefinite if its residual exceeds this part of its variances. float32 rounding stays below it.
INDEFINITE = 1e-2
# Times d^(1/2), a bound of the eigenvalue that float32 rounding makes of zero, as a part of the variances.
FLOAT32_SHIFT = 8 * torch.finfo(torch.float32).eps


def covariance_factor(cov: Tensor) -> Tensor:
    """Factor a covariance matrix: F [d, r] with cov = F F', where r is the numerical rank.

    Equivalent to (cov well conditioned):
        factor = torch.linalg.cholesky(cov.double())

    Other matrices take a pivoted Cholesky factorization that stops at rounding (Higham, "Analysis of the Cholesky decomposition of a
    semi-definite matrix", 1990). The rank is decided on the correlation matrix, so features may differ in scale. `trace_sqrt_product` and
    `frechet_distance` accept the factor in place of the covariance; compute it once for a covariance that is used often.

    Args:
        cov: [d, d], symmetric positive semi-definite, float32, float64, bfloat16 or float16. The upper triangle may be ignored.

    Returns:
        [d, r] in float64 (float32 on devices without float64), not differentiable. Lower triangular if r = d and cov is well conditioned;
        r = 0 for a zero matrix. For a matrix that rounding made indefinite, the factor of a positive semi-definite matrix close to it.

    Raises:
        ValueError: cov is not square, holds NaN or infinity, or is far from positive semi-definite.
        TypeError: cov is not a floating-point tensor.
        NotImplementedError: a call within torch.vmap.
    """
    op = "covariance_factor"
    check_covariance(op, "cov", cov)
    if is_batched(cov):
        raise NotImplementedError(f"{op}: the number of columns depends on the values of cov, so torch.vmap cannot run it.")
    with torch.no_grad():
        matrix = cov.to(working_dtype(cov.device))
        if not matrix.isfinite().all():
            raise ValueError(f"{op}: cov must be finite, got NaN or infinity.")
        factor, residual = nearest_factor(matrix)
        if residual > INDEFINITE:
            raise ValueError(
                f"{op}: cov must be positive semi-definite, got a matrix that is {residual:.2g} of its variances away from the nearest one."
            )
        return factor


def nearest_factor(cov: Tensor) -> tuple[Tensor, float]:
    """F with F F' = cov up to rounding, and the residual: the largest entry of cov - F F' relative to the variances."""
    scale = cov.diagonal().clamp_min(0).sqrt()
    factor, info = torch.linalg.cholesky_ex(cov)
    if info == 0 and (factor.diagonal() > scale * (len(cov) * torch.finfo(cov.dtype).eps) ** 0.5).all():
        return factor, 0.0
    constant = scale == 0
    lower = cov.tril()
    stray = torch.where(constant[:, None] | constant, lower, 0).abs().max().item()  # covariance with a feature of variance 0
    inverse = torch.where(constant, 0, 1 / scale)
    correlation = inverse[:, None] * lower * inverse
    factor, residual = _pivoted_cholesky(correlation + correlation.tril(-1).T)
    largest = scale.square().max().item()
    return scale[:, None] * factor, max(residual, stray / largest if largest else math.inf if stray else 0.0)


def check_covariance(op: str, name: str, value: Tensor, batched: bool = False) -> None:
    check_tensor(op, name, value)
    check_float(op, name, value)
    if value.dim() < 2 or (value.dim() > 2 and not batched) or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{op}: {name} must be square, {'[..., d, d]' if batched else '[d, d]'}, got shape {list(value.shape)}.")


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype that matrix functions compute in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class SyncFreeFactor(NamedTuple):
    factor: Tensor  # F [..., d, d] with cov = F F'
    regular: Tensor  # [..., 1, 1], whether F is the Cholesky factor of a regular cov
    shifted: Tensor  # [..., d, d], Cholesky factor of cov plus a multiple of the identity, for projections onto the range of cov


def factor_without_sync(cov: Tensor, *, regular: bool = True, shifted: bool = False) -> SyncFreeFactor:
    """Factor cov [..., d, d] without a host sync: a batch of Cholesky factorizations with different shifts, then one triangular solve.

    For a singular cov, F = cov L'^-1 with L L' = cov + shift diagonal(cov). In its null space F holds rounding errors divided by the root
    of the shift, so the smallest shift that works is used; the larger ones are needed for matrices rounded to bfloat16 or float32. For a
    cov further from positive semi-definite F F' is its diagonal, since cov may be a zero covariance after rounding.

    Args:
        regular: whether a regular cov gets its Cholesky factor. If not, a regular cov, too, is shifted by 1e-12.
        shifted: whether the result of this name is computed; it is empty otherwise.
    """
    diagonal = cov.diagonal(dim1=-2, dim2=-1)
    size = cov.shape[-1]
    epsilon = size * torch.finfo(cov.dtype).eps
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt().unsqueeze(-1)
    correlation = cov / scale / scale.mT
    ones = correlation.diagonal(dim1=-2, dim2=-1)  # zeros for constant features
    largest = diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(cov.dtype).eps)
    shifts = [max(1e-12, 2 * epsilon), FLOAT32_SHIFT * size**0.5, 1e-2]
    # Larger than for the factor, since the rounding error of null vectors is divided by the shift.
    range_shifts = [1e-10, FLOAT32_SHIFT * size**0.5] if shifted else []
    inputs = [(correlation, 1, shift) for shift in ([*shifts, 0.0] if regular else shifts)]
    inputs += [(cov, largest, shift) for shift in range_shifts]
    matrices = cov.new_empty(len(inputs), *cov.shape)
    for matrix, (source, unit, shift) in zip(matrices, inputs, strict=True):
        matrix.copy_(source).diagonal(dim1=-2, dim2=-1).add_(unit, alpha=shift)
    lowers, info = torch.linalg.cholesky_ex(matrices)
    worked = (info == 0).unbind()
    pivots = lowers.diagonal(dim1=-2, dim2=-1).square().unbind()
    lowers = lowers.unbind()

    # The pivots of a positive semi-definite matrix are at least the shift. Smaller ones show an eigenvalue just above -shift, which would
    # make the factor far too large.
    usable = [ok & (pivot >= shift / 4).all(-1) for ok, pivot, shift in zip(worked, pivots, shifts, strict=False)]
    lower, limit = lowers[2], ones.sum(-1) * (1 + 8 * shifts[2])
    for index in (1, 0):
        lower = torch.where(_as_matrix(usable[index]), lowers[index], lower)
        limit = torch.where(usable[index], ones.sum(-1) * (1 + 8 * shifts[index]), limit)
    candidate = torch.linalg.solve_triangular(lower, correlation, upper=False).mT
    fits = (usable[0] | usable[1] | usable[2]) & (candidate.square().sum((-2, -1)) <= limit)
    factor = torch.where(_as_matrix(fits), candidate, torch.diag_embed(ones.clamp_min(0).sqrt()))

    is_regular = torch.zeros_like(fits)
    if regular:
        is_regular = worked[3] & (pivots[3] > ones * epsilon).all(-1)
        factor = torch.where(_as_matrix(is_regular), lowers[3], factor)
    found = cov.new_empty(0)
    if shifted:
        found = torch.eye(size, dtype=cov.dtype, device=cov.device)
        for index in (-1, -2):
            found = torch.where(_as_matrix(worked[index]), lowers[index], found)
    return SyncFreeFactor(scale * factor, _as_matrix(is_regular), found)


def _as_matrix(t: Tensor) -> Tensor:
    return t.unsqueeze(-1).unsqueeze(-1)


def _pivoted_cholesky(a: Tensor) -> tuple[Tensor, float]:
    """F [d, r] with F F' = a up to rounding, and the largest entry of the residual a - F F'. Overwrites `a`.

    Each pivot is the largest remaining diagonal entry.
    """
    size = len(a)
    factor = a.new_zeros(size, size)
    remaining = a.diagonal().clone()
    tolerance = size * torch.finfo(a.dtype).eps
    open_rows = torch.ones(size, dtype=a.dtype, device=a.device)
    for start in range(0, size, BLOCK // 4):
        panel = factor[:, start : start + BLOCK // 4]
        for step in range(panel.shape[1]):
            pivot = int(remaining.argmax())
            # Negative entries show how large the rounding errors of the matrix itself are.
            rounding = (-2 * (remaining * open_rows).amin()).clamp(min=tolerance)
            if not remaining[pivot] > rounding:
                a.addmm_(panel[:, :step], panel[:, :step].T, alpha=-1)
                return factor[:, : start + step].contiguous(), a.abs().max().item()
            root = remaining[pivot].sqrt()
            column = torch.addmv(a[pivot], panel[:, :step], panel[pivot, :step], alpha=-1).mul_(open_rows).div_(root)
            column[pivot] = root
            open_rows[pivot] = 0
            panel[:, step] = column
            remaining.addcmul_(column, column, value=-1)
            remaining[pivot] = -1
        a.addmm_(panel, panel.T, alpha=-1)
    return factor, 0.0
