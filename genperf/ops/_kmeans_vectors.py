# SPDX-License-Identifier: Apache-2.0
"""The vectors that k-means clusters: scaled for a metric, weighted, read in chunks, and spread over ranks."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .._choices import Impl, Metric
from .._distributed import all_gather_ints, all_gather_rows, all_reduce_sum, of_rank_0, world_size
from ._autograd import call, transformed
from ._kmeans_sums import Assignment, ClusterSums, Limits, Piece
from ._precision import accumulator_dtype
from .nearest_code import search

# Elements that are converted, or searched and added up, at a time; on the CPU only, where a file may be behind them.
_CHUNK = 1 << 22
_SEARCH_CHUNK = 1 << 24

# The share of vectors that change their code below which sums are updated, not computed anew.
_FEW = 1 / 8
# The share of a search, in pairs of vectors and codes, below which only codes that have changed are searched.
_PARTIAL = 0.45
# Bounds of the rounding of squared distances, relative to them, and for "cosine" to the squared length of the vectors.
_ROUNDING = 1e-5


class Stage(NamedTuple):
    """A quantizer whose codes are subtracted from the vectors."""

    codebook: Tensor  # [K, D]
    indices: Tensor  # [outer, inner]


class Changes(NamedTuple):
    """What an update has done to a codebook."""

    codebook: Tensor  # [K, D]
    before: Tensor  # [K, D]
    changed: Tensor  # [K], bool
    places: Tensor  # of the codes that changed
    codes: Tensor  # those


class Vectors:
    """The vectors under a metric. For "cosine" they are scaled to unit length on the fly, without a normalized copy.

    On the CPU, with compiled kernels, every result is the same for any number of threads, chunks and ranks.

    Args:
        x: [outer, D, inner].
        metric: "euclidean" or "cosine".
        impl: "native" or "reference".
        weights: [outer, inner], in `accumulator_dtype`.
        synchronized: the vectors of all ranks, in their order, are clustered together. All ranks then call the same methods.
        stages: quantizers whose codes are subtracted, one after the other.
        limits: those of a larger set of vectors that holds these.
        unit: factors [outer, inner] of x, before the codes of the stages are subtracted.
    """

    def __init__(
        self,
        x: Tensor,
        metric: Metric,
        impl: Impl,
        weights: Tensor | None = None,
        synchronized: bool = False,
        stages: Sequence[Stage] = (),
        limits: Limits | None = None,
        unit: Tensor | None = None,
    ) -> None:
        self.x = x
        self.metric: Metric = metric
        self.impl: Impl = impl
        self.weights = weights
        self.stages = stages
        self.unit = unit
        self.dtype = accumulator_dtype(x.dtype)
        self.synchronized = synchronized and world_size() > 1
        self.here = x.shape[0] * x.shape[2]
        counts = [count for (count,) in all_gather_ints([self.here])] if self.synchronized else [self.here]
        self.rank = dist.get_rank() if self.synchronized else 0
        self.start = sum(counts[: self.rank])  # the first position of this rank
        self.count = sum(counts)
        self.split = 0 if x.shape[0] >= x.shape[2] else 1
        self.on_host = _on_host(x.device)
        self.by_kernel = impl == "native" and x.device.type == "cpu"
        self.scale: Tensor | None = None  # [outer, inner]
        if metric == "cosine":  # the pieces have no scale yet
            norm = torch.cat([self.norms(piece.vectors) for piece in self.pieces()], self.split)
            self.scale = torch.where(norm >= torch.finfo(self.dtype).tiny, 1 / norm, 0)
        self.limits = limits if limits is not None or x.device.type != "cpu" else self._limits()
        self.sums = ClusterSums(impl, self.limits, in_place=self.by_kernel and self.on_host)

    def _limits(self) -> Limits:
        values = torch.stack([_magnitude(piece.vectors) for piece in self.pieces()]).amax()
        bound = values.double()
        if self.scale is not None:
            bound = bound * 0 + 1  # a vector that is not finite keeps its NaN
        mass = torch.ones_like(bound) if self.weights is None else _magnitude(self.weights).double()
        largest = self._over_ranks(torch.stack([bound, mass]))
        return Limits(torch.stack([largest[0] * largest[1], largest[1]]), self.count)

    @property
    def finite(self) -> Tensor:
        """Whether all vectors and weights are, on the CPU."""
        assert self.limits is not None
        return self.limits.largest.isfinite().all()

    def pieces(self, size: int | None = None) -> Iterator[Piece]:
        """The vectors in parts of at most `size` elements; on a GPU all at once."""
        outer, dim, inner = self.x.shape
        length = (outer, inner)[self.split]
        step = max(1, (size or _CHUNK) // max(1, dim * (outer, inner)[1 - self.split])) if self.x.device.type == "cpu" else max(1, length)
        for start in range(0, max(1, length), step):
            place = slice(start, min(length, start + step))
            vectors = self._at(self.x, place, 2 * self.split)
            if self.unit is not None:
                vectors = vectors.to(self.dtype) * self._at(self.unit, place, self.split).unsqueeze(1)
            for stage in self.stages:
                codes = stage.codebook[self._at(stage.indices, place, self.split)]
                vectors = vectors.to(self.dtype) - codes.transpose(1, 2)
            scale, weights = (None if t is None else self._at(t, place, self.split) for t in (self.scale, self.weights))
            yield Piece(vectors, scale, weights, place)

    @staticmethod
    def _at(t: Tensor, place: slice, dim: int) -> Tensor:
        return t.narrow(dim, place.start, place.stop - place.start)

    def search(self, codebook: Tensor) -> Tensor:
        """Index [outer, inner] of the nearest code."""
        found = [search(piece.vectors, codebook, None, self.metric, self.impl) for piece in self.pieces(_SEARCH_CHUNK)]
        return found[0] if len(found) == 1 else torch.cat(found, self.split)

    def assign(self, codebook: Tensor, before: Assignment | None = None) -> Assignment:
        """Assign each vector to its nearest code. Each chunk is read once.

        Once few vectors move to another code, the sums `before` change by those vectors alone, and few codes change: only those are
        searched. That is bitwise the same, since sums and search are exact.
        """
        known = before if self.sums.in_place else None
        updates = known is not None and known.moved < _FEW
        changes = self._changes(codebook, known) if known is not None and updates else None
        found, moved, own = [], 0, known.own if known is not None else None
        if own is not None and not updates:
            own.zero_()
        for piece in self.pieces(_SEARCH_CHUNK):
            was = self._at(known.indices, piece.place, self.split) if known is not None else None
            indices = self._search_changed(piece, changes, was) if changes is not None and was is not None else None
            if indices is None:
                indices = search(piece.vectors, codebook, None, self.metric, self.impl)
            found.append(indices)
            if was is not None:
                moved += int((indices != was).sum())
            if own is not None and was is not None and updates:
                self.sums.move(own, piece, indices, was)
            else:
                own = self.sums.add(own, piece, indices, len(codebook))
        assert own is not None
        indices = found[0] if len(found) == 1 else torch.cat(found, self.split)
        return Assignment(indices, self.all_reduce(own), own, moved / max(1, self.here) if known is not None else 1.0, codebook)

    def _changes(self, codebook: Tensor, before: Assignment) -> Changes | None:
        """The codes that have changed; None if they cannot be searched alone."""
        if before.codebook is None:
            return None
        if self.metric == "cosine" and any(bool((codes == 0).all(1).any()) for codes in (codebook, before.codebook)):
            return None  # distances to a code without a direction are not those of its angle
        changed = (codebook != before.codebook).any(1)
        places = changed.nonzero().squeeze(1)
        return Changes(codebook, before.codebook, changed, places, codebook[places])

    def _search_changed(self, piece: Piece, changes: Changes, was: Tensor) -> Tensor | None:
        """The nearest codes, by a search of the codes that have changed; None if those are too many.

        A code that is as it was, or nearer than it was, is still nearer than the other codes that are as they were. It is compared with
        the nearest of the codes that have changed. Vectors for which neither holds, or the comparison is within the rounding, search all.
        """
        share, kept = len(changes.places) / len(changes.codebook), ~changes.changed[was]
        # About half of the codes that change come nearer to a vector.
        if share + float((~kept).double().mean()) / 2 > _PARTIAL:
            return None

        def distances(codes: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None:
                mask = mask.contiguous()
            return torch.ops.genperf.cluster_distances(piece.vectors, codes, index.contiguous(), piece.scale, mask).double()

        limit = distances(changes.codebook, was) * (1 + _ROUNDING) + (_ROUNDING if self.metric == "cosine" else 0)
        kept |= distances(changes.before, was, ~kept) > limit
        if share + float((~kept).double().mean()) > _PARTIAL:
            return None
        if len(changes.places) > 0:
            other = changes.places[search(piece.vectors, changes.codes, kept.contiguous(), self.metric, self.impl)]
            kept &= distances(changes.codebook, other, kept & (other != was)) > limit
        outer, inner = (~kept).nonzero().unbind(1)
        indices = was.clone()
        rows = _rows(piece.vectors, outer, inner).unsqueeze(2)
        indices[outer, inner] = search(rows, changes.codebook, None, self.metric, self.impl).squeeze(1)
        return indices

    def assignment(self, indices: Tensor, num_codes: int) -> Assignment:
        """A given assignment with its sums."""
        sums = None
        for piece in self.pieces(_SEARCH_CHUNK):
            sums = self.sums.add(sums, piece, self._at(indices, piece.place, self.split), num_codes)
        assert sums is not None
        return Assignment(indices, self.all_reduce(sums), sums, moved=0)

    def square_distances(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """Squared distance [outer, inner] of each vector to the code of its index, without weights."""
        parts = []
        for piece in self.pieces():
            index = self._at(indices, piece.place, self.split)
            if self.by_kernel:
                codes = codebook.contiguous()
                parts.append(call(torch.ops.genperf.cluster_distances, piece.vectors, codes, index.contiguous(), piece.scale))
                continue
            vectors, codes = piece.vectors.to(self.dtype), codebook[index].transpose(1, 2)
            if piece.scale is None:
                parts.append((vectors - codes).square().sum(1))
            else:
                distance = (vectors * piece.scale.unsqueeze(1) - codes).square().sum(1)
                parts.append(torch.where(piece.scale > 0, distance, 0))
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.split)

    def inertia(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """The weighted sum of the squared distances over all ranks, a float64 scalar."""
        distances = self.weigh(self.square_distances(codebook, indices)).double()
        if not self.on_host:
            return self.all_reduce(distances.sum())
        # As in cluster_sums: the summands are split on two grids on which every sum is exact, whatever its order.
        bits = max(1, math.ceil(math.log2(max(1, self.count))))
        exponent = torch.frexp(self.largest(distances))[1]
        coarse = torch.ldexp(torch.tensor(1.5, dtype=torch.float64), exponent + bits)
        fine = torch.ldexp(coarse, torch.tensor(bits - 53))
        high = (distances + coarse) - coarse
        low = ((distances - high) + fine) - fine
        return self.all_reduce(torch.stack([high.sum(), low.sum()])).sum()

    def weigh(self, values: Tensor) -> Tensor:
        return values if self.weights is None else values * self.weights

    def norms(self, vectors: Tensor) -> Tensor:
        """Norm [outer, inner] of vectors [outer, D, inner]."""
        if self.by_kernel:
            return call(torch.ops.genperf.cluster_distances, vectors, None, None, None)
        return torch.linalg.vector_norm(vectors, dim=1, dtype=self.dtype)

    def as_codes(self, means: Tensor, otherwise: Tensor) -> Tensor:
        """The codes of clusters with these means. For "cosine", means of zero have no direction and give `otherwise`."""
        if self.metric == "euclidean":
            return means
        norm = self.norms(means.unsqueeze(2))
        return torch.where(norm > 0, means / norm, otherwise)

    def uniform(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Uniform random numbers [count] in [0, 1), float64, the same on every rank."""
        source = self.x.device if generator is None else generator.device
        numbers = torch.rand(count, dtype=torch.float64, device=source, generator=generator).to(self.x.device)
        return of_rank_0(numbers) if self.synchronized else numbers

    def rows(self, positions: Tensor) -> Tensor:
        """The vectors [M, D] at positions [M] of this rank."""
        outer, inner = positions // self.x.shape[2], positions % self.x.shape[2]
        found = self.x[outer, :, inner]
        if self.unit is not None:
            found = found.to(self.dtype) * self.unit[outer, inner].unsqueeze(1)
        for stage in self.stages:
            found = found.to(self.dtype) - stage.codebook[stage.indices[outer, inner]]
        return found

    def own_vectors(self, positions: Tensor) -> Tensor:
        """The vectors [M, D], under the metric, at positions [M] of this rank."""
        found = self.rows(positions).to(self.dtype)
        return found if self.scale is None else found * self.scale.flatten()[positions].unsqueeze(1)

    def vectors(self, positions: Tensor) -> Tensor:
        """The vectors [M, D], under the metric, at positions [M] over all ranks."""
        local = positions - self.start
        if self.synchronized and self.here == 0:
            found = torch.zeros(len(positions), self.x.shape[1], dtype=self.dtype, device=self.x.device)
        else:
            found = self.own_vectors(local.clamp(0, self.here - 1) if self.synchronized else local)
        if not self.synchronized:
            return found
        inside = (local >= 0) & (local < self.here)
        return all_reduce_sum(torch.where(inside.unsqueeze(1), found, 0))

    def residual(self, stages: Sequence[Stage]) -> "Vectors":
        """What the codes of these stages leave of the vectors, which are normalized first for "cosine". Its metric is "euclidean"."""
        return Vectors(self.x, "euclidean", self.impl, self.weights, self.synchronized, stages, unit=self.scale)

    def take(self, positions: Tensor) -> "Vectors":
        """The vectors at ascending positions over all ranks; each rank keeps its own."""
        if self.synchronized:
            first, last = (int((positions < bound).sum()) for bound in (self.start, self.start + self.here))
            positions = positions[first:last] - self.start
        weights = None if self.weights is None else self.weights.flatten()[positions].unsqueeze(1)
        return Vectors(self.rows(positions).unsqueeze(2), self.metric, self.impl, weights, self.synchronized, limits=self.limits)

    def draw(self, values: Tensor, quantiles: Tensor) -> Tensor:
        """Positions at which the cumulative sum of values [outer, inner] over all ranks reaches these fractions of the total."""
        # In integers, whose sum does not depend on the order; the sum of 2^33 values still fits.
        shares = (values.double() / self.largest(values) * 2**30).nan_to_num(0, 0, 0).to(torch.int64).flatten()
        reached = shares.cumsum(0)
        if not self.synchronized:
            drawn = torch.searchsorted(reached, (quantiles * reached[-1]).to(torch.int64), right=True)
            return drawn.clamp(max=self.count - 1)
        own = shares.sum().reshape(1)
        totals = all_gather_rows(own, [1] * world_size())
        before, total = totals[: self.rank].sum(), totals.sum()
        wanted = (quantiles * total).to(torch.int64)
        inside = (wanted >= before) & (wanted < before + own)
        drawn = torch.searchsorted(reached, wanted - before, right=True) + self.start
        return torch.where(wanted < total, all_reduce_sum(torch.where(inside, drawn, 0)), self.count - 1)

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over all ranks."""
        return self._over_ranks(values.amax() if values.numel() else values.new_zeros(()))

    def _over_ranks(self, maximum: Tensor) -> Tensor:
        return all_gather_rows(maximum.unsqueeze(0), [1] * world_size()).amax(0) if self.synchronized else maximum

    def all_reduce(self, value: Tensor) -> Tensor:
        return all_reduce_sum(value) if self.synchronized else value


def _on_host(device: torch.device) -> bool:
    """Whether values can be read without device synchronization. Within torch.vmap they cannot be read."""
    return device.type == "cpu" and not transformed()


def _magnitude(t: Tensor) -> Tensor:
    """The largest magnitude; NaN if there is one."""
    if t.numel() == 0:
        return t.new_zeros(())
    low, high = t.aminmax()  # several times faster than a norm
    return torch.maximum(-low, high)


def _rows(vectors: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Vectors [M, D] at places of vectors [outer, D, inner]."""
    return vectors.squeeze(2).index_select(0, outer) if vectors.shape[2] == 1 else vectors[outer, :, inner]
