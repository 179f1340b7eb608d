# SPDX-License-Identifier: Apache-2.0
"""The squared maximum mean discrepancy under any kernel, block by block."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.covariance_factor import working_dtype

# Rows and columns per block of the kernel matrix.
_BLOCK = 512

# Maps rows [M, d] and [N, d] to their kernel matrix [M, N].
Kernel = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def squared_mmd(real: Tensor, fake: Tensor, kernel: Kernel, *, unbiased: bool) -> Tensor:
    """The estimate without pairs of a sample with itself (unbiased), or with them, from all rows, in float64 (float32 on MPS)."""
    within = [_sum_within(x, kernel, unbiased) / (len(x) * (len(x) - unbiased)) for x in (real, fake)]
    between = torch.zeros_like(within[0])
    for rows in real.split(_BLOCK):
        rows = rows.to(between.dtype)
        for columns in fake.split(_BLOCK):
            between += kernel(rows, columns.to(between.dtype)).sum()
    return within[0] + within[1] - 2 * between / (len(real) * len(fake))


def _sum_within(x: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """Sum of the kernel matrix of x with itself, of whose blocks only those on and above the diagonal are computed."""
    blocks = x.split(_BLOCK)
    total = torch.zeros((), dtype=working_dtype(x.device), device=x.device)
    for i, rows in enumerate(blocks):
        rows = rows.to(total.dtype)
        own = kernel(rows, rows)
        total += own.fill_diagonal_(0).sum() if unbiased else own.sum()
        for columns in blocks[i + 1 :]:
            total += 2 * kernel(rows, columns.to(total.dtype)).sum()
    return total
