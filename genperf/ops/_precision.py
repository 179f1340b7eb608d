"""Precision of sums, norms and matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_DTYPES = (torch.bfloat16, torch.float16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(x: Tensor, dim: int) -> Tensor:
    """x divided by its L2 norm along `dim`, in `accumulator_dtype`.

    Norms are clamped at the smallest normal number of x's dtype, so that the gradient at a zero vector fits in that dtype.
    """
    return F.normalize(x.to(accumulator_dtype(x.dtype)), dim=dim, eps=max(1e-12, torch.finfo(x.dtype).tiny))


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
