# SPDX-License-Identifier: Apache-2.0
"""genperf.patch and genperf.unpatch on models with the quantizers of vector-quantize-pytorch."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import genperf
from genperf._patch.registry import find

upstream = pytest.importorskip("vector_quantize_pytorch")


class Model(nn.Module):
    """A network between two quantizers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.first = upstream.VectorQuantize(8, 16)
        self.rest = nn.ModuleDict(
            {"rvq": upstream.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16), "fsq": upstream.FSQ([5, 5], dim=8)}
        )

    def forward(self, x):
        x, _, loss = self.first(self.encoder(x))
        x, _, losses = self.rest["rvq"](x)
        return self.rest["fsq"](x)[0], loss + losses.sum()


def model():
    torch.manual_seed(0)
    return Model()


def batch():
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))


def step(net, optimizer):
    optimizer.zero_grad()
    quantized, loss = net(batch())
    (quantized.square().sum() + loss).backward()
    optimizer.step()
    return quantized


def assert_same_training(net, reference, steps=2):
    """Outputs, gradients through Adam, and states."""
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (net, reference)]
    for _ in range(steps):
        found, expected = (step(each, optimizer) for each, optimizer in zip((net, reference), optimizers, strict=True))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(net.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


def is_patched(layer):
    return find(layer) is not None and "genperf" in {base.__module__.partition(".")[0] for base in type(layer).__mro__}


def test_report():
    net = model()
    report = genperf.patch(net)
    assert [(row.name, row.cls) for row in report.replaced] == [
        ("first", "VectorQuantize"),
        ("rest.rvq", "ResidualVQ"),
        ("rest.rvq.layers.0", "VectorQuantize"),
        ("rest.rvq.layers.1", "VectorQuantize"),
        ("rest.fsq", "FSQ"),
    ]
    assert report.left == []
    assert "rest.rvq.layers.* (2)  VectorQuantize  replaced by compat.vector_quantize_pytorch.VectorQuantize" in str(report)
    assert {row.reason for row in genperf.patch(net).left} == {"it is replaced already"}
    assert str(genperf.patch(nn.Linear(2, 2))) == "no quantizer found"


def test_dry_run_changes_nothing():
    net = model()
    before = {name: (type(module), {*vars(module)}) for name, module in net.named_modules()}
    report = genperf.patch(net, dry_run=True)
    assert before == {name: (type(module), {*vars(module)}) for name, module in net.named_modules()}
    assert "first " in str(report)
    assert "would be replaced" in str(report)
    assert report.replaced == genperf.patch(net).replaced


def test_training_equals_that_of_the_model_without_patch():
    net = model()
    genperf.patch(net)
    assert_same_training(net, model())


def test_a_patch_between_two_steps():
    """The optimizer's state, hooks and an EMA copy from before stay valid."""
    net, reference = model(), model()
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (net, reference)]
    average = torch.optim.swa_utils.AveragedModel(net)
    calls = []
    net.first.register_forward_hook(lambda layer, inputs, outputs: calls.append(type(layer).__name__))
    step(net, optimizers[0])
    step(reference, optimizers[1])
    genperf.patch(net)
    assert isinstance(net.first, upstream.VectorQuantize)
    for _ in range(2):
        found, expected = (step(each, optimizer) for each, optimizer in zip((net, reference), optimizers, strict=True))
        torch.testing.assert_close(found, expected)
    average.update_parameters(net)
    torch.testing.assert_close(average.module.encoder.weight, net.encoder.weight)
    assert calls == ["VectorQuantize"] * 3


def test_copies_and_pickles_are_patched():
    net = model()
    genperf.patch(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert is_patched(other.first)
        assert_same_training(other, model(), steps=1)
        assert genperf.unpatch(other) == ["first", "rest.rvq", "rest.rvq.layers.0", "rest.rvq.layers.1", "rest.fsq"]
        assert type(other.first) is upstream.VectorQuantize


def test_unpatch_restores_and_keeps_options_set_since():
    net, reference = model(), model()
    genperf.patch(net)
    for each in (net, reference):
        each.first.commitment_weight = 0.5
        each.first._codebook.decay = 0.5
    genperf.unpatch(net)
    for (name, module), other in zip(net.named_modules(), reference.modules(), strict=True):
        assert type(module) is type(other), name
        assert {*vars(module)} == {*vars(other)}, name
    assert net.first.commitment_weight == 0.5
    assert net.first._codebook.decay == 0.5
    assert_same_training(net, reference)
    assert genperf.unpatch(net) == []


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("first", ["first"]),
        ("rest", ["rest.rvq", "rest.rvq.layers.0", "rest.rvq.layers.1", "rest.fsq"]),
        (["first", "rest.*.layers.1"], ["first", "rest.rvq.layers.1"]),
        (lambda name, module: isinstance(module, upstream.FSQ), ["rest.fsq"]),
    ],
)
def test_only(only, expected):
    net = model()
    assert [row.name for row in genperf.patch(net, only=only).replaced] == expected
    assert {row.name for row in genperf.patch(net).left} == {*expected}  # they are replaced already
    assert len(genperf.unpatch(net)) == 5


def test_a_shared_codebook_is_replaced_once():
    torch.manual_seed(0)
    rvq = upstream.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, shared_codebook=True)
    genperf.patch(rvq)
    first, second = rvq.layers
    assert first._codebook is second._codebook
    genperf.unpatch(rvq)
    assert type(first._codebook) is type(upstream.VectorQuantize(8, 16)._codebook)


class OwnForward(upstream.VectorQuantize):
    def forward(self, x):
        return super().forward(x)


class HomeMadeQuantizer(nn.Module):
    def forward(self, x):
        return x.round()


def test_what_is_left_and_why():
    wrapped, older = upstream.FSQ([5, 5]), upstream.VectorQuantize(8, 16)
    wrapped.forward = wrapped.forward
    del older._codebook.use_ddp
    net = nn.ModuleList([OwnForward(8, 16), HomeMadeQuantizer(), wrapped, older])
    report = genperf.patch(net)
    assert report.replaced == []
    assert dict((row.name, row.reason) for row in report.left) == {
        "0": "a class derived from VectorQuantize overrides forward",
        "1": "genperf does not know this class",
        "2": "its forward is set on the instance, as hooks of accelerate do; patch the model before",
        "3": "this version of the class has other attributes ('Codebook' object has no attribute 'use_ddp')",
    }


def test_a_derived_class_without_methods_of_its_own():
    torch.manual_seed(0)
    layer = type("Mine", (upstream.VectorQuantize,), {})(8, 16)
    assert genperf.patch(layer).replaced
    assert type(layer).__name__ == "Mine"


def test_an_error_changes_nothing():
    def only(name, module):
        if name == "rest.fsq":
            raise KeyError(name)
        return True

    net = model()
    with pytest.raises(KeyError, match=r"rest\.fsq"):
        genperf.patch(net, only=only)
    assert not is_patched(net.first)


def test_on_the_meta_device():
    """A state dict that is loaded later tells whether codes are initialized."""
    layers = [upstream.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16)]
    with torch.device("meta"):
        layers.append(upstream.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16))
    assert genperf.patch(layers[1]).left == []
    layers[1].to_empty(device="cpu").load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(*(layer.eval()(x)[0] for layer in layers))


def test_errors():
    with pytest.raises(TypeError, match=r"patch: model must be a torch.nn.Module, got int\."):
        genperf.patch(3)
    with pytest.raises(TypeError, match=r"unpatch: model must be a torch.nn.Module, got int\."):
        genperf.unpatch(3)
    with pytest.raises(ValueError, match="only names no module of the model, got 'second'"):
        genperf.patch(model(), only=["first", "second"])
    with pytest.raises(ValueError, match="the model is compiled, and would run the code of before; patch it before"):
        genperf.patch(torch.compile(model(), backend="eager"))
    compiled = model()
    compiled.rest["fsq"].compile(backend="eager")
    with pytest.raises(ValueError, match=r"the model's rest\.fsq is compiled"):
        genperf.patch(compiled)
    assert not is_patched(compiled.first)
    with pytest.raises(ValueError, match="is scripted, so its code cannot be replaced; patch it before"):
        genperf.patch(torch.jit.script(nn.Linear(2, 2)))


def test_a_traced_model():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return True

    net = nn.Sequential(nn.Linear(4, 2), upstream.FSQ([5, 5]))
    traced = torch.fx.GraphModule(net, Tracer().trace(net))
    with pytest.raises(ValueError, match="is traced, so its code cannot be replaced; patch it before tracing"):
        genperf.patch(traced)


def test_compile_after_patch():
    layer, reference = model().first.eval(), model().first.eval()
    genperf.patch(layer)
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], reference(x)[0])


def test_a_parametrized_layer():
    net, reference = model(), model()
    for each in (net, reference):
        nn.utils.parametrizations.weight_norm(each.rest["fsq"].project_in)
        nn.utils.parametrizations.weight_norm(each.encoder)
    genperf.patch(net)
    assert is_patched(net.rest["fsq"])
    assert_same_training(net, reference)
    genperf.unpatch(net)
    assert parametrize.is_parametrized(net.encoder)
    assert_same_training(net, reference)


def test_a_replica_of_data_parallel():
    """DataParallel copies the attributes of a module; methods bound to it would use its tensors in the copies."""
    net = model()
    genperf.patch(net)
    replica = net.first._replicate_for_data_parallel()
    assert is_patched(replica)
    assert replica.forward.__self__ is replica


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp():
    net, reference = model(), model()
    wrapped = DistributedDataParallel(net)
    assert genperf.patch(wrapped).replaced[0].name == "module.first"
    assert_same_training(net, reference, steps=1)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (wrapped, reference)]
    torch.testing.assert_close(*(step(each, optimizer) for each, optimizer in zip((wrapped, reference), optimizers, strict=True)))


@pytest.mark.usefixtures("one_rank")
def test_fully_shard():
    """Before and after patch; unpatch cannot undo the class that fully_shard makes."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    net, reference = (
        nn.Sequential(nn.Linear(6, 8), upstream.FSQ([5, 5], dim=8)),
        nn.Sequential(nn.Linear(6, 8), upstream.FSQ([5, 5], dim=8)),
    )
    reference.load_state_dict(net.state_dict())
    fully_shard(net[1], mesh=mesh)
    genperf.patch(net)
    fully_shard(net, mesh=mesh)
    assert is_patched(net[1])
    torch.testing.assert_close(net(batch())[0], reference(batch())[0])
    genperf.unpatch(net)

    genperf.patch(reference)
    fully_shard(reference[1], mesh=mesh)
    with pytest.raises(ValueError, match=r"unpatch: 1 was sharded or parametrized after patch; undo that first\."):
        genperf.unpatch(reference)
    assert is_patched(reference[1])
