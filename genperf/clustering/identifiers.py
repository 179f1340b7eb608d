# SPDX-License-Identifier: Apache-2.0
"""Identifiers of several codes: how many vectors share one."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._validate import check_tensor


class Collisions(NamedTuple):
    """How many vectors share an identifier."""

    distinct: int
    """Identifiers that some vector has."""
    vectors: int
    """Vectors whose identifier another vector has too."""
    most: int
    """The most vectors of one identifier."""


def collisions(indices: Tensor) -> Collisions:  # [N, stages]
    """Count the vectors that share an identifier, a row of non-negative `indices`.

    Raises:
        TypeError: indices that are not an integer tensor.
        ValueError: another shape, or no vector.
    """
    counts = torch.unique(_keys("collisions", indices), return_counts=True)[1]
    return Collisions(len(counts), int(counts[counts > 1].sum()), int(counts.max()))


def number_collisions(indices: Tensor) -> Tensor:  # [N, stages] -> [N]
    """The number of earlier vectors with the same identifier: as one more code, it makes identifiers distinct.

    Raises:
        TypeError: indices that are not an integer tensor.
        ValueError: another shape, or no vector.
    """
    keys = _keys("number_collisions", indices)
    order = keys.argsort(stable=True)
    ordered = keys[order]
    number = torch.arange(len(keys), device=keys.device)
    first = torch.where(torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]]), number, 0).cummax(0).values
    return torch.empty_like(number).scatter(0, order, number - first)


def _keys(name: str, indices: Tensor) -> Tensor:
    """A number [N] for each identifier, equal for equal ones."""
    check_tensor(name, "indices", indices)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{name}: indices must be integers, got {indices.dtype}.")
    if indices.dim() != 2 or indices.numel() == 0:
        raise ValueError(f"{name}: indices must have shape [N, stages], neither of them 0, got {list(indices.shape)}.")
    indices = indices.long()
    keys, bound = torch.zeros_like(indices[:, 0]), 1
    for column in indices.unbind(1):
        codes = int(column.max()) + 1
        if bound * codes >= 1 << 63:
            keys = torch.unique(keys, return_inverse=True)[1]
            bound = len(keys)
        keys, bound = keys * codes + column, bound * codes
    return keys
