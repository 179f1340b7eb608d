# SPDX-License-Identifier: Apache-2.0
"""Quantizer dropout of the residual quantizers: a training step runs only the first quantizers, a random number of them."""

import random

import torch

from ..._distributed import all_reduce_sum, world_size


def common_seed() -> int:
    """A seed from torch's default generator, the same on all ranks."""
    seed = torch.randint(0, 10_000, ())
    return int(all_reduce_sum(seed) if world_size() > 1 else seed)


def quantizers_to_run(num_quantizers: int, cutoff_index: int, multiple: int, seed: int | None) -> int:
    """A random number of quantizers above `cutoff_index`, rounded up to a multiple; the same on all ranks."""
    last = random.Random(common_seed() if seed is None else seed).randrange(cutoff_index, num_quantizers)
    return min(-(-(last + 1) // multiple) * multiple, num_quantizers)
