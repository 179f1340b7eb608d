# SPDX-License-Identifier: Apache-2.0
"""Blocked products of triangular and symmetric matrices, which skip zero blocks and compute one triangle of a symmetric result."""

import torch
from torch import Tensor

BLOCK = 256


def gram(w: Tensor, *, mirror: bool) -> Tensor:
    """w w' [m, m] of w [m, n]. Without `mirror`, the result is undefined above the diagonal blocks."""
    result = w.new_empty(len(w), len(w))
    for start, stop in _blocks(len(w)):
        torch.mm(w[start:stop], w[:stop].T, out=result[start:stop, :stop])
        if mirror:
            result[:start, start:stop] = result[start:stop, :start].T
    return result


def congruence(lower: Tensor, symmetric: Tensor) -> Tensor:
    """lower' symmetric lower, up to the diagonal blocks, undefined above: a quarter of the work of two full products."""
    size = len(lower)
    right, result = torch.empty_like(lower), torch.empty_like(lower)
    for start, stop in _blocks(size):
        torch.mm(symmetric[start:, start:], lower[start:, start:stop], out=right[start:, start:stop])
    for start, stop in _blocks(size):
        torch.mm(lower[start:, start:stop].T, right[start:, :stop], out=result[start:stop, :stop])
    return result


def times_lower(left: Tensor, lower: Tensor) -> Tensor:
    """left @ lower, for a lower triangular matrix."""
    result = left.new_empty(len(left), len(lower))
    for start, stop in _blocks(len(lower)):
        torch.mm(left[:, start:], lower[start:, start:stop], out=result[:, start:stop])
    return result


def lower_times(lower: Tensor, right: Tensor) -> Tensor:
    """lower @ right, for a lower triangular matrix."""
    result = right.new_empty(len(lower), right.shape[1])
    for start, stop in _blocks(len(lower)):
        torch.mm(lower[start:stop, :stop], right[:stop], out=result[start:stop])
    return result


def is_lower(a: Tensor) -> bool:
    """Whether a square matrix is zero above its diagonal blocks. Stops at the first block that is not."""
    return a.shape[0] == a.shape[1] and all(not a[:start, start:stop].any() for start, stop in _blocks(len(a)))


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
