# SPDX-License-Identifier: Apache-2.0
"""Polar factor and derivative of the matrix square root from matrix products alone.

No step synchronizes with the host, so everything can be captured in a CUDA graph. The singular values are scaled into (0, 1] and driven to
1 by odd polynomials of degree five, each optimal for the interval that the previous one leaves (Amsel et al., "The Polar Express", 2025),
followed by two Newton-Schulz steps. Singular values below the first interval end below 1, and zeros stay zero.

The number of steps is fixed, for singular values that the dtype can resolve: one that depends on the condition would have to be read back.
"""

import math

import torch
from torch import Tensor

from ._device_rates import has_fast_half
from ._precision import full_float32
from ._products import SPLIT_FROM, addmm, split_addmm, split_gram, split_step, symmetric_product

# Each polynomial is shrunk by this factor, so that rounding does not move a value out of the next interval.
CUSHION = 1.01

NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)

# Steps before this one are never in half precision, since their rounding would rotate the vectors of small singular values.
HALF_FROM = 6


def _schedule(lower: float) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of successive polynomials a x + b x^3 + c x^5 that map [lower, 1] to 1."""
    low, high, steps = lower, 1.0, []
    while low < 0.97:
        a, b, c, error = _best_quintic(low, high)
        a, b, c = a / CUSHION, b / CUSHION**3, c / CUSHION**5
        steps.append((a, b, c))
        low, high = a * low + b * low**3 + c * low**5, 1 + error
    return (*steps, NEWTON_SCHULZ, NEWTON_SCHULZ)


def _best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """Coefficients of the odd quintic closest to 1 on [low, high], and its largest error.

    Remez exchange: the error of the best polynomial alternates at four points.
    """
    first, second = (3 * low + high) / 4, (low + 3 * high) / 4
    error = math.inf
    while True:
        points = torch.tensor([low, first, second, high], dtype=torch.float64, device="cpu")
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64, device="cpu")
        system = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, found = torch.linalg.solve(system, torch.ones_like(points)).tolist()
        if abs(found - error) <= 1e-12 * abs(found):
            return a, b, c, found
        error = found
        middle, spread = -3 * b / (10 * c), math.sqrt(max(0.0, 9 * b * b - 20 * a * c)) / abs(10 * c)
        first, second = math.sqrt(max(0.0, middle - spread)), math.sqrt(middle + spread)


# Per dtype, the steps that take singular values of at least 1e-7 (float32: 1e-5) of the largest to 1.
STEPS = {torch.float64: _schedule(1e-7), torch.float32: _schedule(1e-5)}
SIGN_LOWER = {torch.float64: 1e-10, torch.float32: 1e-5}
SIGN_STEPS = {torch.float64: _schedule(1e-10), torch.float32: STEPS[torch.float32]}


def polar(w: Tensor, *, precision: str, accurate: bool) -> Tensor:
    """The polar factor of w [..., m, n]: U V' of its singular vectors, the nearest matrix with orthonormal rows or columns.

    Args:
        precision: "float64", or "mixed": float32, from half-precision products where these are faster, and unless `accurate` with steps
            in half precision: all from `HALF_FROM` on but the last, which makes the factor orthogonal.
        accurate: keep every step in float32. Needed for quantities linear in the factor, such as gradients; the error of <polar(w), w> is
            quadratic in that of the factor.
    """
    tall = w.shape[-2] > w.shape[-1]
    x = w.mT if tall else w
    working = torch.float32 if precision == "mixed" or w.dtype != torch.float64 else torch.float64
    x = _unit_norm(_unit_norm(x, torch.inf).to(working), 2)
    with full_float32():
        x = _iterate(x, precision == "mixed", accurate)
    return x.mT if tall else x


def _unit_norm(x: Tensor, order: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, ord=order, dim=(-2, -1), keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def _iterate(x: Tensor, mixed: bool, accurate: bool) -> Tensor:
    """The polar factor of x [..., n, m], n <= m, of Frobenius norm 1."""
    split = mixed and x.shape[-2] >= SPLIT_FROM and has_fast_half(x.device)
    steps = STEPS[x.dtype]
    gram = split_gram(x) if split else symmetric_product(x, x)
    square = split_gram(gram) if split else symmetric_product(gram, gram)
    # The Schatten 8-norm is a close upper bound of the largest singular value. The first step reuses its products.
    squared = torch.linalg.matrix_norm(square, keepdim=True).sqrt()
    squared = torch.where(squared == 0, 1, squared)
    a, b, c = steps[0]
    x = x / squared.sqrt()
    factor = gram * (b / squared) + square * (c / squared.square())
    x = split_addmm(x, factor, a) if split else addmm(x, factor, x, a, 1)
    for index, coefficients in enumerate(steps[1:], 1):
        if mixed and not accurate and HALF_FROM <= index < len(steps) - 1:
            x = _half_step(x, coefficients)
        else:
            x = split_step(x, coefficients) if split else _step(x, coefficients)
    return x


def _step(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    gram = symmetric_product(x, x)
    return addmm(x, symmetric_product(gram, gram, gram, beta=b, alpha=c), x, a, 1)


def _half_step(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """A step whose products have half-precision operands; the term linear in x stays in float32."""
    a, b, c = coefficients
    half = x.half()
    gram = half @ half.mT
    return torch.add((addmm(gram, gram, gram, b, c) @ half).to(x.dtype), x, alpha=a)


def lyapunov(root: Tensor, right: Tensor) -> Tensor:
    """Solve root X + X root = right for X, with root symmetric positive semi-definite: the derivative of a matrix square root.

    The sign function of [[root, right], [0, -root]] is [[I, 2 X], [0, -I]]; the iteration works on its blocks (Song et al., "Fast
    Differentiable Matrix Square Root", 2022).
    """
    largest = root.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    norm = largest * torch.linalg.matrix_norm(root / largest, keepdim=True).clamp_min(1)
    # The shift gives null vectors the sign 1 as well; with sign 0 the entries of X between them and other vectors would be halved.
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    s, x = root / norm + SIGN_LOWER[root.dtype] * identity, right / norm
    # All operands in the same order: with transposes in their place, though equal up to rounding, errors in the null space grow.
    for a, b, c in SIGN_STEPS[root.dtype]:
        square = s @ s
        corner = s @ x - x @ s
        outer = b * corner + c * (square @ corner + corner @ square)
        factor = addmm(square, square, square, b, c)
        s, x = addmm(s, s, factor, a, 1), addmm(s @ outer, x, factor, 1, 1) + a * x
    return x / 2
