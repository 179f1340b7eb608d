# SPDX-License-Identifier: Apache-2.0
"""Compare a model that genperf.patch has changed with one that it has not."""

import copy
import pickle

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

import genperf
from genperf._patch.swap import joined_class


def assert_patch_keeps(make, call, *shapes, replaced, seed=0):
    """Outputs, gradients, buffers and random numbers of `call(model, *inputs)`, in evaluation and in training; indices exactly.

    Args:
        make: a function that makes the model.
        shapes: of the inputs.
        replaced: the classes of the replaced modules, as a set.
    """
    reference, model = (seeded(make, seed) for _ in range(2))
    tensors = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    report = genperf.patch(model)
    assert {row.cls for row in report.replaced} == replaced
    assert report.left == []
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert model.state_dict().keys() == reference.state_dict().keys()
    for training in (False, True):
        assert_near(*(results(each.train(training), call, shapes) for each in (model, reference)))
    assert_near([*model.state_dict().values()], [*reference.state_dict().values()])
    other = copy.deepcopy(model) if any(map(is_parametrized, model.modules())) else pickle.loads(pickle.dumps(model))
    assert_near(*(results(each.eval(), call, shapes) for each in (other, reference)))
    genperf.unpatch(model)
    assert all(joined_class(type(module)) is None for module in model.modules())
    assert [type(module).__qualname__ for module in model.modules()] == [type(module).__qualname__ for module in reference.modules()]


def seeded(make, seed):
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            # Codes that constructors leave at zero, or close to it.
            for name in ("embed", "embed_sum", "embedding_sum", "codevectors"):
                if name in module._buffers or name in module._parameters:
                    getattr(module, name).normal_()
            if isinstance(module, torch.nn.Embedding):
                module.weight.normal_()
    return model


def results(model, call, shapes):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    torch.manual_seed(2)
    outputs = [t for t in tree_leaves(call(model, *inputs)) if isinstance(t, Tensor)]
    after = torch.rand(1)  # as many random numbers were drawn
    differentiable = [t.float().square().sum() for t in outputs if t.requires_grad]
    if not differentiable:
        return [*outputs, after]
    sources = [*inputs, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(sum(differentiable), sources, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None), after]


def assert_near(found, expected):
    """Within 1e-5 of the largest value: a gradient can be a small difference of large ones."""
    assert len(found) == len(expected)
    largest = max((t.abs().max().item() for t in expected if t.is_floating_point() and t.numel()), default=0)
    for value, reference in zip(found, expected, strict=True):
        atol = 1e-5 * max(1, largest) if reference.is_floating_point() else 0
        torch.testing.assert_close(value, reference, rtol=0, atol=atol)
