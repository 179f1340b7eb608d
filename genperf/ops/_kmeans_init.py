# SPDX-License-Identifier: Apache-2.0
"""Initial codes of k-means, and vectors in place of codes that lost theirs."""

import torch
from torch import Tensor

from ._kmeans_sums import Assignment
from ._kmeans_vectors import Vectors
from .code_statistics import statistics
from .nearest_code import search

# k-means||: the number of candidates per code, and the number of rounds in which they are drawn.
_OVERSAMPLING = 2
_DRAW_ROUNDS = 5
# Candidates come from a sample of at most this many vectors, or so many for each code: with 128 for each, the inertia is at most 1.5 %
# above that of candidates from all vectors before the first iteration, and 0.5 % after ten.
_SAMPLE = 1 << 16
_SAMPLE_PER_CODE = 128
# Rounds that merge the candidates into K codes. The first ones merge a part of the surplus, the last ones all of it.
_MERGE_ROUNDS = 16
_LAST_ROUNDS = 4


def random_codes(data: Vectors, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """Random vectors [K, D], each drawn once before any is drawn twice."""
    order = data.uniform(data.count, generator).argsort(stable=True)
    return data.vectors(order[torch.arange(num_codes, device=order.device) % data.count])


def initial_codes(data: Vectors, num_codes: int, generator: torch.Generator | None) -> tuple[Tensor, Assignment | None]:
    """Initial codes [K, D]: candidates drawn by k-means||, replaced by the means of their nearest vectors, and merged into K.

    Also returns the assignment of which they are the means, unless they come from a sample of the vectors.
    """
    sample = max(_SAMPLE, _SAMPLE_PER_CODE * num_codes)
    sampled = data.count > sample
    if sampled:
        number = torch.arange(sample, device=data.x.device)
        positions = ((number + data.uniform(sample, generator)) * (data.count / sample)).long().clamp(max=data.count - 1)
        data = data.take(positions)
    batch = -(-num_codes * _OVERSAMPLING // _DRAW_ROUNDS)
    strata = torch.arange(batch, device=data.x.device)
    distances = torch.ones_like(data.x[:, 0], dtype=data.dtype)
    indices = torch.zeros_like(distances, dtype=torch.int64)
    for turn in range(_DRAW_ROUNDS):
        drawn = data.draw(data.weigh(distances), (strata + data.uniform(batch, generator)) / batch)
        candidates = data.vectors(drawn)
        found = data.search(candidates)
        to_found = data.square_distances(candidates, found)
        closer = to_found < distances if turn > 0 else torch.ones_like(found, dtype=torch.bool)
        distances = torch.where(closer, to_found, distances)
        indices = torch.where(closer, found + turn * batch, indices)
    found = data.assignment(indices, _DRAW_ROUNDS * batch)
    means = data.sums.means(found.sums, found.sums.new_zeros(_DRAW_ROUNDS * batch, data.x.shape[1], dtype=data.dtype))
    codes, place = _merge(data, means, found.counts.to(data.dtype), num_codes, generator)
    if sampled:
        return codes, None
    del found  # of a size that matters
    start = data.assignment(place[indices], num_codes)
    return data.sums.means(start.sums, codes), start


def _merge(data: Vectors, centers: Tensor, counts: Tensor, num_codes: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Merge C clusters with these centers [C, D] and counts [C] into K, keeping the increase of the inertia small.

    Returns their centers [K, D], and into which of them each cluster went [C], -1 for one without vectors or that is left out.

    Merging two clusters adds n m / (n + m) |a - b|^2 to the inertia. Each round searches the nearest centers of a random half of the
    clusters in the other half. Each cluster keeps the best partner that it has found so far, and the cheapest pairs merge.
    """
    partner = torch.arange(len(centers), device=centers.device)
    centers, counts, partner, place = _merged(data, centers, counts, partner, partner, generator)
    for turn in range(_MERGE_ROUNDS):
        surplus = (counts > 0).sum() - num_codes
        if data.on_host and int(surplus) <= 0:
            break
        own = torch.arange(len(centers), device=centers.device)
        left = own[: (len(own) + 1) // 2]
        rows, codes = centers[: len(left)], centers[len(left) :]
        if not data.on_host:
            codes = torch.where(counts[len(left) :].unsqueeze(1) > 0, codes, torch.nan)  # NaN is never nearest
        nearest = search(rows.unsqueeze(2), codes, None, "euclidean", data.impl).squeeze(1) + len(left)
        costs, found = _costs(data, centers, counts, own, partner), _costs(data, centers, counts, left, nearest)
        known = costs[: len(left)]
        partner = torch.cat([torch.where(found < known, nearest, partner[: len(left)]), partner[len(left) :]])
        costs = torch.cat([torch.minimum(found, known), costs[len(left) :]])

        quota = surplus if turn >= _MERGE_ROUNDS - _LAST_ROUNDS else (surplus / 4).ceil()
        rank = torch.empty_like(own).scatter(0, costs.argsort(stable=True), own)
        merges = (rank < quota) & costs.isfinite()
        merges &= ~(merges[partner] & (partner[partner] == own) & (own > partner))  # only one of two that are each other's partner,
        merges &= ~merges[partner]  # and not into a cluster that is itself merged
        centers, counts, partner, went = _merged(data, centers, counts, partner, torch.where(merges, partner, own), generator)
        place = torch.where(place < 0, -1, went[place])
    # If there are still more than K, the largest are kept; if there are fewer, they are repeated.
    kept = counts.argsort(descending=True, stable=True)
    number = torch.arange(len(kept), device=kept.device)
    rank = torch.where(number < num_codes, number, -1)
    place = torch.where(place < 0, -1, torch.empty_like(kept).scatter(0, kept, rank)[place])
    return centers[kept[torch.arange(num_codes, device=kept.device) % (counts > 0).sum()]], place


def _merged(
    data: Vectors, centers: Tensor, counts: Tensor, partner: Tensor, target: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centers, counts and partners of clusters of which each is merged into its target, in random order, and where each went.

    On the CPU those that have vectors; a GPU would have to wait for their number.
    """
    own = torch.arange(len(centers), device=centers.device)
    order = data.uniform(len(centers), generator).argsort()
    if data.on_host:
        order = order[((counts > 0) & (target == own))[order]]
    place = torch.full_like(own, -1).scatter(0, order, own[: len(order)])
    to = torch.where(counts > 0, place[target], -1)
    counts, sums = statistics(centers.unsqueeze(2), to.unsqueeze(1), len(order), counts.unsqueeze(1), None, data.impl)
    centers = sums.div_(torch.where(counts > 0, counts, 1).unsqueeze(1))
    return centers, counts, place[target[partner[order]]], to


def _costs(data: Vectors, centers: Tensor, counts: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """What merging the clusters `one`, the first ones, with others adds to the inertia."""
    vectors = Vectors(centers[: len(one)].unsqueeze(2), "euclidean", data.impl, limits=data.limits)
    increase = vectors.square_distances(centers, other.unsqueeze(1)).squeeze(1) / (1 / counts[: len(one)] + 1 / counts[other])
    return torch.where((one != other) & (counts[: len(one)] > 0) & (counts[other] > 0), increase, torch.inf)


def replace_empty_codes(data: Vectors, updated: Tensor, codebook: Tensor, indices: Tensor, empty: Tensor) -> Tensor:
    """`updated` with its empty codes replaced by vectors, chosen in proportion to the squared distance to their codes."""
    number = torch.arange(len(codebook), device=codebook.device)
    missing = empty.sum()
    distances = data.weigh(data.square_distances(codebook, indices))
    drawn = data.draw(distances, ((number.double() + 0.5) / missing.clamp(min=1)).clamp(max=1))
    # The positions are ascending. One drawn more than once is followed by the next positions, so that all are distinct.
    drawn = (drawn - number).cummax(0).values + number
    drawn = torch.minimum(drawn, data.count - missing + number).clamp(0, data.count - 1)
    place = drawn[(empty.cumsum(0) - 1).clamp(min=0)]
    vectors = data.as_codes(data.vectors(place), codebook)
    return torch.where(empty.unsqueeze(1), vectors, updated)
