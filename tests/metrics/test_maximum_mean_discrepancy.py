# SPDX-License-Identifier: Apache-2.0
"""metrics.MaximumMeanDiscrepancy beside its lines of plain PyTorch."""

import io

import pytest
import torch
from torch.nn import functional as F

from genperf.metrics import MaximumMeanDiscrepancy, _kernel_sums, gaussian_mmd


def plain(real, fake, sigma=10.0, unbiased=False):
    real, fake = real.double(), fake.double()

    def kernel(x, y):
        return torch.exp(-(x[:, None] - y[None]).square().sum(-1) / (2 * sigma**2))

    def within(x):
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1)) if unbiased else k.mean()

    return within(real) + within(fake) - 2 * kernel(real, fake).mean()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_is_that_of_plain_pytorch(unbiased, dtype, monkeypatch):
    monkeypatch.setattr(_kernel_sums, "_BLOCK", 20)
    real, fake = torch.randn(53, 7).to(dtype), (torch.randn(41, 7) + 0.5).to(dtype)
    for sigma in (0.5, 3.0):
        found = gaussian_mmd(real, fake, sigma=sigma, unbiased=unbiased)
        torch.testing.assert_close(found, plain(real, fake, sigma, unbiased), rtol=1e-12, atol=1e-14)


def test_features_far_from_the_origin():
    real, fake = torch.randn(40, 5).double() + 1e4, torch.randn(30, 5).double() + 1e4
    torch.testing.assert_close(gaussian_mmd(real, fake, sigma=1.0), plain(real, fake, 1.0), rtol=1e-9, atol=0)


def test_equal_samples_have_no_discrepancy():
    x = torch.randn(600, 16)
    assert abs(gaussian_mmd(x, x.flip(0))) < 1e-14


def test_metric_is_cmmd_of_normalized_features():
    real, fake = torch.randn(45, 6) + 1, torch.randn(37, 6)
    expected = 1000 * plain(F.normalize(real.double()), F.normalize(fake.double()))
    metric = MaximumMeanDiscrepancy(reset_real=False)
    metric.update(real[:20], real=True)
    metric.update(fake, real=False)
    other = MaximumMeanDiscrepancy(reset_real=False)
    other.update(real[20:], real=True)
    metric.merge(other)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    resumed = MaximumMeanDiscrepancy()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.compute(), metric.compute())
    metric.reset()
    assert (metric.real.count, metric.fake.count) == (45, 0)
    with pytest.raises(ValueError, match="MaximumMeanDiscrepancy"):
        metric.compute()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: gaussian_mmd(torch.ones(3, 2), torch.ones(3, 2), sigma=0.0), "gaussian_mmd: sigma must be positive and finite, got 0.0"),
        (lambda: gaussian_mmd(torch.ones(1, 2), torch.ones(3, 2), unbiased=True), "at least 2 samples on each side, got 1 and 3"),
        (lambda: gaussian_mmd(torch.ones(0, 2), torch.ones(3, 2)), "at least 1 samples? on each side, got 0 and 3"),
        (lambda: gaussian_mmd(torch.full((2, 2), torch.nan), torch.ones(3, 2)), "gaussian_mmd"),
        (lambda: MaximumMeanDiscrepancy(scale=-1.0), "MaximumMeanDiscrepancy: scale must be positive and finite, got -1.0"),
    ],
)
def test_invalid_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
