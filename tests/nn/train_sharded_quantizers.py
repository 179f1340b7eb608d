# SPDX-License-Identifier: Apache-2.0
"""Train quantizers under DistributedDataParallel and under FSDP2 with two and three ranks, and save losses and states.

python train_sharded_quantizers.py FOLDER

The codebooks are parameters that forward writes to. With three ranks, shards are uneven and one is empty.
"""

import sys

import pytest
import torch
import torch.distributed.checkpoint.state_dict as distributed_state
from forked_ranks import fork_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from genperf.compat.vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, VectorQuantize
from genperf.nn import ResidualVectorQuantizer, VectorQuantizer, update_codebooks

WORLD, RANK = 1, 0
DIM, STEPS = 4, 3
REPLACES = {"replace_dead_below": 0.9, "usage_decay": 0.5}
LEARNABLE = {"learnable_codebook": True, "ema_update": False, "kmeans_init": True, "rotation_trick": False}


class Network(nn.Module):
    """A quantizer between two linear layers."""

    def __init__(self, make, reentrant=None):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.quantizer, self.decoder = nn.Linear(DIM, DIM), make(), nn.Linear(DIM, DIM)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.encoder(x)
        outputs = self.quantizer(h) if self.reentrant is None else checkpoint(self.quantizer, h, use_reentrant=self.reentrant)
        return self.decoder(outputs[0]), outputs[2].sum()


def each_layer(network, **options):
    for module in (network.encoder, network.quantizer, network.decoder):
        fully_shard(module, **options)
    return fully_shard(network, **options)


def whole_network(network, **options):
    """The parameters stay gathered from forward to backward."""
    return fully_shard(network, **options)


def whole_network_resharded(network):
    return fully_shard(network, reshard_after_forward=True)


def one_group(network):
    fully_shard([network.encoder, network.quantizer])
    return fully_shard(network)


def hybrid(network):
    """Shards of one rank, replicated on all."""
    fully_shard(network.quantizer, mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicas", "shards")))
    return fully_shard(network)


def by_channel(network):
    fully_shard(network.quantizer, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    return fully_shard(network)


# The layer, how it is sharded, and options of the network.
CASES = {
    "kmeans": (lambda: VectorQuantizer(7, DIM, init="kmeans"), each_layer, {}),
    "cosine": (lambda: VectorQuantizer(7, DIM, init="data", metric="cosine", **REPLACES), whole_network, {}),
    "replacement": (lambda: VectorQuantizer(17, DIM, **REPLACES), each_layer, {}),
    "replacement, resharded": (lambda: VectorQuantizer(17, DIM, **REPLACES), whole_network_resharded, {}),
    "replacement, group": (lambda: VectorQuantizer(17, DIM, **REPLACES), one_group, {}),
    "EMA and orthogonal loss": (lambda: VectorQuantizer(7, DIM, decay=0.9, orthogonal_weight=0.1), each_layer, {}),
    "EMA and orthogonal loss, hybrid": (lambda: VectorQuantizer(7, DIM, decay=0.9, orthogonal_weight=0.1), hybrid, {}),
    "separate heads": (lambda: VectorQuantizer(7, DIM, heads=2, separate_codebooks=True, init="kmeans", **REPLACES), each_layer, {}),
    "by channel": (lambda: VectorQuantizer(7, DIM, code_dim=6, init="kmeans", **REPLACES), by_channel, {}),
    "accumulate": (lambda: VectorQuantizer(17, DIM, update="accumulate", **REPLACES), each_layer, {}),
    "checkpointed": (lambda: VectorQuantizer(17, DIM, init="kmeans", **REPLACES), each_layer, {"reentrant": False}),
    "checkpointed, reentrant": (lambda: VectorQuantizer(17, DIM, init="kmeans", **REPLACES), each_layer, {"reentrant": True}),
    "residual": (lambda: ResidualVectorQuantizer(3, 7, DIM, init="kmeans", **REPLACES), each_layer, {}),
    "residual, accumulate": (lambda: ResidualVectorQuantizer(3, 7, DIM, groups=2, update="accumulate", **REPLACES), whole_network, {}),
    "residual, shared": (
        lambda: ResidualVectorQuantizer(3, 7, DIM, shared_codebook=True, update="accumulate", **REPLACES),
        each_layer,
        {},
    ),
    "VectorQuantize": (lambda: VectorQuantize(DIM, 7, threshold_ema_dead_code=2, **LEARNABLE), whole_network, {}),
    "VectorQuantize, orthogonal": (
        lambda: VectorQuantize(DIM, 7, heads=2, separate_codebook_per_head=True, codebook_dim=3, orthogonal_reg_weight=0.1),
        each_layer,
        {},
    ),
    "VectorQuantize, cosine": (
        lambda: VectorQuantize(DIM, 7, use_cosine_sim=True, kmeans_init=True, orthogonal_reg_weight=0.1),
        each_layer,
        {"reentrant": False},
    ),
    "ResidualVQ": (
        lambda: ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=7, threshold_ema_dead_code=2, **LEARNABLE),
        each_layer,
        {},
    ),
    "ResidualVQ, shared": (
        lambda: ResidualVQ(
            dim=DIM, num_quantizers=2, codebook_size=7, shared_codebook=True, orthogonal_reg_weight=0.1, threshold_ema_dead_code=2
        ),
        whole_network,
        {},
    ),
    "GroupedResidualVQ": (
        lambda: GroupedResidualVQ(dim=DIM, groups=2, num_quantizers=2, codebook_size=5, kmeans_init=True, orthogonal_reg_weight=0.1),
        each_layer,
        {},
    ),
}


def runs(case, world):
    """Whether FSDP2 supports a case: another dimension than the first must be divisible by the number of ranks."""
    return CASES[case][1] is not by_channel or world == 2


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def state(model):
    return {name.removeprefix("module."): whole(t).detach().clone() for name, t in model.state_dict().items()}


def batch(seed):
    """This rank's share of a batch."""
    return (3 + 2 * torch.randn(24, DIM, generator=torch.Generator().manual_seed(seed)))[RANK::WORLD].contiguous()


def train(make, parallel, **options):
    """The loss of each step; the state after the last but one, and after the forward pass of the last."""
    torch.manual_seed(0)
    network = Network(make, **options)
    accumulates = getattr(network.quantizer, "update", "step") == "accumulate"
    model = parallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(RANK)
    losses = []
    for step in range(STEPS):
        for micro in range(1 + accumulates):
            output, loss = model(batch(10 * step + micro))
            (output.square().mean() + loss).backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if accumulates:
            update_codebooks(model)
    trained = state(model)
    model(batch(99))
    return {"losses": torch.stack(losses), "trained": trained, "after forward": state(model)}


def mixed_precision():
    """Codes gathered in half precision: those that a step does not write keep their float32 values."""
    network = Network(lambda: VectorQuantizer(17, DIM, **REPLACES))
    each_layer(network, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    before = whole(network.quantizer.codebook).detach()
    network(batch(0))
    after = whole(network.quantizer.codebook).detach()
    changed = (after != before).any(1)
    return {"changed": changed, "float32": (before != before.bfloat16()).any(1), "dtype": after.dtype == torch.float32}


def methods():
    """What is called outside of forward."""
    network = each_layer(Network(lambda: VectorQuantizer(7, DIM, init="data")))
    layer, codes = network.quantizer, torch.arange(7.0 * DIM).view(7, DIM)
    for name, argument in (("encode", batch(0)), ("decode", torch.arange(3)), ("forward", batch(0))):
        with pytest.raises(RuntimeError, match=r"the codebook must be whole, got a DTensor .*Shard\(dim=0\)"):
            getattr(layer, name)(argument)
    layer.init_codes(batch(0))
    initial = whole(layer.codebook).detach()
    layer.set_codes(codes)
    assert torch.equal(whole(layer.codebook), codes)
    register_fsdp_forward_method(layer, "encode")
    register_fsdp_forward_method(layer, "decode")
    assert torch.equal(layer.decode(layer.encode(codes)), codes)
    drop_in = fully_shard(VectorQuantize(DIM, 7, **LEARNABLE))
    drop_in.codebook = codes
    assert torch.equal(whole(drop_in._codebook.embed), codes.unsqueeze(0))
    with pytest.raises(RuntimeError, match="get_codes_from_indices: the codebook must be whole"):
        drop_in.get_codes_from_indices(torch.arange(3))
    with pytest.raises(RuntimeError, match=r"codebook: the codebook must be whole"):
        _ = drop_in.codebook
    network = whole_network(Network(lambda: VectorQuantizer(17, DIM, **REPLACES)))  # it holds what FSDP2 keeps of its layers
    inner = network.quantizer
    before = whole(inner.codebook).detach()
    given = {name: whole(t).detach().clone() for name, t in inner.state_dict().items()}
    given["codebook"].requires_grad_()
    torch.func.functional_call(inner, given, (batch(0),))
    assert torch.equal(whole(inner.codebook), before)
    assert not torch.equal(given["codebook"], before)
    return {"initial": initial, "batch": torch.cat([batch(0), codes])}


def loaded():
    """A checkpoint in sharded layers whose codes data would set."""
    make = lambda: VectorQuantizer(7, DIM, init="kmeans", decay=0.9, orthogonal_weight=0.1)  # noqa: E731
    first = each_layer(Network(make))
    first(batch(0))
    full = distributed_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    saved = distributed_state.get_model_state_dict(first, options=full)
    second, codes = each_layer(Network(make)), whole(first.quantizer.codebook).detach()
    distributed_state.set_model_state_dict(second, saved, options=full)
    third = each_layer(Network(make))
    third.load_state_dict({name: t for name, t in first.state_dict().items() if not name.endswith(("counts", "sums"))}, strict=False)
    averages = third.quantizer.sums.clone()
    found = {"codes": codes, "averages": averages}
    for name, network in (("second", second), ("third", third)):
        network.quantizer.update = "none"
        network(batch(1))
        found[name] = whole(network.quantizer.codebook).detach()
    return found


def ignored():
    """A codebook that is left out is written as usual."""
    network = Network(lambda: VectorQuantizer(17, DIM, **REPLACES))
    before = network.quantizer.codebook.detach().clone()
    fully_shard(network, ignored_params={network.quantizer.codebook})
    network(batch(0))
    assert not torch.equal(network.quantizer.codebook, before)
    return {"codebook": network.quantizer.codebook.detach()}


def flattened():
    """FullyShardedDataParallel, the first FSDP: a codebook that forward writes to must be left out."""
    for original in (True, False):
        network = Network(lambda: VectorQuantizer(17, DIM, **REPLACES))
        with pytest.raises(RuntimeError, match=r"cannot be written to a codebook that FullyShardedDataParallel flattens, got codebook of"):
            FullyShardedDataParallel(network, use_orig_params=original, device_id=torch.device("cpu"))(batch(0))
    network = Network(lambda: VectorQuantizer(17, DIM, **REPLACES))
    before, codebook = network.quantizer.codebook.detach().clone(), network.quantizer.codebook
    FullyShardedDataParallel(network, ignored_states=[codebook], device_id=torch.device("cpu"))(batch(0))
    assert not torch.equal(codebook, before)
    return {"codebook": codebook.detach()}


OTHERS = [mixed_precision, methods, loaded, ignored, flattened]


def work(world, rank):
    global WORLD, RANK
    WORLD, RANK = world, rank
    results = {other.__name__: other() for other in OTHERS}
    for name, (make, shard, options) in CASES.items():
        parallel = {"DDP": DistributedDataParallel, "FSDP2": shard}
        if runs(name, world):
            results[name] = {kind: train(make, wrap, **options) for kind, wrap in parallel.items()}
    return results


if __name__ == "__main__":
    import genperf.nn._outside_compile  # before the ranks are forked: it loads torch._dynamo  # noqa: F401

    fork_ranks(work, sys.argv[1], (2, 3))
