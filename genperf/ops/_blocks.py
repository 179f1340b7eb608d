"""Products of triangular and symmetric matrices by blocks: no product with known zeros, no half that mirrors another."""

import torch
from torch import Tensor

BLOCK = 256


def gram(w: Tensor, *, mirror: bool) -> Tensor:
    """w w' [m, m] of w [m, n]; its upper triangle only if `mirror`, and otherwise undefined above the diagonal blocks."""
    result = w.new_zeros(len(w), len(w))
    for start, stop in _blocks(len(w)):
        rows = w[start:stop] @ w[:stop].T
        result[start:stop, :stop] = rows
        if mirror:
            result[:start, start:stop] = rows[:, :start].T
    return result


def congruence(lower: Tensor, symmetric: Tensor) -> Tensor:
    """The lower triangle of lower' symmetric lower: a quarter of the work of two full products."""
    size = len(lower)
    right = lower.new_empty(size, size)
    for start, stop in _blocks(size):
        right[start:, start:stop] = symmetric[start:, start:] @ lower[start:, start:stop]
    result = lower.new_zeros(size, size)
    for start, stop in _blocks(size):
        result[start:stop, :stop] = lower[start:, start:stop].T @ right[start:, :stop]
    return result


def times_lower(left: Tensor, lower: Tensor) -> Tensor:
    """left @ lower."""
    return torch.cat([left[:, start:] @ lower[start:, start:stop] for start, stop in _blocks(len(lower))], 1)


def lower_times(lower: Tensor, right: Tensor) -> Tensor:
    """lower @ right."""
    return torch.cat([lower[start:stop, :stop] @ right[:stop] for start, stop in _blocks(len(lower))])


def is_lower(a: Tensor) -> bool:
    """Whether a square matrix is zero above its diagonal blocks; looks at no more of a full matrix than one block."""
    return a.shape[0] == a.shape[1] and all(not a[:start, start:stop].any() for start, stop in _blocks(len(a)))


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
