"""Eigenvalues of one symmetric float64 matrix, the greater part of a Frechet distance on the CPU."""

import math

import torch
from torch import Tensor

from ._dispatch import register_fake

# The sizes from which the compiled kernel was measured to be quicker than LAPACK, which reduces a small matrix in cache. Without
# fused multiply-add it never is.
MIN_SIZES = {"amx": 256, "x86-64-v4": 256, "x86-64-v3": 768}


def symmetric_eigenvalues(
    a: Tensor,  # [n, n]
) -> Tensor:
    """Eigenvalues of a symmetric matrix in ascending order, without its eigenvectors.

    Equivalent to:
        torch.linalg.eigvalsh(a)

    A float64 matrix on the CPU, if `min_size()` or larger, is reduced to a band by products of matrices, from the band to
    tridiagonal in cache, and solved by bisection: the errors are those of the two orthogonal reductions, a few roundings
    of the largest eigenvalue, whatever the spectrum. Everything else is left to torch.

    Args:
        a: float32 or float64, any strides; only its lower triangle is read.

    Returns:
        [n], detached from a. All NaN where an entry that is read is not finite. The same bits for any number of threads
        from the compiled kernel.
    """
    a = a.detach()
    if a.device.type == "cpu" and a.dtype == torch.float64 and a.shape[0] >= min_size():
        return torch.ops.genperf.symmetric_eigenvalues(a)
    lower = a.tril()
    finite = lower.isfinite().all()
    return torch.where(finite, torch.linalg.eigvalsh(torch.where(finite, lower, 0)), math.nan)


def min_size() -> float:
    """The size from which the compiled kernel runs here."""
    from genperf import _library

    return MIN_SIZES.get(_library.isa, math.inf)


@register_fake("symmetric_eigenvalues")
def _(a) -> Tensor:
    return a.new_empty(a.shape[:1])
