# SPDX-License-Identifier: Apache-2.0
"""`genperf bench --accuracy`: errors of methods for the Frechet distance and its gradient, on difficult covariances.

Exact values come from the singular values of the factors that the covariances are made of, and never from a covariance.
"""

import argparse
import math
import platform
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from modes import command, selected, write
from torch import Tensor

import genperf

DIM, DIM_QUICK = 512, 32


class Case(NamedTuple):
    """Two Gaussians in float64, each covariance as factor @ factor.T."""

    mean1: Tensor  # [d]
    factor1: Tensor  # [d, r1], r1 <= d
    mean2: Tensor  # [d]
    factor2: Tensor  # [d, r2]

    def covariances(self) -> tuple[Tensor, Tensor]:
        return self.factor1 @ self.factor1.T, self.factor2 @ self.factor2.T

    def scale(self) -> float:
        """|mean1 - mean2|^2 + tr cov1 + tr cov2, which errors of the distance are divided by."""
        return float(sum(part.square().sum() for part in (self.mean1 - self.mean2, self.factor1, self.factor2)))

    def trace(self) -> float:
        """tr (cov1 cov2)^(1/2), the nuclear norm of factor1' factor2."""
        return float(torch.linalg.svdvals(self.factor1.T @ self.factor2).sum())

    def distance(self) -> float:
        return self.scale() - 2 * self.trace()

    def gradient(self) -> Tensor:
        """Derivative of the distance in factor1; where it is not unique, the one that is zero in the null space."""
        u, s, vt = torch.linalg.svd(self.factor1.T @ self.factor2, full_matrices=False)
        rank = int((s > 1e-13 * s.amax()).sum()) if s.numel() and s.amax() > 0 else 0
        return 2 * (self.factor1 - self.factor2 @ vt[:rank].T @ u[:, :rank].T)


def centered_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor [d, min(n, d)] of the unbiased covariance of features [n, d]."""
    mean = features.mean(0)
    factor = (features - mean).T / math.sqrt(len(features) - 1)
    return mean, torch.linalg.qr(factor.T, mode="r").R.T if len(features) > len(mean) else factor


def make_cases(d: int, seed: int = 0) -> dict[str, Case]:
    """Pairs of Gaussians of dimension d (even, at least 8), most of them from ReLU features as an image classifier has."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = randn(d, d) / math.sqrt(d)

    def gaussian(n: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        return centered_factor(factor * torch.relu(randn(n, d) @ mix + 0.1))

    def graded() -> Tensor:
        return torch.linalg.qr(randn(d, d)).Q * torch.logspace(0, -6, d, dtype=torch.float64)

    full1, full2 = gaussian(6 * d), gaussian(6 * d, 1.1)
    line1, line2 = (randn(d), randn(d, 1)), (randn(d), randn(d, 1))
    alive = (torch.arange(d) % 4 != 0).double()
    left = (torch.arange(d) < d // 2).double()
    return {
        "full rank": Case(*full1, *full2),
        "n = 2 d": Case(*gaussian(2 * d), *full2),
        "n = d / 2": Case(*gaussian(d // 2), *full2),
        "n = d / 4, both": Case(*gaussian(d // 4), *gaussian(d // 4, 1.1)),
        "rank 1": Case(*line1, *line2),
        "rank 1 against full rank": Case(*line1, *full2),
        "identical": Case(*full1, *full1),
        "condition 1e12": Case(randn(d), graded(), randn(d), graded()),
        "tiny, 1e-20": Case(*(1e-10 * t for t in (*full1, *full2))),
        "huge, 1e20": Case(*(1e10 * t for t in (*full1, *full2))),
        "disjoint supports": Case(full1[0], left[:, None] * full1[1], full2[0], (1 - left)[:, None] * full2[1]),
        "dead features": Case(full1[0], alive[:, None] * full1[1], full2[0], alive[:, None] * full2[1]),
        "all samples equal": Case(full1[0], torch.zeros(d, d // 2, dtype=torch.float64), *full2),
    }


# The methods, each as mean1, cov1, mean2, cov2 -> distance.


def from_trace(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, trace: Tensor) -> Tensor:
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace


def sqrtm(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """As pytorch-fid, with its second attempt and its limit on imaginary parts."""
    from scipy import linalg

    product = (cov1 @ cov2).numpy()
    root = torch.from_numpy(linalg.sqrtm(product))
    if not root.isfinite().all():
        offset = 1e-6 * torch.eye(len(cov1), dtype=cov1.dtype)
        root = torch.from_numpy(linalg.sqrtm(((cov1 + offset) @ (cov2 + offset)).numpy()))
    if root.is_complex():
        if root.diagonal().imag.abs().max() > 1e-3:
            raise ValueError(f"Imaginary component {root.imag.abs().max():.3g}")
        root = root.real
    return from_trace(mean1, cov1, mean2, cov2, root.trace())


def eigvals(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    from torchmetrics.image.fid import _compute_fid

    return _compute_fid(mean1, cov1, mean2, cov2)


def symmetric_root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def eigvalsh(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, root2: Tensor | None = None) -> Tensor:
    """The FD loss of Yang et al. (2026): symmetric eigenvalues, with the root of the reference computed once."""
    root2 = symmetric_root(cov2) if root2 is None else root2
    trace = torch.linalg.eigvalsh(root2 @ cov1 @ root2).clamp(min=0).sqrt().sum()
    return from_trace(mean1, cov1, mean2, cov2, trace)


def newton_schulz(a: Tensor, steps: int, tolerance: float = 0.0) -> Tensor:
    """Coupled iteration for the square root of a; stops early once the residual is below a tolerance."""
    norm = a.norm()
    y, z = a / norm, torch.eye(len(a), dtype=a.dtype, device=a.device)
    for _ in range(steps):
        t = 1.5 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 0.5 * (z @ y)
        y, z = y @ t, t @ z
        if tolerance and (a / norm - y @ y).norm() * norm / a.norm() < tolerance:
            break
    return y * norm.sqrt()


def newton_schulz_float32(*moments: Tensor) -> Tensor:
    """BigGAN's PyTorch version: 50 steps."""
    mean1, cov1, mean2, cov2 = (t.float() for t in moments)
    return from_trace(mean1, cov1, mean2, cov2, newton_schulz(cov1 @ cov2, 50).trace())


def newton_schulz_float64(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """PIQ: up to 100 steps, and a second attempt."""
    root = newton_schulz(cov1 @ cov2, 100, 1e-5)
    if not root.isfinite().all():
        offset = 1e-6 * torch.eye(len(cov1), dtype=cov1.dtype)
        root = newton_schulz((cov1 + offset) @ (cov2 + offset), 100, 1e-5)
    return from_trace(mean1, cov1, mean2, cov2, root.trace())


METHODS = {
    "scipy sqrtm (pytorch-fid)": sqrtm,
    "eigvals (torchmetrics)": eigvals,
    "eigvalsh, cached root (FD loss)": eigvalsh,
    "Newton-Schulz, float32 (BigGAN)": newton_schulz_float32,
    "Newton-Schulz, float64 (PIQ)": newton_schulz_float64,
    "genperf, eigen": lambda *moments: genperf.frechet_distance(*moments, impl="eigen"),
    "genperf, polar": lambda *moments: genperf.frechet_distance(*moments, impl="polar"),
}


def cell(error: float) -> str:
    return "NaN" if math.isnan(error) else "infinite" if math.isinf(error) else f"{error:.0e}"


def value_error(method: Callable[..., Tensor], case: Case) -> str:
    cov1, cov2 = case.covariances()
    try:
        found = float(method(case.mean1, cov1, case.mean2, cov2))
    except (ValueError, RuntimeError) as error:
        return type(error).__name__.lstrip("_")
    return cell(abs(found - case.distance()) / case.scale())


def gradient_error(method: Callable[..., Tensor], case: Case) -> str:
    """Error of the derivative in factor1, relative to 2 (|factor1| + |factor2|), in the Frobenius norm."""
    if method is sqrtm:
        return "none"
    factor1 = case.factor1.clone().requires_grad_()
    cov1, cov2 = factor1 @ factor1.T, case.covariances()[1]
    try:
        (found,) = torch.autograd.grad(method(case.mean1, cov1, case.mean2, cov2), factor1)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__.lstrip("_")
    return cell(float((found - case.gradient()).norm() / (2 * case.factor1.norm() + 2 * case.factor2.norm())))


def table(title: str, error: Callable[[Callable, Case], str], cases: dict[str, Case]) -> list[str]:
    lines = [f"## {title}", "", f"| | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for name, case in cases.items():
        lines.append(f"| {name} | {' | '.join(error(method, case) for method in METHODS.values())} |")
    return [*lines, ""]


def report(arguments: argparse.Namespace) -> str:
    import scipy
    import torchmetrics

    d = DIM_QUICK if arguments.quick else DIM
    cases = make_cases(d)
    cases = {name: cases[name] for name in selected(cases, arguments.k)}
    versions = (
        f"torch {torch.__version__}, scipy {scipy.__version__}, torchmetrics {torchmetrics.__version__}, "
        f"Python {platform.python_version()}, CPU"
    )
    return "\n".join(
        [
            f"# Errors of the Frechet distance on difficult covariances, d = {d}",
            "",
            f"{command(arguments, '--accuracy')}. {versions}.",
            "",
            "Every method gets the same float64 means and covariances; those that work in float32 convert them. The exact values come",
            "from the singular values of the factors. Features are rectified, correlated Gaussians; a row says what is special.",
            "",
            *table("Value, relative to |mean1 - mean2|^2 + tr cov1 + tr cov2", value_error, cases),
            *table("Gradient in the factor of cov1, relative to 2 (|factor1| + |factor2|)", gradient_error, cases),
            "The gradient is taken through cov1 = factor1 factor1'. Where it is not unique (rank-deficient pairs), the error is the",
            "distance to the one that is zero in the null space.",
            "",
        ]
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the table of the cases that -k selects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns about singular matrices, which the table shows
        text = report(arguments)
    return write(text, arguments, "frechet_cases")
