# SPDX-License-Identifier: Apache-2.0
"""Precision of sums, norms and matrix products."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(x: Tensor, dim: int) -> Tensor:
    """x divided by its L2 norm along `dim`, in `accumulator_dtype`; zero, with no gradient, where the norm is 0 or nearly so.

    Nearly zero is below the smallest normal number of x's dtype, or 1e-12: 1 / norm would not fit in a gradient of that dtype.
    """
    wide = x.to(accumulator_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    zero = norm < max(1e-12, torch.finfo(x.dtype).tiny)
    return torch.where(zero, 0, wide / torch.where(zero, 1, norm))


def clamp(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x.clamp(low, high), differentiable at the bounds with gradient 1, where torch 2.15 has 0 and earlier versions have 1."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


@contextmanager
def full_float32() -> Iterator[None]:
    """Within this context float32 matrix products run in full precision, whatever torch.backends allows (TF32, bf16)."""
    mkldnn: Any = torch.backends.mkldnn  # type checkers do not know the module that replaces it at import
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    reduced = [(backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in ("ieee", "none")]
    try:
        for backend, _ in reduced:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in reduced:
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:  # it had been set here, not inherited from a global setting
                backend.fp32_precision = precision
