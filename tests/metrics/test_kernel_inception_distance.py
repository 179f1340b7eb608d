# SPDX-License-Identifier: Apache-2.0
import io

import pytest
import torch
from torch import nn

from genperf.metrics import KernelInceptionDistance, _kernel_sums, polynomial_mmd
from genperf.metrics._kernel_sums import _BLOCK
from genperf.testing import largest_allocation


def plain(real, fake, degree=3, gamma=None, coef=1.0):
    real, fake = real.cpu().double(), fake.cpu().double()
    gamma = 1 / real.shape[1] if gamma is None else gamma

    def kernel(x, y):
        return (gamma * x @ y.T + coef) ** degree

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(real, real), kernel(fake, fake))]
    return sum(within) - 2 * kernel(real, fake).mean()


def samples(real=60, fake=50, dim=6, device="cpu", dtype=torch.float64):
    return torch.randn(real, dim, dtype=dtype, device=device), 0.3 + torch.randn(fake, dim, dtype=dtype, device=device)


def filled(real, fake, **options):
    metric = KernelInceptionDistance(**options)
    for x, is_real in ((real, True), (fake, False)):
        for batch in x.split(17):
            metric.update(batch, real=is_real)
    return metric


@pytest.mark.parametrize("sizes", [(2, 3), (60, 50), (2 * _BLOCK + 3, _BLOCK), (_BLOCK - 1, _BLOCK + 1)])
@pytest.mark.parametrize("kernel", [{}, {"degree": 2, "gamma": 0.3, "coef": 0.0}, {"degree": 1}])
def test_estimate_over_all_samples(sizes, kernel, device):
    real, fake = samples(*sizes, device=device)
    expected = plain(real, fake, **kernel)
    for found in (polynomial_mmd(real, fake, **kernel), filled(real, fake, **kernel).compute_full()):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-13)


def test_estimate_is_unbiased():
    values = torch.stack([polynomial_mmd(torch.randn(8, 3), torch.randn(5, 3)) for _ in range(500)])
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 4 * values.std() / 500**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_computed_in_float64(dtype, device):
    real, fake = ((x + 30).to(dtype) for x in samples(300, 300, device=device))
    torch.testing.assert_close(polynomial_mmd(real, fake).cpu(), plain(real, fake), rtol=1e-9, atol=0)


def test_same_seed_matches_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    real, fake = samples(60, 50)
    options = {"subsets": 7, "subset_size": 20, "degree": 2, "gamma": 0.2, "coef": 0.5}

    class Features(nn.Module):
        num_features = 6

        def forward(self, x):
            return x

    reference = kid.KernelInceptionDistance(Features(), **options).set_dtype(torch.float64)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    actual = filled(real, fake, **options)
    torch.manual_seed(5)
    expected = reference.compute()
    torch.manual_seed(5)
    for found, value in zip(actual.compute(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-14)
    generator = torch.Generator().manual_seed(5)
    torch.testing.assert_close(actual.compute(generator=generator)[0], expected[0], rtol=1e-9, atol=1e-14)
    state = torch.get_rng_state()
    assert not torch.equal(actual.compute(generator=generator)[0], expected[0]), "the next call draws other subsets"
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(kid.poly_mmd(real[:50], fake), polynomial_mmd(real[:50], fake), rtol=1e-9, atol=1e-14)


def test_memory_is_less_than_the_kernel_matrix(monkeypatch):
    monkeypatch.setattr(_kernel_sums, "_BLOCK", 100)
    real, fake = samples(450, 330, 2)
    assert largest_allocation(lambda: polynomial_mmd(real, fake)) <= 100 * 100 * 8
    torch.testing.assert_close(polynomial_mmd(real, fake), plain(real, fake))


def test_reset_merge_and_state_dict():
    real, fake = samples()
    expected = filled(real, fake).compute_full()
    metric = filled(real[:20], fake[:3], reset_real=False)
    metric.merge(filled(real[20:], fake[3:]))
    torch.testing.assert_close(metric.compute_full(), expected)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    resumed = KernelInceptionDistance()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(resumed.compute_full(), expected)
    metric.reset()
    assert (metric.real.count, metric.fake.count) == (60, 0)
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.to(torch.float16).compute_full(), expected)
    resumed.reset()
    assert (resumed.real.count, resumed.fake.count) == (0, 0)


def test_extractor_and_spatial_features(device):
    images = torch.randn(30, 4, 3, 3, device=device)
    metric = KernelInceptionDistance(lambda x: 2 * x, subsets=3, subset_size=10)
    metric.update(images, real=True)
    metric.update(images + 1, real=False)
    pooled = images.double().mean((2, 3))
    torch.testing.assert_close(metric.compute_full().cpu(), plain(2 * pooled, 2 * pooled + 2), rtol=1e-6, atol=0)
    assert metric.compute()[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": 0}, "subsets must be a whole number of at least 1, got 0"),
        ({"subset_size": 1}, "subset_size must be a whole number of at least 2, got 1"),
        ({"degree": 1.5}, "degree must be a whole number of at least 1, got 1.5"),
        ({"gamma": 0}, "gamma must be None or positive, got 0"),
        ({"coef": -1}, "coef must not be negative, got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"KernelInceptionDistance: {message}"):
        KernelInceptionDistance(**options)


def test_too_few_samples():
    metric = filled(*samples(30, 9), subset_size=10)
    with pytest.raises(ValueError, match="a subset of 10 needs at least 10 generated samples, got 9"):
        metric.compute()
    with pytest.raises(ValueError, match="needs at least 2 real samples, got 0"):
        KernelInceptionDistance().compute_full()
    with pytest.raises(ValueError, match="at least two samples on each side, got 30 and 1"):
        polynomial_mmd(*samples(30, 1))
    with pytest.raises(ValueError, match=r"must have shape \[N, 6\]"):
        polynomial_mmd(torch.zeros(3, 6), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must have 6 dimensions like those before, got 5"):
        metric.update(torch.zeros(3, 5), real=True)
