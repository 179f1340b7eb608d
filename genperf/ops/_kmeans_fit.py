# SPDX-License-Identifier: Apache-2.0
"""Iterations of k-means: Lloyd's updates, updates by moving averages, restarts, and the end at a fixed point."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._choices import ClusterInit, ClusterUpdate
from ._kmeans_balance import BalancedAssignment
from ._kmeans_init import initial_codes, random_codes, replace_empty_codes
from ._kmeans_vectors import Assignment, Vectors

# Vectors that a mini-batch takes in a row, so that reading it from a file does not take a page for each vector.
_BLOCK = 32


class KMeansProgress(NamedTuple):
    """What the callback of `kmeans` is called with, before each update and at the end. Nothing is copied."""

    restart: int
    """0 ... n_init - 1."""
    iteration: int
    """The number of updates so far in this restart."""
    codebook: Tensor
    """[K, D]."""
    indices: Tensor
    """x's shape without channel_dim (and heads): the code of each vector in `codebook`."""
    counts: Tensor
    """[K], the weight of the vectors of each code."""
    inertia: Tensor
    """The weighted sum of squared distances, a float64 scalar on x's device."""
    head: int = 0
    """The entry of dimension 0 with heads=True."""
    stage: int = 0
    """The stage of `residual_kmeans`."""


class KMeansOptions(NamedTuple):
    """Arguments of `kmeans` that do not depend on the vectors."""

    iterations: int
    init: ClusterInit | Tensor
    n_init: int
    update: ClusterUpdate
    batch_size: int | None
    decay: float | None
    balance: float | None
    generator: torch.Generator | None
    callback: Callable[[KMeansProgress], Any] | None


def with_shape(options: KMeansOptions, shape: list[int]) -> KMeansOptions:
    """Options whose callback gets indices of this shape."""
    callback = options.callback
    if callback is None:
        return options
    return options._replace(callback=lambda progress: callback(progress._replace(indices=progress.indices.reshape(shape))))


class Clusters(NamedTuple):
    """A codebook with the assignment of the vectors to it."""

    codebook: Tensor  # [K, D]
    assignment: Assignment

    @property
    def indices(self) -> Tensor:
        return self.assignment.indices

    @property
    def counts(self) -> Tensor:
        return self.assignment.counts


def fit(data: Vectors, num_codes: int, options: KMeansOptions, head: int = 0, stage: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codebook [K, D], indices [outer, inner], counts [K] and inertia of the best of `n_init` runs."""
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for restart in range(options.n_init):
        found = _run(data, num_codes, options, (restart, head, stage))
        result = (found.codebook, found.indices, found.counts.to(data.dtype), data.inertia(found.codebook, found.indices))
        if best is not None:  # without a look at the values
            better = result[3] < best[3]
            codebook, indices, counts, inertia = (torch.where(better, new, old) for new, old in zip(result, best, strict=True))
            result = (codebook, indices, counts, inertia)
        best = result
    assert best is not None
    return best


def _run(data: Vectors, num_codes: int, options: KMeansOptions, place: tuple[int, int, int]) -> Clusters:
    start: Assignment | None = None
    if not isinstance(options.init, str):
        codebook = options.init.detach().to(data.dtype, copy=True)
    elif options.init == "random":
        codebook = random_codes(data, num_codes, options.generator)
    else:
        codebook, start = initial_codes(data, num_codes, options.generator)
    codebook = data.as_codes(codebook, codebook)

    def stops(turn: int, found: Clusters) -> bool:
        if options.callback is None:
            return turn == options.iterations
        seen = (found.codebook, found.indices, found.counts.to(data.dtype), data.inertia(found.codebook, found.indices))
        return bool(options.callback(KMeansProgress(place[0], turn, *seen, *place[1:]))) or turn == options.iterations

    if options.update == "ema":
        return _moving_averages(data, codebook, start, options, stops)
    return _lloyd(data, codebook, start, options, stops)


def _lloyd(
    data: Vectors, codebook: Tensor, start: Assignment | None, options: KMeansOptions, stops: Callable[[int, Clusters], bool]
) -> Clusters:
    """Lloyd's updates of a codebook, of which `start` is an assignment from which few vectors move."""
    assign = _assigns(data, codebook, options)
    found = Clusters(codebook, assign(codebook, start))
    settled = FixedPoint(data.on_host)
    for turn in itertools.count():
        if stops(turn, found):
            break
        empty = found.counts == 0
        updated = data.sums.means(found.assignment.sums, found.codebook)
        if data.metric == "cosine":
            updated = torch.where(empty.unsqueeze(1), found.codebook, data.as_codes(updated, found.codebook))
        updated = _without_empty_codes(data, updated, found, empty)
        # Prices change the balanced assignment to the same codes.
        if options.balance is None and settled(updated, found.codebook):
            break
        found = Clusters(updated, assign(updated, found.assignment))
    return found


def _assigns(data: Vectors, codebook: Tensor, options: KMeansOptions) -> Callable[..., Assignment]:
    return data.assign if options.balance is None else BalancedAssignment(data, len(codebook), options.balance)


def _moving_averages(
    data: Vectors, codebook: Tensor, start: Assignment | None, options: KMeansOptions, stops: Callable[[int, Clusters], bool]
) -> Clusters:
    assign = _assigns(data, codebook, options)
    found = Clusters(codebook, assign(codebook, start))
    averages = MovingAverages(data, found, options, assign if isinstance(assign, BalancedAssignment) else None)
    for turn in itertools.count():
        if stops(turn, found):
            break
        empty = averages.epoch()
        reads = not data.on_host or bool(empty.any())
        # A pass of its own assigns the vectors where somebody looks at the result.
        if reads or options.callback is not None or turn == options.iterations - 1:
            found = Clusters(averages.codebook, assign(averages.codebook))
        if reads and turn < options.iterations - 1:
            empty &= found.counts == 0
            averages.replace(_without_empty_codes(data, averages.codebook, found, empty), empty)
    return found


def _without_empty_codes(data: Vectors, updated: Tensor, found: Clusters, empty: Tensor) -> Tensor:
    # On a GPU the check would synchronize, so the replacement always runs; without empty codes it changes nothing.
    if data.on_host and not bool(empty.any()):
        return updated
    return replace_empty_codes(data, updated, found.codebook, found.indices, empty)


def _means(totals: Tensor, data: Vectors) -> Tensor:
    """Means [K, D]; NaN for a code without vectors."""
    return (totals[:, :-1] / totals[:, -1:]).to(data.dtype)


class MovingAverages:
    """Codes as moving averages of the vectors of mini-batches, which are random blocks of the positions.

    Batches are too small to be balanced: their vectors are assigned with the prices of `balanced`, which follow the averages.
    """

    def __init__(self, data: Vectors, start: Clusters, options: KMeansOptions, balanced: BalancedAssignment | None) -> None:
        self.data = data
        self.balanced = balanced
        self.generator = options.generator
        self.codebook = start.codebook
        self.blocks = data.count // _BLOCK
        wanted = options.batch_size or max(16 * len(start.codebook), data.count // 16)
        self.per_batch = max(1, -(-wanted // _BLOCK))
        share = min(1.0, self.per_batch * _BLOCK / data.count)
        # By default the averages remember about half an epoch.
        self.decay = options.decay if options.decay is not None else max(0.0, 1 - 2 * share)
        # Scaled to one batch, so that the first batches do not replace the start.
        self.totals = start.assignment.totals * (share * (1 - self.decay))

    def epoch(self) -> Tensor:
        """Update the codes with every vector once, mini-batch by mini-batch. Returns which codes got none, [K]."""
        data, counts = self.data, torch.zeros_like(self.totals[:, -1])
        order = data.uniform(self.blocks, self.generator).argsort()
        within = torch.arange(_BLOCK, device=order.device)
        rest = torch.arange(self.blocks * _BLOCK, data.count, device=order.device)
        batches = list(order.split(self.per_batch))
        for turn, batch in enumerate(batches):
            positions = (batch.sort().values.unsqueeze(1) * _BLOCK + within).flatten()
            if turn == len(batches) - 1:
                positions = torch.cat([positions, rest])
            part = data.take(positions)
            found = part.assign(self.codebook) if self.balanced is None else self.balanced.of_batch(part, self.codebook)
            counts = counts + found.totals[:, -1]
            self.totals = self.totals * self.decay + found.totals * (1 - self.decay)
            if self.balanced is not None:
                self.balanced.follow(self.totals[:, -1])
            means = data.as_codes(_means(self.totals, data), self.codebook)
            self.codebook = torch.where(self.totals[:, -1:] > 0, means, self.codebook)
        return counts == 0

    def replace(self, codebook: Tensor, replaced: Tensor) -> None:
        """Give replaced codes the weight of a code of mean size."""
        mean = self.totals[:, -1].mean()
        fresh = torch.cat([codebook.double() * mean, mean.expand(len(codebook), 1)], 1)
        self.totals = torch.where(replaced.unsqueeze(1), fresh, self.totals)
        self.codebook = codebook


class FixedPoint:
    """Whether an update has left the codebook as it was, after which no other changes anything.

    On the CPU it is known at once. From a GPU the answers arrive while later updates run, and a few of those are in vain; the host never
    waits. While a CUDA graph is captured, or ops are traced, nothing can be read, and all iterations run.
    """

    def __init__(self, on_host: bool) -> None:
        self.on_host = on_host
        self.pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, updated: Tensor, before: Tensor) -> bool:
        if isinstance(updated, FakeTensor):
            return False
        if self.on_host:
            return torch.equal(updated, before)
        if not updated.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        answer, event = _pinned_flag(), torch.cuda.Event()
        answer.copy_((updated == before).all(), non_blocking=True)
        event.record()
        self.pending.append((answer, event))
        while self.pending and self.pending[0][1].query():
            if bool(self.pending.pop(0)[0]):
                return True
        return False


def _pinned_flag() -> Tensor:
    return torch.empty((), dtype=torch.bool, pin_memory=True)
