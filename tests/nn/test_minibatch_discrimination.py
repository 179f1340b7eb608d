# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from genperf.losses import gradient_penalty
from genperf.nn import MinibatchDiscrimination


def plain(x, weight):
    m = torch.einsum("na,abc->nbc", x, weight)
    similarity = torch.exp(-(m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)).sum(1) - 1
    return torch.cat([x, similarity], 1)


@pytest.mark.parametrize(("n", "a", "b", "c"), [(1, 3, 2, 2), (5, 4, 3, 2), (33, 7, 5, 1)])
def test_forward_and_backward_match_plain_pytorch(n, a, b, c, device):
    layer = MinibatchDiscrimination(a, b, c).to(device, torch.float64)
    x, reference = (torch.linspace(-1, 1, n * a, dtype=torch.float64, device=device).cos().reshape(n, a).requires_grad_() for _ in range(2))
    weight = layer.weight.detach().clone().requires_grad_()
    actual, expected = layer(x), plain(reference, weight)
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (n, layer.out_features)
    scale = torch.randn_like(expected)
    (actual * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_similarities_alone(device):
    layer = MinibatchDiscrimination(4, 3, 2, concatenate=False).to(device)
    x = torch.randn(6, 4, device=device)
    torch.testing.assert_close(layer(x), plain(x, layer.weight)[:, 4:])
    assert layer.out_features == 3


def test_collapsed_batch_has_higher_similarity(device):
    layer = MinibatchDiscrimination(64, 5, 8, concatenate=False).to(device)
    collapsed = layer(torch.randn(1, 64, device=device).expand(32, 64))
    torch.testing.assert_close(collapsed, torch.full_like(collapsed, 31))
    spread = layer(torch.randn(32, 64, device=device)) / 31
    assert 0.05 < spread.mean() < 0.9, "with features of unit variance the similarity must have a useful gradient"


def test_one_sample_has_zero_similarity(device):
    layer = MinibatchDiscrimination(4, 3, 2, concatenate=False).to(device)
    assert not layer(torch.randn(1, 4, device=device)).any()


def test_gradient_penalty(device):
    critic = nn.Sequential(MinibatchDiscrimination(4, 3, 2), nn.Linear(7, 1)).to(device, torch.float64)
    real = torch.randn(5, 4, dtype=torch.float64, device=device)
    loss = gradient_penalty(critic, real, kind="r1", weight=1.0)
    loss.backward()

    weight = critic[0].weight.detach().clone().requires_grad_()
    points = real.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic[1](plain(points, weight)).sum(), points, create_graph=True)
    expected = g.square().sum(1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(critic[0].weight.grad, weight.grad)


def test_state_dict_round_trip(device):
    source, target = (MinibatchDiscrimination(4, 3, 2).to(device) for _ in range(2))
    assert source.state_dict().keys() == {"weight"}
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 4, device=device)
    assert torch.equal(source(x), target(x))


def test_compiles_in_one_graph(device):
    layer = MinibatchDiscrimination(4, 3, 2).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (5, 9):
        x = torch.randn(n, 4, device=device, requires_grad=True)
        for eager, fused in zip(*([y := f(x), *torch.autograd.grad(y.sum(), (x, layer.weight))] for f in (layer, compiled)), strict=True):
            torch.testing.assert_close(fused, eager)


def test_autocast(device):
    layer = MinibatchDiscrimination(16, 3, 2).to(device)
    x = torch.randn(5, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), plain(x, layer.weight), rtol=0.05, atol=0.05)


def test_bad_arguments(device):
    with pytest.raises(ValueError, match=r"^MinibatchDiscrimination: kernel_dim must be at least 1, got 0"):
        MinibatchDiscrimination(4, 3, 0)
    layer = MinibatchDiscrimination(4, 3, 2).to(device)
    with pytest.raises(ValueError, match=r"x must be \[N, 4\], got \[2, 4, 1\]"):
        layer(torch.randn(2, 4, 1, device=device))
