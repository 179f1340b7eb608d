# SPDX-License-Identifier: Apache-2.0
"""Assignment of vectors to codes in which no code has more than its share."""

import math

import torch
from torch import Tensor

from .._distributed import all_gather_ints, all_gather_rows, of_rank_0, rank
from ._kmeans_vectors import _SEARCH_CHUNK, Assignment, Vectors
from .nearest_code import search

# Rounds that adapt the prices. They are kept from one iteration of k-means to the next.
_ROUNDS = 16
# The first change of a price, in mean squared distances for a code with e times its share of the vectors.
_STEP = 0.2
# Prices are good enough once no more vectors than this share are above the capacity of their codes: more rounds take longer than moving
# those, and leave a higher inertia.
_REST = 1 / 200
# Weights are rounded up to multiples of 2^-40 of the largest (coarser for more than 2^21 vectors), whose sum does not depend on the order.
_WEIGHT_BITS, _SUM_BITS = 40, 61


class BalancedAssignment:
    """Each vector goes to the code with the least sum of squared distance and price, where the price of a crowded code rises.

    The vectors that are still too many for their codes, a small share, move to codes with room: those first for which it costs least.
    A code then has at most the mass `capacity`, the number of its vectors or the sum of their weights. A vector that has more mass alone
    leaves no room in its code. With weights, a code may keep more than its capacity if each of its vectors has more mass than any code has
    room for, which is at least `balance` - 1 times the mean.
    """

    def __init__(self, data: Vectors, num_codes: int, balance: float) -> None:
        self.data = data
        self.num_codes = num_codes
        self.masses, self.total, self.scale = self._integers()
        self.mean = self.total / num_codes
        self.capacity = max(math.floor(balance * self.mean), math.ceil(self.mean))
        if self.masses is not None:
            self.masses = self.masses.clamp(max=self.capacity)
        self.prices = torch.zeros(num_codes, dtype=torch.float64, device=data.x.device)
        self.unit = self.prices.sum()
        self.step = _STEP

    def _integers(self) -> tuple[Tensor | None, int, float]:
        """The masses of this rank's vectors as integers [n] (None for ones), their sum over all ranks, and the weight of a mass of one."""
        data = self.data
        if data.weights is None:
            return None, data.count, 1.0
        weights, bits = data.weights.flatten().double(), min(_WEIGHT_BITS, _SUM_BITS - data.count.bit_length())
        scale = float(data.largest(weights)) / 2**bits
        masses = (weights / scale).ceil().to(torch.int64)
        return masses, int(data.all_reduce(masses.sum())), scale

    def __call__(self, codebook: Tensor, before: Assignment | None = None) -> Assignment:
        """Assign all vectors, with the prices that earlier calls have left."""
        indices = self._search(self.data, codebook)
        self.unit = self.data.inertia(codebook, indices) / (self.total * self.scale)
        loads, best = self._loads(indices), math.inf
        for _ in range(_ROUNDS):
            crowded = int((loads - self.capacity).clamp(min=0).sum())
            if crowded <= _REST * self.total:
                break
            if crowded > best:
                self.step /= 2
            best = min(best, crowded)
            self.follow(loads.double())
            indices = self._search(self.data, codebook)
            loads = self._loads(indices)
        return self.data.assignment(self._make_room(codebook, indices), self.num_codes)

    def of_batch(self, batch: Vectors, codebook: Tensor) -> Assignment:
        """Assign some of the vectors with the prices as they are."""
        return batch.assignment(self._search(batch, codebook), self.num_codes)

    def follow(self, loads: Tensor) -> None:
        """Raise the prices of codes with more than the mean of the loads [K], in float64, and lower those of the others."""
        least = 0.25 * self.num_codes / self.data.count  # of a quarter of a vector
        prices = self.prices + self.step * self.unit * (loads / loads.mean()).clamp(min=least).log()
        prices = prices - prices.min()
        # Ranks on different machines may round logarithms differently.
        self.prices = of_rank_0(prices) if self.data.synchronized else prices

    def _loads(self, indices: Tensor) -> Tensor:
        """The mass of each code over all ranks, int64 [K]."""
        indices = indices.flatten()
        if self.masses is None:
            return self.data.all_reduce(torch.bincount(indices, minlength=self.num_codes))
        return self.data.all_reduce(self.masses.new_zeros(self.num_codes).index_add(0, indices, self.masses))

    def _search(self, data: Vectors, codebook: Tensor) -> Tensor:
        """The nearest codes with their prices, by one more dimension: zero for a vector, the root of the price for a code."""
        codes = torch.cat([codebook, self.prices.sqrt().to(codebook.dtype).unsqueeze(1)], 1)
        found = []
        for piece in data.pieces(_SEARCH_CHUNK):
            vectors = piece.vectors.to(codes.dtype)
            vectors = vectors if piece.scale is None else vectors * piece.scale.unsqueeze(1)
            vectors = torch.cat([vectors, torch.zeros_like(vectors[:, :1])], 1)
            found.append(search(vectors, codes, None, "euclidean", data.impl))
        return torch.cat(found, data.split)

    def _make_room(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """Move vectors from codes above their capacity to codes below it."""
        shape, indices = indices.shape, indices.flatten()
        moved = True
        while True:
            loads = self._loads(indices)
            excess, room = (loads - self.capacity).clamp(min=0), (self.capacity - loads).clamp(min=0)
            if not bool(excess.any()):
                break
            leaves = excess[indices] > 0
            if self.masses is not None:
                leaves &= (self.masses > 0) & (self.masses <= room.max())
            positions = leaves.nonzero().squeeze(1)
            counts = [count for (count,) in all_gather_ints([len(positions)])] if self.data.synchronized else [len(positions)]
            if sum(counts) == 0:  # every vector has more mass than there is room for
                break
            # Codes with room for a vector of mean mass; if none fits into the one nearest to it, those with room for each of the vectors.
            mass = self._mass(positions)
            least_room = min(int(room.max()), int(self.data.all_reduce(mass.sum())) // sum(counts)) if moved else int(room.max())
            moves = self._moves(codebook, indices, positions, room >= least_room)
            every = all_gather_rows(moves, counts) if self.data.synchronized else moves
            enters = _entering(every, excess, room)
            moved = bool(enters.any())
            own = enters.split(counts)[rank() if self.data.synchronized else 0]
            indices[positions[own]] = moves[own, 1].long()
        return indices.reshape(shape)

    def _moves(self, codebook: Tensor, indices: Tensor, positions: Tensor, open_codes: Tensor) -> Tensor:
        """For this rank's vectors at `positions`: code, nearest open code, cost of a move for each mass, and mass, float64 [n, 4]."""
        vectors, own = self.data.own_vectors(positions), indices[positions]
        codes = torch.where(open_codes.unsqueeze(1), codebook, torch.nan)  # NaN is never nearest
        part = Vectors(vectors.unsqueeze(2), "euclidean", self.data.impl, limits=self.data.limits)
        other = part.search(codes)
        near, far = (part.square_distances(codebook, index.reshape(other.shape)).double() for index in (own, other))
        return torch.stack([own, other.flatten(), (far - near).flatten(), self._mass(positions)], 1)

    def _mass(self, positions: Tensor) -> Tensor:
        return torch.ones_like(positions) if self.masses is None else self.masses[positions]


def _entering(moves: Tensor, excess: Tensor, room: Tensor) -> Tensor:
    """Which moves [n, 4] are made, those of least cost first, so that no code gives more than its excess or gets more than its room."""
    order = moves[:, 2].argsort(stable=True)
    own, other, mass = moves[order][:, [0, 1, 3]].long().unbind(1)
    fits = mass <= room[other]
    order, own, other, mass = order[fits], own[fits], other[fits], mass[fits]
    leaves = _mass_before(own, mass) < excess[own]
    order, other, mass = order[leaves], other[leaves], mass[leaves]
    order = order[_mass_before(other, mass) + mass <= room[other]]
    return torch.zeros_like(moves[:, 0], dtype=torch.bool).index_fill(0, order, True)


def _mass_before(groups: Tensor, masses: Tensor) -> Tensor:
    """The sum of the masses that come before each in its group, [n] -> [n]."""
    order = groups.argsort(stable=True)
    ordered, mass = groups[order], masses[order]
    before = mass.cumsum(0) - mass
    first = torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    return torch.empty_like(before).scatter(0, order, before - torch.where(first, before, 0).cummax(0).values)
