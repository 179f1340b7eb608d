"""Eigenvalues of a symmetric matrix."""

import torch
from torch import Tensor


def symmetric_eigenvalues(a: Tensor) -> Tensor:
    """Eigenvalues [n] of a symmetric a [n, n], ascending; only its lower triangle is read."""
    return torch.linalg.eigvalsh(a)
