# SPDX-License-Identifier: Apache-2.0
"""Random sequences of what happens to a quantizer layer, against its documented rule in float64 after every move."""

import copy
import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from genperf.compat.vector_quantize_pytorch import VectorQuantize
from genperf.nn import ResidualVectorQuantizer, VectorQuantizer, update_codebooks

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule  # noqa: E402

CODES, DIM, DECAY, EPS = 6, 3, 0.8, 1e-5
SEEDS = st.integers(0, 2**16)


class Adapter:
    """The names and the training step of a layer; its codes and averages as [codebooks, K, D] and [codebooks, K]."""

    def __init__(self, make, names, step):
        self.make, self.names, self.step = make, names, step

    def state(self, layer):
        found = dict(layer.named_buffers())
        codebook, counts, sums = (found[name].detach() for name in self.names)
        return codebook.reshape(-1, CODES, DIM), counts.reshape(-1, CODES), sums.reshape(-1, CODES, DIM)


LAYERS = {
    "VectorQuantizer": Adapter(
        lambda: VectorQuantizer(CODES, DIM, decay=DECAY),
        ("codebook", "counts", "sums"),
        lambda layer, x, update: layer(x, update=update),
    ),
    "ResidualVectorQuantizer": Adapter(
        lambda: ResidualVectorQuantizer(2, CODES, DIM, decay=DECAY),
        ("codebook", "counts", "sums"),
        lambda layer, x, update: layer(x, update=update),
    ),
    "VectorQuantize": Adapter(
        lambda: VectorQuantize(DIM, CODES, decay=DECAY),
        ("_codebook.embed", "_codebook.cluster_size", "_codebook.embed_avg"),
        lambda layer, x, update: layer(x, accum_ema_update=update == "accumulate", freeze_codebook=update == "none"),
    ),
}


def smoothed(counts):
    total = counts.sum(-1, keepdim=True)
    return ((counts + EPS) / (total + CODES * EPS) * total).unsqueeze(-1)


class Sequence(RuleBasedStateMachine):
    adapter: Adapter

    @initialize(seed=SEEDS)
    def build(self, seed):
        torch.manual_seed(seed)
        self.layer = self.adapter.make()
        self.codes, self.counts, self.sums = (t.double() for t in self.adapter.state(self.layer))
        self.pending = None

    def vectors(self, seed, count, bad):
        x = torch.randn(1, count, DIM, generator=torch.Generator().manual_seed(seed)) * 2
        if bad:
            x[0, seed % count, seed % DIM] = [float("nan"), float("inf")][seed % 2]
        return x

    def gather(self, x, indices):
        """The documented statistics of a step, from the codes that it was quantized with."""
        residual, counts, sums = x.reshape(-1, DIM).double(), [], []
        finite = residual.isfinite().all(1)
        for codebook, found in zip(self.codes, indices.reshape(x.shape[1], -1).T, strict=True):
            one_hot = torch.nn.functional.one_hot(found[finite], CODES).double()
            counts.append(one_hot.sum(0))
            sums.append(one_hot.T @ residual[finite])
            residual = residual - codebook[found]
        batch = torch.stack(counts), torch.stack(sums)
        self.pending = batch if self.pending is None else (self.pending[0] + batch[0], self.pending[1] + batch[1])

    def average(self):
        if self.pending is None:
            return
        (counts, sums), self.pending = self.pending, None
        weight = (1 - DECAY) * (counts.sum(-1, keepdim=True) > 0).double()
        self.counts = torch.lerp(self.counts, counts, weight)
        self.sums = torch.lerp(self.sums, sums, weight.unsqueeze(-1))
        self.codes = self.sums / smoothed(self.counts)

    def train(self, x, update):
        return self.adapter.step(self.layer.train(), x, update)

    @rule(seed=SEEDS, count=st.integers(1, 40), bad=st.booleans())
    def step(self, seed, count, bad):
        x = self.vectors(seed, count, bad)
        self.gather(x, self.train(x, "step")[1])
        self.average()

    @rule(seed=SEEDS, count=st.integers(1, 40), reentrant=st.booleans())
    def checkpointed_step(self, seed, count, reentrant):
        x = self.vectors(seed, count, False).requires_grad_()
        quantized, indices, loss = checkpoint(self.train, x, "step", use_reentrant=reentrant)
        (quantized.square().sum() + loss.sum()).backward()
        self.gather(x.detach(), indices)
        self.average()

    @rule(seed=SEEDS, count=st.integers(1, 40))
    def accumulate(self, seed, count):
        x = self.vectors(seed, count, False)
        self.gather(x, self.train(x, "accumulate")[1])

    @rule()
    def update(self):
        update_codebooks(self.layer)
        self.average()

    @rule(seed=SEEDS)
    def frozen_step(self, seed):
        self.train(self.vectors(seed, 9, seed % 3 == 0), "none")

    @rule(seed=SEEDS)
    def evaluate(self, seed):
        self.layer.eval()(self.vectors(seed, 9, False))

    @rule()
    def copied(self):
        self.layer = copy.deepcopy(self.layer)

    @rule()
    def pickled(self):
        file = io.BytesIO()
        torch.save(self.layer, file)
        file.seek(0)
        self.layer = torch.load(file, weights_only=False)

    @rule(assign=st.booleans())
    def saved_and_loaded(self, assign):
        fresh = self.adapter.make()
        fresh.load_state_dict(copy.deepcopy(self.layer.state_dict()), assign=assign)
        self.layer = fresh

    @rule(strict=st.booleans())
    def loaded_without_what_waits(self, strict):
        state = {key: value for key, value in self.layer.state_dict().items() if "pending." not in key}
        self.layer.load_state_dict(copy.deepcopy(state), strict=strict)
        self.pending = None

    @rule()
    def cast_and_back(self):
        self.layer.double().float()

    @rule(seed=SEEDS)
    def set_from_outside(self, seed):
        codes = torch.randn(self.codes.shape, generator=torch.Generator().manual_seed(seed)) * 3
        codebook = dict(self.layer.named_buffers())[self.adapter.names[0]]
        codebook.copy_(codes.reshape(codebook.shape))
        self.codes, self.sums = codes.double(), codes.double() * smoothed(self.counts)

    @invariant()
    def follows_the_rule(self):
        if not hasattr(self, "codes"):
            return
        codes, counts, sums = self.adapter.state(self.layer)
        torch.testing.assert_close(codes.double(), self.codes, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(counts.double(), self.counts, rtol=1e-4, atol=1e-4)
        if (codes.double() - sums.double() / smoothed(counts.double())).abs().max() < 0.1:  # not set since the last update
            torch.testing.assert_close(sums.double(), self.sums, rtol=1e-3, atol=1e-3)
        # From here on by the same codes, so that no near tie is decided otherwise.
        self.codes = codes.double()


@pytest.mark.parametrize("name", LAYERS)
def test_sequences(name):
    machine = type(name, (Sequence,), {"adapter": LAYERS[name]})
    settings = hypothesis.settings(max_examples=40, stateful_step_count=12, deadline=None, derandomize=True, database=None)
    hypothesis.stateful.run_state_machine_as_test(machine, settings=settings)
