# SPDX-License-Identifier: Apache-2.0
"""Assignment of vectors to codes in which no code has more than its share."""

import math

import torch
from torch import Tensor

from ._kmeans_vectors import _SEARCH_CHUNK, Assignment, Vectors
from .nearest_code import search

# Rounds that adapt the prices. They are kept from one iteration of k-means to the next.
_ROUNDS = 16
# The first change of a price, in mean squared distances for a code with e times its share of the vectors.
_STEP = 0.2
# Prices are good enough once no more vectors than this share are above the capacity of their codes: more rounds take longer than moving
# those, and leave a higher inertia.
_REST = 1 / 200


class BalancedAssignment:
    """Each vector goes to the code with the least sum of squared distance and price, where the price of a crowded code rises.

    The vectors that are still too many for their codes, a small share, move to codes with room: those first for which it costs least.
    A code then has at most `capacity` vectors.
    """

    def __init__(self, data: Vectors, num_codes: int, balance: float) -> None:
        self.data = data
        self.num_codes = num_codes
        self.mean = data.count / num_codes
        self.capacity = max(math.floor(balance * self.mean), math.ceil(self.mean))
        self.prices = torch.zeros(num_codes, dtype=torch.float64, device=data.x.device)
        self.step = _STEP

    def __call__(self, codebook: Tensor, before: Assignment | None = None) -> Assignment:
        """Assign all vectors, with the prices that earlier calls have left."""
        indices = self._search(codebook)
        distances = self.data.square_distances(codebook, indices)
        unit = distances.double().mean()
        loads, best = self._loads(indices), math.inf
        for _ in range(_ROUNDS):
            crowded = int((loads - self.capacity).clamp(min=0).sum())
            if crowded <= _REST * self.data.count:
                break
            if crowded > best:
                self.step /= 2
            best = min(best, crowded)
            self.prices += self.step * unit * (loads.double().clamp(min=0.25) / self.mean).log()
            self.prices -= self.prices.min()
            indices = self._search(codebook)
            loads = self._loads(indices)
        return self.data.assignment(self._make_room(codebook, indices), self.num_codes)

    def _loads(self, indices: Tensor) -> Tensor:
        return torch.bincount(indices.flatten(), minlength=self.num_codes)

    def _search(self, codebook: Tensor) -> Tensor:
        """The nearest codes with their prices, by one more dimension: zero for a vector, the root of the price for a code."""
        codes = torch.cat([codebook, self.prices.sqrt().to(codebook.dtype).unsqueeze(1)], 1)
        found = []
        for piece in self.data.pieces(_SEARCH_CHUNK):
            vectors = piece.vectors.to(codes.dtype)
            vectors = vectors if piece.scale is None else vectors * piece.scale.unsqueeze(1)
            vectors = torch.cat([vectors, torch.zeros_like(vectors[:, :1])], 1)
            found.append(search(vectors, codes, None, "euclidean", self.data.impl))
        return torch.cat(found, self.data.split)

    def _make_room(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """Move vectors from codes above their capacity to codes below it."""
        shape, indices = indices.shape, indices.flatten()
        while True:
            loads = self._loads(indices)
            excess, room = (loads - self.capacity).clamp(min=0), (self.capacity - loads).clamp(min=0)
            if not bool(excess.any()):
                return indices.reshape(shape)
            positions = (excess[indices] > 0).nonzero().squeeze(1)
            vectors, own = self.data.vectors(positions), indices[positions]
            codes = torch.where(room.unsqueeze(1) > 0, codebook, torch.nan)  # NaN is never nearest
            other = search(vectors.unsqueeze(2), codes, None, "euclidean", self.data.impl).squeeze(1)
            cost = (vectors - codebook[other]).square().sum(1) - (vectors - codebook[own]).square().sum(1)
            order = cost.argsort(stable=True)
            leaves = _rank(own[order]) < excess[own[order]]
            order = order[leaves]
            enters = _rank(other[order]) < room[other[order]]
            order = order[enters]
            indices[positions[order]] = other[order]


def _rank(values: Tensor) -> Tensor:
    """How many equal values come before each, [n] -> [n]."""
    order = values.argsort(stable=True)
    ordered = values[order]
    number = torch.arange(len(values), device=values.device)
    first = torch.where(torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]]), number, 0).cummax(0).values
    return torch.empty_like(number).scatter(0, order, number - first)
