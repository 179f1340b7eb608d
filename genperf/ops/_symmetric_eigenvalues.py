# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues of a symmetric float64 matrix, the largest part of a Frechet distance on the CPU."""

import math

import torch
from torch import Tensor

from .. import _library
from ._dispatch import register_fake

# Measured sizes from which the compiled kernel is faster than LAPACK, per instruction set. Without fused multiply-add it never is.
MIN_SIZES = {"x86-64-v4": 256, "x86-64-v3": 768}


def symmetric_eigenvalues(
    a: Tensor,  # [n, n]
) -> Tensor:
    """Eigenvalues of a symmetric matrix in ascending order.

    Equivalent to:
        torch.linalg.eigvalsh(a)

    A float64 CPU matrix of at least `min_size()` is reduced to a band by matrix products, from the band to tridiagonal form in cache, and
    solved by bisection. The error is that of the two orthogonal reductions, a few roundings of the largest eigenvalue for any spectrum.
    Other matrices are passed to torch.

    Args:
        a: float32 or float64, any strides. Only its lower triangle is read.

    Returns:
        [n], detached from a; all NaN if an entry that is read is not finite. The compiled kernel gives the same bits for any number of
        threads.
    """
    a = a.detach()
    if a.device.type == "cpu" and a.dtype == torch.float64 and a.shape[0] >= min_size():
        return torch.ops.genperf.symmetric_eigenvalues(a)
    lower = a.tril()
    finite = lower.isfinite().all()
    return torch.where(finite, torch.linalg.eigvalsh(torch.where(finite, lower, 0)), math.nan)


def min_size() -> float:
    """The matrix size from which the compiled kernel is used on this machine."""
    return math.inf if _library.isa is None else MIN_SIZES.get(_library.built_isa(_library.isa), math.inf)


@register_fake("symmetric_eigenvalues")
def _(a: Tensor) -> Tensor:
    return a.new_empty(a.shape[:1])
