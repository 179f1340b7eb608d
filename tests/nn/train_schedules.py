# SPDX-License-Identifier: Apache-2.0
"""Run random training schedules of quantizers with one, two and three ranks, and save indices and states.

python train_schedules.py FOLDER

A schedule is a sequence of training steps, steps with vectors that are not finite, accumulated steps with one update, frozen steps
and evaluation. Every rank takes a random share of each batch, often none of it. Everything but the shares is the same for every
number of ranks, so the states must be those of one process on the joined batch: bitwise where all sums are exact (vectors of
multiples of 1/4), otherwise to rounding, in float64 so that no near tie is decided by it.
"""

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from forked_ranks import fork_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genperf.compat.vector_quantize_pytorch import ResidualVQ, VectorQuantize
from genperf.nn import ResidualVectorQuantizer, VectorQuantizer, update_codebooks

SCHEDULES, MOVES, DIM, LENGTH = 200, 4, 4, 3
WORLD, RANK = 1, 0


@dataclass
class Kind:
    """A family of layers."""

    make: Any  # random.Random -> layer
    exact: bool
    learns: bool = False  # by gradient


def native(rng, **options):
    heads, start = rng.choice([1, 2]), rng.choice(["uniform", "data", "kmeans"])
    options = {"replace_dead_below": rng.choice([0, 0.5, 2]), "init": start, "init_iterations": 3, **options}
    return VectorQuantizer(rng.choice([3, 9]), DIM, heads=heads, separate_codebooks=rng.random() < 0.5, **options)


def residual(rng):
    options = {"replace_dead_below": rng.choice([0, 0.5]), "init": rng.choice(["uniform", "kmeans"]), "init_iterations": 2}
    options |= {"groups": rng.choice([1, 2]), "shared_codebook": rng.random() < 0.3, "quantizer_dropout": rng.random() < 0.5}
    return ResidualVectorQuantizer(2, 5, DIM, decay=rng.choice([None, 0.75]), **options)


def drop_in(rng, **options):
    heads, size = rng.choice([1, 2]), rng.choice([3, 9])
    options = {"threshold_ema_dead_code": rng.choice([0, 0.5, 2]), "kmeans_init": rng.random() < 0.5, "kmeans_iters": 3, **options}
    return VectorQuantize(DIM, size, heads=heads, codebook_dim=DIM // heads, separate_codebook_per_head=rng.random() < 0.5, **options)


def residual_drop_in(rng):
    shared = rng.random() < 0.3
    options = {"threshold_ema_dead_code": rng.choice([0, 0.5]), "kmeans_init": rng.random() < 0.5, "kmeans_iters": 2}
    return ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=5, shared_codebook=shared, quantize_dropout=not shared, **options)


KINDS = {
    "VectorQuantizer": Kind(lambda rng: native(rng, decay=0.75), exact=True),
    "VectorQuantize": Kind(lambda rng: drop_in(rng, decay=0.75), exact=True),
    "VectorQuantizer, cosine": Kind(lambda rng: native(rng, decay=0.75, metric="cosine"), exact=False),
    "ResidualVectorQuantizer": Kind(residual, exact=False),
    "ResidualVQ": Kind(residual_drop_in, exact=False),
    "VectorQuantizer, learned": Kind(lambda rng: native(rng, usage_decay=0.75), exact=False, learns=True),
    "VectorQuantize, learned": Kind(
        lambda rng: drop_in(rng, learnable_codebook=True, ema_update=False, rotation_trick=False), exact=False, learns=True
    ),
}


def kind_of(schedule):
    return list(KINDS)[schedule % len(KINDS)]


class Model(nn.Module):
    """A quantizer behind an identity with parameters, which DistributedDataParallel requires."""

    def __init__(self, layer):
        super().__init__()
        self.encoder, self.layer = nn.Linear(DIM, DIM, bias=False), layer
        nn.init.eye_(self.encoder.weight)

    def forward(self, x, mask, update, seed) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoder(x)
        if isinstance(self.layer, VectorQuantizer | ResidualVectorQuantizer):
            quantized, indices, loss = self.layer(x, mask, update=update)
        else:
            options = {"mask": mask, "freeze_codebook": update == "none"}
            if isinstance(self.layer, VectorQuantize):
                options["accum_ema_update"] = update == "accumulate"
            else:
                options["rand_quantize_dropout_fixed_seed"] = seed
            quantized, indices, loss = self.layer(x, **options)
        return quantized, indices, loss.sum()


def batch(rng, exact, not_finite):
    """A global batch and its mask."""
    size = rng.choice([0, 1, 2, 5, 8, 12])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if exact:
        x = torch.randint(-8, 8, (size, LENGTH, DIM), generator=generator) / 4
    else:
        x = torch.randn(size, LENGTH, DIM, dtype=torch.float64, generator=generator) * 2
    mask = torch.rand(size, LENGTH, generator=generator) < rng.choice([0.5, 1.0])
    if not_finite:
        bad = torch.rand(size, LENGTH, generator=generator) < 0.3
        x[bad] = rng.choice([float("nan"), float("inf")])
    return x, mask


def share(schedule, move, size):
    """This rank's part of a batch."""
    rng = random.Random(f"{schedule} {move} {WORLD}")
    cuts = sorted(rng.choices(range(size + 1), k=WORLD - 1))
    return slice(*([0, *cuts, size][RANK : RANK + 2]))


def run(schedule):
    """The indices of all steps, by move, and the state at the end."""
    rng, kind = random.Random(schedule), KINDS[kind_of(schedule)]
    torch.manual_seed(schedule)
    model = Model(kind.make(rng)).to(torch.float32 if kind.exact else torch.float64)
    wrapped = rng.choice([False, True]) or kind.learns
    # Mostly without the broadcast of buffers, which would hide that they differ. A frozen codebook is an unused parameter.
    options = {"broadcast_buffers": rng.random() < 0.3, "find_unused_parameters": kind.learns}
    parallel = DistributedDataParallel(model, **options) if wrapped and WORLD > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1000 * RANK + schedule)  # random choices must be the same for different seeds of the ranks
    found = []
    for move in range(MOVES):
        name = rng.choices(["step", "not finite", "accumulate", "frozen", "evaluate"], [5, 2, 2, 1, 1])[0]
        parallel.train(name != "evaluate")
        update = {"accumulate": "accumulate", "frozen": "none"}.get(name, "step")
        for micro in range(2 if name == "accumulate" else 1):
            x, mask = batch(rng, kind.exact, name == "not finite")
            total, part = mask.sum(), share(schedule, 10 * move + micro, len(x))
            x, mask = x[part], mask[part]
            quantized, indices, loss = parallel(x, mask, update, move)
            found.append(indices)
            if wrapped and parallel.training:
                # DistributedDataParallel takes the mean over ranks: so weighted, it is the mean over the joined batch.
                weight = WORLD / total.clamp(min=1).to(x.dtype)
                (quantized.square().sum() * weight / DIM + loss * mask.sum() * weight).backward()
        if name == "accumulate":
            update_codebooks(parallel)
        if kind.learns and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
        optimizer.zero_grad()
    return {"indices": found, "state": model.state_dict()}


def work(world, rank):
    global WORLD, RANK
    WORLD, RANK = world, rank
    return [run(schedule) for schedule in range(SCHEDULES)]


if __name__ == "__main__":
    import genperf.nn._outside_compile  # before the ranks are forked: it loads torch._dynamo  # noqa: F401

    fork_ranks(work, sys.argv[1], (1, 2, 3))
