# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from scipy import spatial, special, stats

from genperf.losses.divergences import js_divergence, kl_divergence, wasserstein_1d


def vectors(*shape, device="cpu"):
    return torch.rand(*shape, dtype=torch.float64, device=device).softmax(-1)


def test_divergences_match_scipy(device):
    p, q = vectors(3, 5, device=device), vectors(5, device=device)
    p[0, 1] = 0
    q[4] = p[2, 4] = 0
    p[1], q = 7 * p[1], 0.3 * q
    kl, js = kl_divergence(p, q, normalize=True), js_divergence(p, q, normalize=True)
    for row, found_kl, found_js in zip(p.cpu(), kl, js, strict=True):
        assert found_kl.item() == pytest.approx(stats.entropy(row, q.cpu()))
        assert found_js.item() == pytest.approx(spatial.distance.jensenshannon(row, q.cpu()) ** 2)
    assert kl.isinf().tolist() == [True, True, False]
    torch.testing.assert_close(kl_divergence(p, q).cpu(), torch.from_numpy(special.rel_entr(p.cpu().numpy(), q.cpu().numpy()).sum(-1)))
    torch.testing.assert_close(kl_divergence(p.T, q[:, None], dim=0, normalize=True), kl)


def test_exact_values():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert kl_divergence(p, p).item() == js_divergence(p, p).item() == 0
    assert kl_divergence(p, q).item() == math.inf
    assert js_divergence(p, q).item() == pytest.approx(math.log(2))
    assert kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])).item() == pytest.approx(math.log(4))
    near = torch.rand(1000, 4).softmax(-1)
    assert (js_divergence(near, near * (1 + 1e-7 * torch.randn(4))) >= 0).all(), "its root must not be NaN"
    assert kl_divergence(p.bfloat16(), p.bfloat16()).dtype == torch.float32


def test_gradients_of_divergences():
    p, q = vectors(2, 4).requires_grad_(), vectors(2, 4).requires_grad_()
    for divergence in (kl_divergence, js_divergence):
        assert torch.autograd.gradcheck(divergence, (p, q))
        assert torch.autograd.gradcheck(lambda p, q, f=divergence: f(p, q, normalize=True), (p, q))
    p, q = torch.tensor([0.0, 0.0, 1.0], requires_grad=True), torch.tensor([0.0, 0.5, 0.5], requires_grad=True)
    for divergence in (kl_divergence, js_divergence):
        assert all(g.isfinite().all() for g in torch.autograd.grad(divergence(p, q), (p, q)))
    assert torch.autograd.grad(kl_divergence(p, q), q)[0].tolist() == [0, 0, -2]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (6, 6), (3, 7), (12, 5), (1, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_wasserstein_matches_scipy(n, m, weighted, device):
    x, y = torch.randn(2, n, dtype=torch.float64, device=device), 1 + 2 * torch.randn(2, m, dtype=torch.float64, device=device)
    weights = (torch.rand_like(x), 3 * torch.rand_like(y)) if weighted else (None, None)
    if weighted and n > 1:
        weights[0][0, x[0].argmin()] = weights[0][1, x[1].argmax()] = 0
    found = wasserstein_1d(x, y, *weights)
    for i in range(2):
        rows = [w if w is None else w[i].cpu() for w in weights]
        assert found[i].item() == pytest.approx(stats.wasserstein_distance(x[i].cpu(), y[i].cpu(), *rows))


def test_higher_orders():
    x, y = torch.randn(4, 9), torch.randn(4, 9)
    difference = (x.sort().values - y.sort().values).abs()
    torch.testing.assert_close(wasserstein_1d(x, y, p=2), difference.square().mean(-1).sqrt())
    torch.testing.assert_close(wasserstein_1d(x, y, p=3.5), difference.pow(3.5).mean(-1).pow(1 / 3.5))
    # Repeating every sample does not change the distribution.
    torch.testing.assert_close(wasserstein_1d(x.repeat(1, 2), y.repeat(1, 3), p=2), wasserstein_1d(x, y, p=2))
    torch.testing.assert_close(wasserstein_1d(x, x + 3, p=2), torch.full((4,), 3.0))


@pytest.mark.parametrize("p", [2.0, 8.0])
def test_higher_orders_at_any_scale(p):
    x, y = torch.rand(5), torch.rand(7)
    expected = wasserstein_1d(x, y, p=p)
    for scale in (1e30, 1e-30):
        torch.testing.assert_close(wasserstein_1d(scale * x, scale * y, p=p) / scale, expected)
    # Samples of weight 0 have no effect at any distance.
    far = torch.cat([x, torch.tensor([-1e30, 1e30])])
    torch.testing.assert_close(wasserstein_1d(far, y, (far.abs() < 2).float(), p=p), expected)
    for value in (math.nan, math.inf):
        assert not wasserstein_1d(torch.tensor([0.0, value]), torch.zeros(2), p=p).isfinite()


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_gradients_of_wasserstein(p):
    x, y = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    assert torch.autograd.gradcheck(lambda x, y: wasserstein_1d(x, y, p=p), (x, y))
    weights = [torch.rand(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    assert torch.autograd.gradcheck(lambda *inputs: wasserstein_1d(*inputs, p=p), (x, y, *weights))
    same = torch.randn(6, requires_grad=True)
    distance = wasserstein_1d(same, same.detach(), p=p)
    assert distance.item() == 0
    assert not torch.autograd.grad(distance, same)[0].any()


def test_many_samples_in_float32(device):
    x = torch.rand(300_001, device=device)
    y = torch.rand(100_003, device=device) + 1000
    assert wasserstein_1d(x, y).item() == pytest.approx((y.double().mean() - x.double().mean()).item(), rel=1e-6)
    assert wasserstein_1d(x.bfloat16(), y).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: kl_divergence(x, torch.zeros(4)),
            ValueError,
            r"kl_divergence: p and q must have shapes that broadcast, got \[3\] and \[4\]",
        ),
        (lambda x: js_divergence(x, x, dim=1), ValueError, r"js_divergence: dim must be a dimension of p and q, got dim=1 for shape \[3\]"),
        (lambda x: kl_divergence(x.long(), x), TypeError, "p must be of a floating dtype, got torch.int64"),
        (lambda x: js_divergence(x, [0.5]), TypeError, "q must be a tensor, got list"),
        (lambda x: wasserstein_1d(x, x[:0]), ValueError, r"wasserstein_1d: y must have at least one sample, got shape \[0\]"),
        (lambda x: wasserstein_1d(x, x[None]), ValueError, r"x and y must agree but for the last dimension, got \[3\] and \[1, 3\]"),
        (lambda x: wasserstein_1d(x, x, x[:2]), ValueError, r"x_weights must have the shape of x, \[3\], got \[2\]"),
        (lambda x: wasserstein_1d(x, x, p=0.5), ValueError, "p must be a finite number, at least 1, got 0.5"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3))
