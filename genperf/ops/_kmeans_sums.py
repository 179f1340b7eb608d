# SPDX-License-Identifier: Apache-2.0
"""Sums over the vectors of each code, on the CPU the same for any order of the vectors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import call
from ._dispatch import register_fake
from ._precision import accumulator_dtype
from .code_statistics import statistics


class Piece(NamedTuple):
    """A part of the vectors."""

    vectors: Tensor  # [outer, D, inner]
    scale: Tensor | None  # [outer, inner]
    weights: Tensor | None  # [outer, inner]
    place: slice  # of the dimension that is split


class Limits(NamedTuple):
    """What the grids of `cluster_sums` depend on."""

    largest: Tensor  # of the magnitudes of the summands and of the weights, float64 [2]
    total: int  # the number of all vectors


class Assignment(NamedTuple):
    """Codes of the vectors, and sums [K, D + 1] of weighted vectors and, in the last column, of weights."""

    indices: Tensor
    """[outer, inner]"""
    sums: Tensor
    """[parts, K, D + 1], whose sum over the parts they are, over all ranks."""
    own: Tensor
    """The same of the vectors of this rank. The next assignment may update them in place."""
    moved: float = 1.0
    """The share of the vectors that were of another code before."""
    codebook: Tensor | None = None
    """[K, D], if every vector is of its nearest code."""

    @property
    def totals(self) -> Tensor:
        """[K, D + 1], in float64 on the CPU."""
        return self.sums.sum(0)

    @property
    def counts(self) -> Tensor:
        """[K], the sums of the weights."""
        return self.sums[:, :, -1].sum(0)


class ClusterSums:
    """Adds vectors to the sums of their codes, [parts, K, D + 1].

    Args:
        impl: "native" or "reference".
        limits: those of all vectors that are added, on the CPU.
        in_place: whether sums are updated in place, by the compiled kernels of the CPU.
    """

    def __init__(self, impl: Impl, limits: Limits | None, in_place: bool) -> None:
        self.impl: Impl = impl
        self.limits = limits
        self.in_place = in_place

    def add(self, sums: Tensor | None, piece: Piece, indices: Tensor, num_codes: int) -> Tensor:
        """`sums` with the vectors of a piece, changed in place if that is possible."""
        vectors, scale, weights, _ = piece
        if self.in_place:
            if sums is None:
                sums = vectors.new_zeros(2, num_codes, vectors.shape[1] + 1, dtype=torch.float64)
            self._update(sums, piece, indices, None)
            return sums
        if self.impl == "native" and vectors.device.type == "cpu":
            assert self.limits is not None
            part = call(torch.ops.genperf.cluster_sums, vectors, indices, num_codes, weights, scale, *self.limits)
        elif self.impl == "reference":
            part = cluster_sums_reference(vectors, indices, num_codes, weights, scale)
        else:
            factors = scale if weights is None else weights if scale is None else weights * scale
            counts, sums_of_piece = statistics(vectors, indices, num_codes, factors, None, self.impl)
            if scale is not None:
                counts = statistics(vectors[:, :1], indices, num_codes, weights, None, self.impl)[0]
            part = torch.cat([sums_of_piece, counts.unsqueeze(1)], 1).double().unsqueeze(0)
        return part if sums is None else sums + part

    def move(self, sums: Tensor, piece: Piece, indices: Tensor, before: Tensor) -> None:
        """Move the vectors of a piece from the codes `before` to others, in place, which takes time only for those that differ."""
        self._update(sums, piece, indices, before.contiguous())

    def _update(self, sums: Tensor, piece: Piece, indices: Tensor, before: Tensor | None) -> None:
        assert self.limits is not None
        vectors, scale, weights, _ = piece
        torch.ops.genperf.cluster_sums_add(sums, vectors, indices.contiguous(), before, weights, scale, *self.limits)

    def means(self, sums: Tensor, otherwise: Tensor) -> Tensor:
        """Means [K, D]; the code of `otherwise` where there are no vectors."""
        if self.in_place:
            return torch.ops.genperf.cluster_means(sums, otherwise.contiguous())
        totals = sums.sum(0)
        return torch.where(totals[:, -1:] == 0, otherwise, (totals[:, :-1] / totals[:, -1:]).to(otherwise.dtype))


def cluster_sums_reference(x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None, scale: Tensor | None) -> Tensor:
    """Sums [1, K, D + 1] in plain PyTorch, in float64: x [outer, D, inner], the others [outer, inner]."""
    rows = x.transpose(1, 2).flatten(0, 1).double()
    mass = torch.ones_like(rows[:, 0]) if weights is None else weights.flatten().double()
    if scale is not None:
        rows = rows * scale.flatten().double().unsqueeze(1)
    rows = torch.cat([rows * mass.unsqueeze(1), mass.unsqueeze(1)], 1)
    return rows.new_zeros(num_codes, rows.shape[1]).index_add(0, indices.flatten(), rows).unsqueeze(0)


@register_fake("cluster_sums")
def _(x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None, scale: Tensor | None, limits: Tensor, total: int) -> Tensor:
    return x.new_empty(2, num_codes, x.shape[1] + 1, dtype=torch.float64)


@register_fake("cluster_sums_add")
def _(
    sums: Tensor,
    x: Tensor,
    indices: Tensor,
    before: Tensor | None,
    weights: Tensor | None,
    scale: Tensor | None,
    limits: Tensor,
    total: int,
) -> None:
    return None


@register_fake("cluster_means")
def _(sums: Tensor, otherwise: Tensor) -> Tensor:
    return torch.empty_like(otherwise)


@register_fake("cluster_distances")
def _(x: Tensor, codebook: Tensor | None, indices: Tensor | None, scale: Tensor | None, mask: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=accumulator_dtype(x.dtype))
