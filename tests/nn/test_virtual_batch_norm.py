# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from genperf.losses.gradient_penalty import gradient_penalty
from genperf.nn.virtual_batch_norm import ReferenceBatchNorm, VirtualBatchNorm, reference_pass, set_reference_batch

LAYERS = (ReferenceBatchNorm, VirtualBatchNorm)


def plain(layer, x, reference):
    """The formulas of the paper: moments of the reference batch, for VirtualBatchNorm combined with those of each sample."""
    dims = (0, *range(2, x.dim()))
    shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
    mean, square = reference.mean(dims).view(shape), reference.square().mean(dims).view(shape)
    if isinstance(layer, VirtualBatchNorm):
        n = len(reference)
        positions = dims[1:]
        own_mean, own_square = (x.mean(positions, True), x.square().mean(positions, True)) if positions else (x, x.square())
        mean, square = (n * mean + own_mean) / (n + 1), (n * square + own_square) / (n + 1)
    y = (x - mean) / torch.sqrt(square - mean.square() + layer.eps)
    return y * layer.weight.view(shape) + layer.bias.view(shape) if layer.weight is not None else y


def network(layer, **options):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), layer(3, **options), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), layer(4), nn.Tanh(), nn.Linear(4, 1)
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 2)])
def test_outputs_and_gradients_match_plain_pytorch(layer, affine, shape, device):
    layer = layer(3, 0.01, affine=affine).to(device, torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p)
    reference, x = (k + torch.randn(n, *shape, dtype=torch.float64, device=device) for k, n in ((2, 6), (1, 4)))
    scale = torch.randn_like(x)
    found = []
    for actual in (True, False):
        leaves = [x.clone().requires_grad_(), reference.clone().requires_grad_(), *layer.parameters()]
        if actual:
            with reference_pass(layer, leaves[1]):
                y = layer(leaves[0])
        else:
            y = plain(layer, *leaves[:2])
        found.append([y, *torch.autograd.grad((y * scale).sum(), leaves)])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(layer(x), found[1][0], msg="the statistics must remain")


@pytest.mark.parametrize("layer", LAYERS)
def test_reference_batch_is_normalized_by_its_own_statistics(layer, device):
    layer = layer(3).to(device)
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    reference = 7 + torch.randn(5, 3, 4, device=device)
    set_reference_batch(layer, reference)
    handle.remove()
    torch.testing.assert_close(seen[0], nn.BatchNorm1d(3).to(device)(reference).detach())
    assert not seen[0].requires_grad


def test_statistics_do_not_cancel_far_from_zero(device):
    layer = VirtualBatchNorm(2).to(device)
    reference, x = (1e4 + torch.randn(9, 2, 50, device=device) for _ in range(2))
    set_reference_batch(layer, reference)
    torch.testing.assert_close(layer(x).double(), plain(layer.double(), x.double(), reference.double()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_samples_are_independent_in_both_modes(layer, device):
    critic = network(layer).to(device)
    set_reference_batch(critic, torch.rand(6, 1, 4, 4, device=device))
    before = copy.deepcopy(critic.state_dict())
    x = torch.rand(5, 1, 4, 4, device=device)
    alone = torch.cat([critic(sample[None]) for sample in x])
    torch.testing.assert_close(critic(x), alone)
    torch.testing.assert_close(critic.eval()(x), alone)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items()), (
        "only a reference pass may change the state"
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_reference_pass_uses_the_current_weights(layer, device):
    critic = network(layer).to(device)
    reference, x = torch.rand(6, 1, 4, 4, device=device), torch.rand(5, 1, 4, 4, device=device)
    set_reference_batch(critic, reference)
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(0.1)
    stale = critic(x)
    with reference_pass(critic, reference):
        fresh = critic(x)
        # Double backward also passes through the statistics.
        loss = fresh.square().mean() + gradient_penalty(critic, x, kind="r1", weight=1.0)
    assert not torch.allclose(stale, fresh)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())
    for _ in range(2):  # no graph is kept
        critic(x).sum().backward()
    set_reference_batch(critic, reference)
    torch.testing.assert_close(critic(x), fresh)


def test_gradients_through_the_reference_match_finite_differences():
    critic = network(VirtualBatchNorm).double()
    reference, x = (torch.rand(3, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    weight = critic[0].weight
    with reference_pass(critic, reference):
        (analytic,) = torch.autograd.grad(critic(x).sum(), weight)
    direction = torch.randn_like(weight)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(step * direction)
            with reference_pass(critic, reference):
                values.append(critic(x).sum())
            weight.sub_(step * direction)
    torch.testing.assert_close((analytic * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_state_dict_includes_the_reference():
    critic = network(VirtualBatchNorm)
    set_reference_batch(critic, torch.rand(6, 1, 4, 4))
    resumed = network(VirtualBatchNorm)
    resumed.load_state_dict(critic.state_dict())
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(resumed(x), critic(x))
    resumed.load_state_dict(network(VirtualBatchNorm).state_dict())
    with pytest.raises(RuntimeError, match="a reference batch must be set before the forward pass"):
        resumed(x)


def test_half_precision(device):
    layer = VirtualBatchNorm(3).to(device)
    set_reference_batch(layer, torch.randn(8, 3, 5, device=device).bfloat16())
    x = torch.randn(4, 3, 5, device=device).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), layer(x.float()).bfloat16())


def test_errors_do_not_change_the_statistics():
    critic = network(VirtualBatchNorm)
    x = torch.rand(5, 1, 4, 4)
    with pytest.raises(
        RuntimeError, match=r"VirtualBatchNorm: a reference batch must be set before the forward pass \(set_reference_batch\)"
    ):
        critic(x)
    set_reference_batch(critic, x)
    expected = critic(x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # after the first layer has seen it
        set_reference_batch(critic, torch.rand(5, 1, 5, 5))
    assert torch.equal(critic(x), expected)
    layer = critic[1]
    with pytest.raises(RuntimeError, match="a layer must be called once in a reference pass, got two calls"):
        set_reference_batch(nn.Sequential(critic[0], layer, layer), x)
    with pytest.raises(ValueError, match=r"a reference batch must have at least one value per channel, got \[0, 3, 2, 2\]"):
        set_reference_batch(critic, x[:0])
    with pytest.raises(ValueError, match=r"VirtualBatchNorm: x must be \[B, 3, ...\], got \[5, 1, 4, 4\]"):
        layer(x)
    with pytest.raises(ValueError, match="must have a ReferenceBatchNorm or VirtualBatchNorm, got Linear"):
        set_reference_batch(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="ReferenceBatchNorm: num_features must be at least 1, got 0"):
        ReferenceBatchNorm(0)
    assert torch.equal(critic(x), expected)
