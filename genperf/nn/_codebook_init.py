# SPDX-License-Identifier: Apache-2.0
"""Initial codes from data: random vectors or k-means centers of the global batch, the same on every rank."""

import itertools
from typing import get_args

import torch
from torch import Tensor
from torch import distributed as dist

from .._choices import CodebookInit, Metric
from .._distributed import all_gather_ints, all_gather_rows, of_rank_0, world_size
from ..ops.kmeans import kmeans

INITS: tuple[CodebookInit, ...] = get_args(CodebookInit)

# k-means runs on at most this many vectors per code; more change its result little.
KMEANS_VECTORS = 256


def uniform_codes(*shape: int) -> Tensor:  # [..., K, D]
    """Codes drawn from (-1 / K, 1 / K), van den Oord et al.'s initialization."""
    return torch.empty(shape).uniform_(-1 / shape[-2], 1 / shape[-2])


@torch.no_grad()
def codes_from_data(
    vectors: Tensor,  # [codebooks, outer, D, inner]
    valid: Tensor | None,  # [codebooks, outer, inner], equal for every codebook
    num_codes: int,
    *,
    init: CodebookInit,
    iterations: int = 10,
    metric: Metric = "euclidean",
    synchronized: bool = True,
) -> tuple[Tensor, Tensor] | None:  # [codebooks, K, D], [codebooks, K]
    """Codes for each codebook, from vectors that are finite, and the number of vectors that each represents; None if there is no vector.

    Args:
        init: "kmeans" for k-means centers, otherwise random vectors, each drawn once before any is drawn twice.
        iterations, metric: of k-means.
        synchronized: use the vectors of all ranks. Every rank must then call this, and all get the same codes.
    """
    rows = vectors.detach().movedim(2, -1).flatten(1, 2)
    finite = rows.isfinite().all(-1).all(0)
    rows = rows[:, finite if valid is None else finite & valid[0].flatten()]
    synchronized = synchronized and world_size() > 1
    rows, seed = _global_rows(rows, num_codes * KMEANS_VECTORS if init == "kmeans" else None, synchronized)
    if rows.shape[1] == 0:
        return None
    generator = torch.Generator(rows.device).manual_seed(seed)
    if init == "kmeans":
        found = kmeans(rows, num_codes, iterations=iterations, metric=metric, heads=True, generator=generator)
        # A code without vectors counts as one vector: averages of zero would move it to the origin.
        codes, counts = found.codebook, found.counts.clamp(min=1)
        counts = of_rank_0(counts) if synchronized else counts
    else:
        order = torch.rand(rows.shape[:2], generator=generator, device=rows.device).argsort(1)
        drawn = order[:, torch.arange(num_codes, device=rows.device) % rows.shape[1]]
        codes = rows.gather(1, drawn.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
        counts = codes.new_ones(codes.shape[:2])
    return of_rank_0(codes) if synchronized else codes, counts


def _global_rows(rows: Tensor, limit: int | None, synchronized: bool) -> tuple[Tensor, int]:
    """Rows [codebooks, N, D] of all ranks, at most `limit`, evenly spaced; and a seed that all ranks share."""
    seed = int(torch.randint(2**62, ()))
    counts = [rows.shape[1]]
    if synchronized:
        numbers = all_gather_ints([rows.shape[1], seed])
        counts, seed = [count for count, _ in numbers], numbers[0][1]
    total, rank = sum(counts), dist.get_rank() if len(counts) > 1 else 0
    if limit is not None and total > limit:
        starts = [sum(counts[:r]) for r in range(len(counts))]
        # Rows i * total // limit for i < limit, of which this rank takes those between its start and end.
        first = [-(-start * limit // total) for start in [*starts, total]]
        picked = torch.arange(first[rank], first[rank + 1], device=rows.device) * total // limit - starts[rank]
        rows, counts = rows[:, picked], [b - a for a, b in itertools.pairwise(first)]
    if len(counts) > 1 and sum(counts) > 0:
        rows = all_gather_rows(rows.transpose(0, 1).contiguous(), counts).transpose(0, 1)
    return rows, seed
