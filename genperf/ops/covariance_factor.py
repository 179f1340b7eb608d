"""A factor of a covariance matrix."""

import math

import torch
from torch import Tensor

from ._blocks import BLOCK
from ._validate import check_float, check_tensor

# What is left of a covariance may be this large, in units of its variances, before it is refused: rounding of float32 is below it.
INDEFINITE = 1e-2
# Times d^(1/2) this is above what float32 rounding makes of a zero eigenvalue, in units of the variances.
FLOAT32_SHIFT = 8 * torch.finfo(torch.float32).eps


def covariance_factor(cov: Tensor) -> Tensor:
    """F [d, r] with cov = F F', r the numerical rank of cov.

    Equivalent to, where cov is well conditioned:
        factor = torch.linalg.cholesky(cov.double())

    Otherwise by a Cholesky factorization with pivots, which stops at rounding (Higham, "Analysis of the Cholesky decomposition of a
    semi-definite matrix", 1990). Either is taken of the correlation matrix in effect, so that features of different scales do
    not hide one another. A factor is what `trace_sqrt_product` and `frechet_distance` need of a covariance: prepare it once
    for one that is used often.

    Args:
        cov: [d, d], symmetric positive semi-definite, float32, float64, bfloat16 or float16; only its lower triangle is certain to be read.

    Returns:
        [d, r] in float64 (float32 on devices without float64), without gradient. Lower triangular where r = d and cov is
        well conditioned. r = 0 for a zero matrix. Of a matrix that rounding has made indefinite, the factor of one near it.

    Raises:
        ValueError: cov is not square, holds NaN or infinity, or is far from positive semi-definite.
        TypeError: cov is no floating-point tensor.
    """
    op = "covariance_factor"
    check_covariance(op, "cov", cov)
    with torch.no_grad():
        matrix = cov.to(working_dtype(cov.device))
        if not matrix.isfinite().all():
            raise ValueError(f"{op}: cov must be finite, got NaN or infinity.")
        factor, left = nearest_factor(matrix)
        if left > INDEFINITE:
            raise ValueError(f"{op}: cov must be positive semi-definite, got one {left:.2g} of its variances away from any such matrix.")
        return factor


def nearest_factor(cov: Tensor) -> tuple[Tensor, float]:
    """F with F F' = cov up to rounding, and the largest entry that is left of an indefinite cov, in units of its variances."""
    scale = cov.diagonal().clamp_min(0).sqrt()
    factor, info = torch.linalg.cholesky_ex(cov)
    if info == 0 and (factor.diagonal() > scale * (len(cov) * torch.finfo(cov.dtype).eps) ** 0.5).all():
        return factor, 0.0
    dead = scale == 0
    lower = cov.tril()
    stray = torch.where(dead[:, None] | dead, lower, 0).abs().max().item()
    inverse = torch.where(dead, 0, 1 / scale)
    correlation = inverse[:, None] * lower * inverse
    factor, left = _pivoted_cholesky(correlation + correlation.tril(-1).T)
    largest = scale.square().max().item()
    return scale[:, None] * factor, max(left, stray / largest if largest else math.inf if stray else 0.0)


def check_covariance(op: str, name: str, value: Tensor, batched: bool = False) -> None:
    check_tensor(op, name, value)
    check_float(op, name, value)
    if value.dim() < 2 or (value.dim() > 2 and not batched) or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{op}: {name} must be square, {'[..., d, d]' if batched else '[d, d]'}, got shape {list(value.shape)}.")


def working_dtype(device: torch.device) -> torch.dtype:
    """What matrix functions compute in: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def factor_without_sync(cov: Tensor) -> tuple[Tensor, Tensor]:
    """F with cov = F F', and whether cov is regular, so that F is its Cholesky factor; without waiting for the device.

    Of a singular cov [..., d, d], with L L' = cov + shift diagonal(cov), F = cov L'^-1, whose null space holds what rounding leaves
    divided by the root of the shift. The smallest shift that serves is taken; the larger ones are for what bfloat16 and
    float32 have rounded. Of a cov further from positive semi-definite only the diagonal is taken: it may be the rounding of a
    zero covariance.
    """
    diagonal = cov.diagonal(dim1=-2, dim2=-1)
    size = cov.shape[-1]
    epsilon = size * torch.finfo(cov.dtype).eps
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()[..., None]
    correlation = cov / scale / scale.mT
    ones = correlation.diagonal(dim1=-2, dim2=-1)  # and zeros, of features that are constant
    factor = torch.diag_embed(ones.clamp_min(0).sqrt())
    identity = torch.eye(size, dtype=cov.dtype, device=cov.device)
    for shift in (1e-2, FLOAT32_SHIFT * size**0.5, max(1e-12, 2 * epsilon)):
        shifted, info = torch.linalg.cholesky_ex(correlation + shift * identity)
        candidate = torch.linalg.solve_triangular(shifted, correlation, upper=False).mT
        # An eigenvalue just above -shift makes the factor far too long.
        usable = (info == 0) & (candidate.square().sum((-2, -1)) <= ones.sum(-1) * (1 + shift))
        factor = torch.where(usable[..., None, None], candidate, factor)
    plain, info = torch.linalg.cholesky_ex(cov)
    regular = (info == 0) & (plain.diagonal(dim1=-2, dim2=-1).square() > diagonal * epsilon).all(-1)
    regular = regular[..., None, None]
    return torch.where(regular, plain, scale * factor), regular


def _pivoted_cholesky(a: Tensor) -> tuple[Tensor, float]:
    """F [d, r] with F F' = a up to rounding, the largest remaining diagonal entry as each pivot; and the largest entry of what is left.

    `a` is overwritten.
    """
    size = len(a)
    factor = a.new_zeros(size, size)
    left = a.diagonal().clone()
    tolerance = size * torch.finfo(a.dtype).eps
    open_rows = torch.ones(size, dtype=a.dtype, device=a.device)
    for start in range(0, size, BLOCK // 4):
        panel = factor[:, start : start + BLOCK // 4]
        for step in range(panel.shape[1]):
            pivot = int(left.argmax())
            # What has gone below zero tells how much of the rest is rounding of the matrix itself.
            rounding = (-2 * (left * open_rows).amin()).clamp(min=tolerance)
            if not left[pivot] > rounding:
                a.addmm_(panel[:, :step], panel[:, :step].T, alpha=-1)
                return factor[:, : start + step].contiguous(), a.abs().max().item()
            root = left[pivot].sqrt()
            column = torch.addmv(a[pivot], panel[:, :step], panel[pivot, :step], alpha=-1).mul_(open_rows).div_(root)
            column[pivot] = root
            open_rows[pivot] = 0
            panel[:, step] = column
            left.addcmul_(column, column, value=-1)
            left[pivot] = -1
        a.addmm_(panel, panel.T, alpha=-1)
    return factor, 0.0
