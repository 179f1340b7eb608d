"""Dtypes and precision of sums, norms and products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_DTYPES = (torch.bfloat16, torch.float16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums over tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(x: Tensor, dim: int) -> Tensor:
    """Unit vectors in the direction of x's, in the dtype of sums over x.

    A norm that x's dtype cannot hold as a normal number counts as the least that it can: gradients by a zero vector fit in it.
    """
    return F.normalize(x.to(accumulator_dtype(x.dtype)), dim=dim, eps=max(1e-12, torch.finfo(x.dtype).tiny))


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 tensors in float32, whatever the caller allows for its own."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    reduced = [(place, place.fp32_precision) for place in places if place.fp32_precision not in ("ieee", "none")]
    try:
        for place, _ in reduced:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in reduced:
            place.fp32_precision = "none"
            if place.fp32_precision != precision:  # else it is inherited, and stays so
                place.fp32_precision = precision
