"""Matrix functions from matrix products alone: the polar factor, and the derivative of a square root.

No step waits for the host, so all of it can be captured in a CUDA graph. The singular values, scaled into (0, 1], are driven to 1 by odd
polynomials of degree five, each the best one for the interval that the steps before it leave (Amsel et al., "The Polar
Express", 2025), and two plain Newton-Schulz steps last. Values below the interval end below 1: of a singular matrix the null
space stays what it is.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

# Room between a polynomial's interval and what rounding makes of it: without it a step may throw a value out of the next interval.
CUSHION = 1.01

NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)


def _schedule(lower: float) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of x -> a x + b x^3 + c x^5, one after another, that take [lower, 1] to 1."""
    low, high, steps = lower, 1.0, []
    while low < 0.97:
        a, b, c, error = _best_quintic(low, high)
        a, b, c = a / CUSHION, b / CUSHION**3, c / CUSHION**5
        steps.append((a, b, c))
        low, high = a * low + b * low**3 + c * low**5, 1 + error
    return (*steps, NEWTON_SCHULZ, NEWTON_SCHULZ)


def _best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """The odd quintic nearest to 1 on [low, high], and its largest error (Remez: the error alternates at four points)."""
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


# By dtype, the steps that bring relative singular values from 1e-7 (float32: 1e-5) on to 1.
STEPS = {torch.float64: _schedule(1e-7), torch.float32: _schedule(1e-5)}
SIGN_LOWER = {torch.float64: 1e-10, torch.float32: 1e-5}
SIGN_STEPS = {torch.float64: _schedule(1e-10), torch.float32: STEPS[torch.float32]}


def polar(w: Tensor, *, precision: str, accurate: bool) -> Tensor:
    """The polar factor of w [..., m, n]: the nearest matrix with orthonormal rows or columns, U V' of its singular vectors.

    precision: "float64"; "mixed" runs in float32 and, unless `accurate`, some steps with half-precision operands: not the
    first six, in which rounding turns the vectors of small singular values, nor the last two, which make the factor orthogonal.
    What is linear in the factor, such as a gradient, wants `accurate`; <U, w> errs only by the square.
    """
    tall = w.shape[-2] > w.shape[-1]
    x = w.mT if tall else w
    working = torch.float32 if precision == "mixed" or w.dtype != torch.float64 else torch.float64
    x = x.to(working)
    gram = x @ x.mT
    square = gram @ gram
    # The Schatten 8-norm: at least the largest singular value, and near it.
    norm = square.square().sum((-2, -1), keepdim=True).pow(1 / 8).clamp_min(torch.finfo(working).tiny)
    x = x / norm
    steps = STEPS[working]
    with _full_float32() if working == torch.float32 else nullcontext():
        for step, coefficients in enumerate(steps):
            rough = precision == "mixed" and not accurate and 6 <= step < len(steps) - 2
            x = _rough_step(x, coefficients) if rough else _step(x, coefficients)
    return x.mT if tall else x


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 tensors in float32, whatever the caller allows for its own."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = allowed


def _step(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    gram = x @ x.mT
    return _addmm(x, _addmm(gram, gram, gram, b, c), x, a, 1)


def _rough_step(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """A step whose products have half-precision operands; x itself keeps its bits."""
    a, b, c = coefficients
    half = x.half()
    gram = half @ half.mT
    return torch.add((_addmm(gram, gram, gram, b, c) @ half).to(x.dtype), x, alpha=a)


def _addmm(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """beta base + alpha left @ right in one pass over the result."""
    if base.dim() == 2:
        return torch.addmm(base, left, right, beta=beta, alpha=alpha)
    shape = base.shape
    base, left, right = (t.flatten(0, -3) for t in (base, left, right))
    return torch.baddbmm(base, left, right, beta=beta, alpha=alpha).reshape(shape)


def lyapunov(root: Tensor, right: Tensor) -> Tensor:
    """X with root X + X root = right, for symmetric positive semi-definite roots: the derivative of a square root.

    The sign function of [[root, right], [0, -root]] is [[I, 2 X], [0, -I]]; its blocks are iterated (Song et al., "Fast
    Differentiable Matrix Square Root", 2022).
    """
    largest = root.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    norm = largest * torch.linalg.matrix_norm(root / largest, keepdim=True).clamp_min(1)
    # A null vector's sign must be 1 as well: else what it shares with the others would count half.
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    s, x = root / norm + SIGN_LOWER[root.dtype] * identity, right / norm
    for a, b, c in SIGN_STEPS[root.dtype]:
        square = s @ s
        corner = s @ x - x @ s
        outer = b * corner + c * (square @ corner + corner @ square)
        factor = _addmm(square, square, square, b, c)
        s, x = _addmm(s, s, factor, a, 1), _addmm(s @ outer, x, factor, 1, 1) + a * x
    return x / 2
