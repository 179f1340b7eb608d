# SPDX-License-Identifier: Apache-2.0
"""Every class and option of vector-quantize-pytorch, replaced by genperf.patch and trained beside the layer that was not."""

import copy

import pytest
import torch
import vqp_cases
from test_vqp_options import compare, label, run, upstream, weighted
from torch import Tensor, nn

import genperf
from genperf._patch.vector_quantize_pytorch import _CLASSES
from genperf.compat import vector_quantize_pytorch as compat

# Of the second, EMA and optimizer have changed the codes.
STEPS = 2

# They hold quantizers, which are replaced, and have nothing to gain themselves.
CONTAINERS = {"EvoLFQ", "Sequential"}


def made(case):
    torch.manual_seed(0)
    return case.make(upstream)


def tensors(layer):
    return {name: id(t) for name, t in [*layer.named_parameters(), *layer.named_buffers()]}


@pytest.mark.parametrize("case", [pytest.param(case, id=label(case)) for case in vqp_cases.CASES])
def test_patched_layer_trains_as_upstream(case):
    reference, layer = made(case), made(case)
    before, attributes, state = tensors(layer), {*vars(layer)}, torch.get_rng_state()
    report = genperf.patch(layer)
    assert not report.left
    assert report.replaced
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(layer, getattr(upstream, case.name))
    assert tensors(layer) == before
    assert layer.state_dict().keys() == reference.state_dict().keys()
    train(case, reference, layer)
    genperf.unpatch(layer)
    assert type(layer) is type(reference)
    assert {*vars(layer)} == attributes
    if not (case.fails or case.unequal):
        layer.load_state_dict(copy.deepcopy(reference.state_dict()))
        x = torch.randn(case.shape, generator=torch.Generator().manual_seed(3))
        compare(case, "after unpatch", *(run(case, each.eval(), 9, x) for each in (reference, layer)))


def train(case, reference, layer):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(case.shape, generator=generator)
    reference.load_state_dict(copy.deepcopy(layer.state_dict()))
    for step in range(STEPS):
        found = []
        for each in (reference, layer):
            if case.fails and each is reference:
                continue
            x = nn.Parameter(start.clone())
            results = run(case, each, step, x)
            differentiable = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            if differentiable:
                sum(weighted(t, step) for t in differentiable).backward()
            gradients = [p.grad for p in (x, *each.parameters())]
            with torch.no_grad():
                for p in each.parameters():
                    if p.grad is not None:
                        p.sub_(case.lr * p.grad)
            each.zero_grad()
            state = each.state_dict()
            found.append([*results, *gradients, *(state[name] for name in reference.state_dict())])
        if case.fails:
            continue
        if case.unequal:
            found = [[t.shape if isinstance(t, Tensor) else t for t in each if t is not None] for each in found]
        compare(case, f"step {step}", *found)


def test_every_class_is_known():
    known = {path.partition(".")[2] for path in _CLASSES}
    assert {*compat.__all__} - CONTAINERS <= known
