# SPDX-License-Identifier: Apache-2.0
"""k-means of one and of several ranks, which test_kmeans_distributed.py compares.

Usage: cluster_in_ranks.py FOLDER. A rank saves [name, result, ...] as FOLDER/WORLD-RANK.pt, and the ranks of one world together identifiers
of vectors in a file as FOLDER/WORLD.npz.
"""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import genperf
from genperf.cli.main import main

sys.path.append(str(Path(__file__).parents[1] / "nn"))
from forked_ranks import fork_ranks

COUNT, CODES, DIM = 600, 24, 5


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(CODES, DIM, generator=generator)
    x = centers[torch.randint(CODES, (COUNT,), generator=generator)] + torch.randn(COUNT, DIM, generator=generator)
    x[::7] *= 100  # sums in another order would differ
    return x.to(dtype)


def share(t: Tensor, world: int, rank: int) -> Tensor:
    """This rank's part, the first rank's the smaller one; with three ranks, the second has none."""
    bounds = {1: [0, COUNT], 2: [0, 217, COUNT], 3: [0, 217, 217, COUNT]}[world]
    return t[bounds[rank] : bounds[rank + 1]]


def command(world: int) -> str:
    """Run `genperf kmeans` in this rank, with a number of vectors that the number of ranks does not divide; returns what it printed."""
    folder, sizes = sys.argv[1], ("--codes", "8", "--stages", "2", "--iterations", "3", "--metric", "cosine", "--device", "cpu")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["kmeans", f"{folder}/x.npy", "--weights", f"{folder}/weights.npy", "--out", f"{folder}/{world}.npz", *sizes])
    return printed.getvalue() if code == 0 else f"exit code {code}"


def work(world: int, rank: int) -> dict[str, Any]:
    x, weights = vectors(), torch.rand(COUNT, generator=torch.Generator().manual_seed(1))
    mine, share_of_weights = share(x, world, rank), share(weights, world, rank)
    far = x[:CODES].clone()
    far[5:] = 1e6  # empty codes
    cases: dict[str, dict[str, Any]] = {
        "lloyd": {},
        "cosine": {"metric": "cosine"},
        "random, weights": {"init": "random", "weights": share_of_weights},
        "weights": {"weights": share_of_weights, "n_init": 2},
        "empty codes": {"init": far},
        "ema": {"update": "ema", "batch_size": 128},
        "balance": {"balance": 1.05, "metric": "cosine"},
        "balance, weights": {"balance": 1.1, "weights": share_of_weights},
        "balance, ema": {"balance": 1.05, "update": "ema", "batch_size": 128},
    }
    found: dict[str, Any] = {"printed": command(world)}
    for name, options in cases.items():
        # The numbers of rank 0 count.
        options |= {"iterations": 6, "synchronized": True, "generator": torch.Generator().manual_seed(5 + rank)}
        found[name] = list(genperf.kmeans(mine, CODES, **options))
    # Numbers of 53 bits, whose sums in another order differ in the last ones.
    wide = share(torch.randn(COUNT, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), world, rank)
    options = {"iterations": 6, "init": "random", "synchronized": True, "generator": torch.Generator().manual_seed(5)}
    for metric in ("euclidean", "cosine"):
        found[f"float64, {metric}"] = list(genperf.kmeans(wide, CODES, metric=metric, weights=share_of_weights, **options))
    half = share(vectors(torch.bfloat16), world, rank)
    options = {"iterations": 3, "synchronized": True, "generator": torch.Generator().manual_seed(5)}
    found["residual"] = list(genperf.residual_kmeans(half, CODES, 3, **options))
    broken = mine.clone()
    broken[:1] = torch.nan if rank == world - 1 else broken[:1]
    try:
        genperf.kmeans(broken, CODES, synchronized=True)
    except ValueError:
        found["not finite on the last rank"] = []
    return found


if __name__ == "__main__":
    np.save(f"{sys.argv[1]}/x.npy", vectors()[1:].numpy())
    np.save(f"{sys.argv[1]}/weights.npy", np.arange(COUNT - 1) % 5)
    fork_ranks(work, sys.argv[1], [1, 2, 3])
