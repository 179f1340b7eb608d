# SPDX-License-Identifier: Apache-2.0
"""Every class and option of vector-quantize-pytorch, trained beside upstream for 20 steps."""

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch
import vqp_cases
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from genperf.compat import vector_quantize_pytorch as compat

upstream = pytest.importorskip("vector_quantize_pytorch")

STEPS = 20
CLASSES = [name for name, value in vars(upstream).items() if inspect.isclass(value)]
SUBMODULES = [module.name for module in pkgutil.iter_modules(upstream.__path__)]


def label(case):
    options = case.options if isinstance(case.options, dict) else case.options_of(compat)
    return "-".join([case.name, *options, *case.call_of(0)])


@pytest.mark.parametrize("case", [pytest.param(case, id=label(case)) for case in vqp_cases.CASES])
def test_training_matches_upstream(case):
    layers = []
    for library in (upstream, compat):
        torch.manual_seed(0)
        layers.append(case.make(library))
    reference, layer = layers
    shapes = [{name: (t.shape, t.dtype) for name, t in each.state_dict().items()} for each in layers]
    assert shapes[0] == shapes[1]
    layer.load_state_dict(copy.deepcopy(reference.state_dict()))
    train(case, reference, layer)
    if not case.fails:
        reference.load_state_dict(copy.deepcopy(layer.state_dict()))
    for each in layers:
        each.eval()
    x = torch.randn(case.shape)
    results = [run(case, each, STEPS, x) for each in (layers[1:] if case.fails else layers)]
    if not (case.unequal or case.fails):
        compare(case, "evaluation", *results)


def train(case, reference, layer):
    """Train both with SGD, and compare outputs, gradients and states in each step."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(case.shape, generator=generator)
    inputs = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [torch.optim.SGD([x, *each.parameters()], lr=case.lr) for x, each in zip(inputs, (reference, layer), strict=True)]
    for step in range(STEPS):
        found = []
        for each, x, optimizer in zip((reference, layer), inputs, optimizers, strict=True):
            optimizer.zero_grad()
            if case.fails and each is reference:
                with pytest.raises(case.fails):
                    run(case, each, step, x)
                continue
            results = run(case, each, step, x)
            differentiable = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            if differentiable:
                sum(weighted(t, step) for t in differentiable).backward()
                optimizer.step()
            gradients = [p.grad for p in (x, *each.parameters())]
            state = each.state_dict()  # of genperf also with the statistics of steps that wait for an update
            found.append([*results, *gradients, *(state[name] for name in reference.state_dict())])
        if case.fails:
            continue
        if case.unequal:
            found = [[t.shape if isinstance(t, Tensor) else t for t in each if t is not None] for each in found]
        compare(case, f"step {step}", *found)


def run(case, layer, step, x):
    """The tensors and other leaves of a call; the same random numbers for upstream and genperf."""
    torch.manual_seed(step)
    return tree_leaves(layer(x, **case.call_of(step)))


def weighted(t, step):
    """A loss that depends on each element of an output."""
    if t.dim() == 0:
        return t
    target = torch.randn(t.shape, generator=torch.Generator().manual_seed(100 + step))
    return F.mse_loss(t, target.to(t.dtype), reduction="sum") / 8


def compare(case, where, expected, found):
    assert len(found) == len(expected)
    for number, (value, reference) in enumerate(zip(found, expected, strict=True)):
        place = f"{label(case)}: {where}, result {number}"
        if value is None or reference is None:
            assert all(each is None or not each.any() for each in (value, reference)), place
        elif not isinstance(reference, Tensor):
            assert value == reference, place
        else:
            floating = reference.is_floating_point()
            atol = 1e-4 * reference.abs().max().item() if floating and reference.numel() else 0
            torch.testing.assert_close(value, reference, rtol=0, atol=atol, msg=lambda m, place=place: f"{place}: {m}")


def signature_options(cls):
    """The options of constructor and forward, without the input."""
    constructor = inspect.signature(cls).parameters.values()
    call = list(inspect.signature(cls.forward).parameters.values())[2:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = {p.name for p in [*constructor, *call] if p.kind in named}
    return options | {"*" for p in constructor if p.kind is inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_is_trained_or_listed(name):
    if (name, "") in vqp_cases.UNSUPPORTED:
        assert not hasattr(compat, name)
        return
    expected = signature_options(getattr(upstream, name))
    trained = set().union(*(case.covered(compat) for case in vqp_cases.CASES if case.name == name))
    missing = {option for other, option in vqp_cases.UNSUPPORTED if other == name}
    assert expected - trained == missing
    assert missing <= expected
    for notes in (vqp_cases.DIFFERS, vqp_cases.PLAIN):
        assert {option for other, option in notes if other == name} <= expected | {""}


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_those_of_upstream(name):
    if (name, "") in vqp_cases.UNSUPPORTED:
        return
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(getattr(library, name), method)).parameters for library in (compat, upstream))
        assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
        for option, parameter in theirs.items():
            if isinstance(parameter.default, (type(None), bool, int, float, str, tuple)):
                assert ours[option].default == parameter.default, f"{method}: {option}"


@pytest.mark.parametrize("name", SUBMODULES)
def test_submodules_have_the_classes_of_upstream(name):
    theirs = importlib.import_module(f"vector_quantize_pytorch.{name}")
    classes = [n for n, value in vars(theirs).items() if inspect.isclass(value) and value.__module__ == theirs.__name__ and n[0] != "_"]
    ours = importlib.import_module(f"genperf.compat.vector_quantize_pytorch.{name}")
    assert [n for n in classes if not hasattr(ours, n)] == [n for n in classes if (n, "") in vqp_cases.UNSUPPORTED]


@pytest.mark.parametrize("name", sorted({case.name for case in vqp_cases.CASES}))
def test_attributes_are_those_of_upstream(name):
    """Public attributes and methods of an instance; for each class, of the first case."""
    case = next(case for case in vqp_cases.CASES if case.name == name)
    theirs, ours = (case.make(library) for library in (upstream, compat))
    missing = {n for n in dir(theirs) if not n.startswith("_") and not hasattr(nn.Module, n)} - {*dir(ours)}
    assert missing == {attribute for other, attribute in vqp_cases.WITHOUT if other == name}
