# SPDX-License-Identifier: Apache-2.0
"""Train quantizers with one process, two and three, and save their states, case by case.

python train_quantizers.py FOLDER

Every rank takes its share of each batch.

All numbers are small multiples of 1/4, whose sums are exact in any order: the results of several ranks must equal those of one
process bitwise, apart from the cases TO_ROUNDING.
"""

import sys

import torch
from forked_ranks import fork_ranks
from torch import distributed as dist
from torch import nn

from genperf.nn import LookupFreeQuantizer, ResidualVectorQuantizer, VectorQuantizer, _codebook_init, update_codebooks
from genperf.nn.lookup_free_quantizer import mean_entropies

WORLD, RANK = 1, 0
DECAY = 0.75  # sums of multiples of 1/4 stay exact for a few steps


def batch(seed, *shape):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)) / 4


def share(x, first=0.3):
    """This rank's rows of x; rank 0 has a share of `first`."""
    inner = torch.linspace(first, 1, WORLD).mul(len(x)).long().tolist() if WORLD > 1 else [len(x)]
    start, end = ([0, *inner][rank] for rank in (RANK, RANK + 1))
    return x[start:end]


def seeded(*arguments, **options):
    torch.manual_seed(1)
    layer = VectorQuantizer(*arguments, **options)
    with torch.no_grad():  # sums of the codes are exact as well
        layer.codebook.copy_(batch(2, *layer.codebook.shape))
        if layer.has_ema:
            layer.sums.copy_(layer.codebook)
    torch.manual_seed(RANK)  # random choices must be the same for different seeds of the ranks
    return layer


def state(*layers):
    return {f"{i}.{name}": value.clone() for i, layer in enumerate(layers) for name, value in layer.state_dict().items()}


class Collectives:
    """Counts the calls of all_reduce."""

    def __enter__(self):
        self.calls, self.original = 0, dist.all_reduce
        dist.all_reduce = self
        return self

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.original(*arguments, **options)

    def __exit__(self, *_):
        dist.all_reduce = self.original


def ema():
    layer = seeded(7, 3, decay=DECAY, channel_dim=1)
    with Collectives() as collectives:
        for step in range(3):
            layer(share(batch(step, 10, 3, 2, 2)))
    assert collectives.calls == (3 if WORLD > 1 else 0)
    return state(layer)


def heads_and_mask():
    separate = seeded(5, 4, decay=DECAY, heads=2, separate_codebooks=True, replace_dead_below=0.9)
    shared = seeded(5, 4, decay=DECAY, heads=2, replace_dead_below=0.9)
    for step in range(3):
        x, mask = batch(step, 10, 3, 4), batch(step + 50, 10, 3) > -1
        for layer in (separate, shared):
            layer(share(x), share(mask))
    return state(separate, shared)


def code_weights():
    layer = seeded(7, 3, decay=DECAY)
    for step in range(2):
        layer(share(batch(step, 10, 4, 3)), code_weights=lambda sums, counts: (counts > 4) * (sums[:, 0] > 0))
    return state(layer)


def kmeans_init():
    layers = [
        seeded(6, 3, decay=DECAY, init="kmeans"),
        seeded(6, 4, decay=DECAY, init="kmeans", heads=2, separate_codebooks=True),
    ]
    for step in range(2):
        x, mask = batch(step, 12, 5, 4), batch(step + 50, 12, 5) > -1
        layers[0](share(x[..., :3].contiguous()), share(mask))
        layers[1](share(x), share(mask))
    return state(*layers)


def cosine():
    """To rounding, since unit vectors have no exact sums."""
    layer = seeded(6, 3, decay=DECAY, init="kmeans", metric="cosine", replace_dead_below=0.5)
    for step in range(4):
        layer(share(batch(step, 12, 3)))
    return state(layer)


def kmeans_init_on_a_subset():
    _codebook_init.KMEANS_VECTORS, before = 4, _codebook_init.KMEANS_VECTORS
    layer = seeded(6, 3, init="kmeans")
    layer(share(batch(0, 100, 3)))
    _codebook_init.KMEANS_VECTORS = before
    return state(layer)


def data_init():
    layers = [seeded(6, 3, decay=DECAY, init="data"), seeded(30, 4, init="data", heads=2, separate_codebooks=True)]
    for step in range(2):
        x, mask = batch(step, 12, 3, 4), batch(step + 50, 12, 3) > 0
        layers[0](share(x[..., :3].contiguous()), share(mask))
        layers[1](share(x), share(mask))
    layers[0].init_codes(share(batch(9, 12, 3)))
    return state(*layers)


def dead_code_replacement():
    layers = [
        seeded(7, 3, decay=DECAY, replace_dead_below=2.0),
        seeded(40, 3, decay=DECAY, replace_dead_below=0.9),
        seeded(7, 3, replace_dead_below=2.0),
    ]
    with Collectives() as collectives:
        for step in range(5):
            for layer in layers:
                layer(share(10 + batch(step, 9, 3)))  # only one code is nearest to any vector
    assert collectives.calls == (2 * 5 * len(layers) if WORLD > 1 else 0)
    return state(*layers)


def accumulation():
    plain = nn.ModuleList(seeded(7, 3, decay=DECAY, update="accumulate") for _ in range(3))
    replacing = nn.ModuleList(
        [
            *plain,
            seeded(9, 2, decay=DECAY, update="accumulate", replace_dead_below=1.0),
            seeded(9, 4, update="accumulate", replace_dead_below=1.0),
        ]
    )
    unused = seeded(5, 3, decay=DECAY, update="accumulate", replace_dead_below=1.0)
    for layers, calls in ((plain, 1), (replacing, 2)):
        for step in range(2):
            for micro in range(3):
                for layer in layers:
                    layer(share(batch(3 * step + micro, 11, layer.dim)))
            with Collectives() as collectives:
                update_codebooks(nn.ModuleList([*layers, unused]) if layers is replacing else layers)
            assert collectives.calls == (calls if WORLD > 1 else 0)
    return state(*replacing, unused)


def rank_0_has_no_vectors():
    layers = [seeded(7, 3, decay=DECAY, replace_dead_below=1.0, init=init) for init in ("uniform", "data", "kmeans")]
    for step in range(3):
        for layer in layers:
            layer(share(batch(step, 8, 2, 3), first=0))
    return state(*layers)


def rank_0_is_masked():
    layers = [seeded(7, 3, decay=DECAY, replace_dead_below=1.0, init=init) for init in ("uniform", "data", "kmeans")]
    for step in range(3):
        x, mask = batch(step, 8, 2, 3), torch.arange(8) >= 3
        x[~mask] = float("nan")
        for layer in layers:
            layer(share(x, first=0.375), share(mask.unsqueeze(1).expand(8, 2), first=0.375))
    return state(*layers)


def rank_0_takes_no_step():
    layers = nn.ModuleList(
        [
            seeded(7, 3, decay=DECAY, replace_dead_below=1.0, update="accumulate"),
            seeded(7, 3, decay=DECAY, replace_dead_below=1.0, update="accumulate").bfloat16(),
            seeded(7, 3, decay=DECAY, replace_dead_below=1.0, update="accumulate").double(),
        ]
    )
    for step in range(3):
        for layer in layers:
            x = share(batch(step, 8, 3), first=0).to(layer.codebook.dtype)
            if len(x):
                layer(x)
            update_codebooks(layer)  # one by one: every rank must use the same dtype for each
    return state(*layers)


def no_rank_has_vectors():
    layer = seeded(7, 3, decay=DECAY, replace_dead_below=2.0, init="kmeans")
    before = state(layer)
    layer(share(batch(0, 8, 3)[:0]))
    layer(share(batch(0, 8, 3)), torch.zeros(len(share(batch(0, 8, 3))), dtype=torch.bool))
    after = state(layer)
    assert all(torch.equal(before[name], after[name]) for name in ("0.codebook", "0.counts", "0.sums"))
    layer(share(batch(0, 8, 3)))
    return state(layer)


def process_group_after_the_layer():
    for step in range(3):
        built_before_the_process_group(share(batch(step, 9, 3)))
    return state(built_before_the_process_group)


def compiled():
    layer = seeded(7, 3, decay=DECAY, replace_dead_below=1.0)
    step = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
    for seed in range(3):
        step(share(batch(seed, 9, 3)))
    return state(layer)


def behind_identity(layer):
    """The layer behind an identity with parameters, which DistributedDataParallel requires."""
    linear = nn.Linear(layer.dim, layer.dim, bias=False)
    nn.init.eye_(linear.weight)
    return nn.Sequential(linear, layer)


def parallel(model):
    return nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model


def learned_under_ddp():
    """To rounding, since gradients are divided."""
    model = behind_identity(seeded(12, 3, replace_dead_below=0.5, usage_decay=0.5))
    trained = parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = batch(step, 12, 3).unflatten(0, (WORLD, -1))[RANK]  # equal shares
        quantized, _, loss = trained(x)
        (loss + quantized.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def codes_loaded_on_rank_0():
    model = behind_identity(seeded(7, 3, decay=DECAY, init="kmeans", replace_dead_below=0.9))
    if RANK == 0:
        model.load_state_dict({name: value + 1 if name == "1.codebook" else value for name, value in model.state_dict().items()})
    trained = parallel(model)
    for step in range(2):
        trained(share(batch(step, 9, 3)))
    return state(model)


def lookup_free_under_ddp():
    """To rounding. The codebook entropy and its gradient are those of the global batch."""
    torch.manual_seed(1)
    model = LookupFreeQuantizer(4, 3, num_codebooks=2, inv_temperature=0.5, entropy_weight=1.0)
    trained = parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = batch(step, 12, 3).unflatten(0, (WORLD, -1))[RANK]  # equal shares
        quantized, _, loss = trained(x)
        (loss + quantized.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def entropy_without_vectors_on_rank_0():
    """To rounding."""
    x = share(batch(0, 10, 4), first=0).requires_grad_()
    mask = torch.ones(len(x), dtype=torch.bool)
    _, codebook = mean_entropies(x, 1, 1, 2.0, 4, None)
    _, masked = mean_entropies(x, 1, 1, 2.0, 4, mask)
    torch.autograd.grad(codebook + masked, x)
    return {"codebook": codebook.detach(), "masked": masked.detach()}


def residual():
    torch.manual_seed(1)
    options = {"quantizer_dropout": True, "init": "kmeans", "init_iterations": 3, "replace_dead_below": 0.9, "decay": DECAY}
    separate = ResidualVectorQuantizer(3, 7, 4, groups=2, **options)
    shared = ResidualVectorQuantizer(3, 7, 4, shared_codebook=True, **options)
    torch.manual_seed(0)
    for step in range(4):
        with Collectives() as collectives:
            for layer in (separate, shared):
                layer(share(batch(step, 40, 4), first=0.0 if step == 2 else 0.3))
        assert WORLD == 1 or step == 0 or collectives.calls == 4, "two for each layer: the number of vectors, and the statistics"
    return state(separate, shared)


EXACT = [
    ema,
    heads_and_mask,
    code_weights,
    kmeans_init,
    kmeans_init_on_a_subset,
    data_init,
    dead_code_replacement,
    accumulation,
    rank_0_has_no_vectors,
    rank_0_is_masked,
    rank_0_takes_no_step,
    no_rank_has_vectors,
    process_group_after_the_layer,
    compiled,
    codes_loaded_on_rank_0,
]
TO_ROUNDING = [cosine, learned_under_ddp, lookup_free_under_ddp, entropy_without_vectors_on_rank_0, residual]
CASES = {case.__name__: case for case in (*EXACT, *TO_ROUNDING)}


def train(world, rank):
    global WORLD, RANK
    WORLD, RANK = world, rank
    return {name: case() for name, case in CASES.items()}


if __name__ == "__main__":
    torch.compile(VectorQuantizer(2, 2, decay=DECAY, replace_dead_below=1.0), fullgraph=True, backend="eager")(torch.zeros(1, 2))
    built_before_the_process_group = seeded(7, 3, decay=DECAY, replace_dead_below=0.9)
    fork_ranks(train, sys.argv[1], (1, 2, 3))
