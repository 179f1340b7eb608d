# SPDX-License-Identifier: Apache-2.0
import math
import sys
from pathlib import Path

import pytest
import torch

import genperf
from genperf import testing

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from frechet_cases import make_cases

CASES = make_cases(64)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_factor(factor, cov, rank, tolerance=1e-13):
    """F F' equals the covariance up to rounding, relative to the scale of each pair of features, and has `rank` columns."""
    assert factor.dtype == torch.float64
    assert factor.shape == (len(cov), rank)
    scale = cov.double().diagonal().clamp(min=0).sqrt()
    error = (factor @ factor.T - cov.double()).abs()
    assert (error <= tolerance * len(cov) * scale[:, None] * scale + 1e-300).all()


@pytest.mark.parametrize("d", [1, 2, 33, 64, 300])
def test_well_conditioned_is_cholesky(d, device):
    root = randn(d, 2 * d + 3).to(device)
    cov = root @ root.T
    factor = genperf.covariance_factor(cov)
    assert_factor(factor, cov, d)
    torch.testing.assert_close(factor, torch.linalg.cholesky(cov), rtol=1e-10, atol=1e-12)
    assert (factor.triu(1) == 0).all()


@pytest.mark.parametrize("d", [2, 33, 64, 65, 130, 300])
def test_number_of_columns_is_the_rank(d, device):
    for rank in {1, (d + 2) // 3, d // 2, 3 * d // 4}:
        root = randn(d, rank).to(device)
        cov = root @ root.T
        assert_factor(genperf.covariance_factor(cov), cov, rank)


def test_rank_of_few_samples(device):
    for n, d in ((5, 40), (30, 40), (45, 40), (200, 40)):
        features = randn(n, d).relu().to(device)
        assert genperf.covariance_factor(features.T.cov()).shape == (d, min(n - 1, d))


def test_zero_and_empty(device):
    for d in (0, 1, 7):
        assert genperf.covariance_factor(torch.zeros(d, d, device=device)).shape == (d, 0)


@pytest.mark.parametrize("name", CASES)
def test_difficult_cases(name, device):
    for factor in (CASES[name].factor1.to(device), CASES[name].factor2.to(device)):
        cov = factor @ factor.T
        found = genperf.covariance_factor(cov)
        assert found.shape[1] <= min(torch.linalg.matrix_rank(factor, rtol=1e-12), factor.shape[1])
        assert_factor(found, cov, found.shape[1])


def test_constant_features_have_zero_rows(device):
    root = randn(20, 50).to(device)
    root[::3] = 0
    factor = genperf.covariance_factor(root @ root.T)
    assert (factor[::3] == 0).all()
    assert_factor(factor, root @ root.T, 13)


@pytest.mark.parametrize("n", [3, 100])
def test_features_of_different_scales(n, device):
    scales = torch.logspace(-12, 12, 24, dtype=torch.float64, device=device)
    root = scales[:, None] * randn(24, n).to(device)
    assert_factor(genperf.covariance_factor(root @ root.T), root @ root.T, min(n, 24))


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e100, 1e300])
def test_any_scale(scale, device):
    for n in (5, 50):
        root = randn(16, n).to(device)
        found = genperf.covariance_factor(root @ root.T * scale / 100) / math.sqrt(scale / 100)
        assert_factor(found, root @ root.T, min(n, 16))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(dtype, device):
    """Computed in float64 from the given values, which rounding to the dtype makes indefinite here."""
    root = torch.randn(24, 80, device=device)
    cov = (root @ root.T / 80).to(dtype)
    assert torch.equal(genperf.covariance_factor(cov), genperf.covariance_factor(cov.double()))
    if dtype == torch.bfloat16:
        return  # too far from positive semi-definite
    root = torch.randn(24, 6, device=device)
    cov = (root @ root.T).to(dtype)
    assert torch.linalg.eigvalsh(cov.double())[0] < 0
    factor = genperf.covariance_factor(cov)
    nearby = 24 * torch.finfo(dtype).eps * cov.double().abs().max()
    assert (factor @ factor.T - cov.double()).abs().max() <= nearby


def test_layouts_agree_and_the_input_is_unchanged(device):
    for n in (8, 80):
        root = randn(24, n).to(device)
        cov = root @ root.T
        cov = (cov + cov.T) / 2
        expected = genperf.covariance_factor(cov)
        for name, laid_out in testing.strided(cov).items():
            copy = laid_out.clone()
            torch.testing.assert_close(genperf.covariance_factor(laid_out), expected, rtol=1e-12, atol=1e-13, msg=name)
            assert torch.equal(laid_out, copy), name


def test_no_gradient(device):
    assert not genperf.covariance_factor(torch.eye(3, device=device, requires_grad=True)).requires_grad


GOOD = torch.eye(4)


@pytest.mark.parametrize(
    ("message", "error", "cov"),
    [
        ("cov must be a tensor, got list", TypeError, [[1.0]]),
        ("cov must be float32", TypeError, GOOD.int()),
        (r"cov must be square, \[d, d\], got shape \[4, 3\]", ValueError, GOOD[:, :3]),
        ("cov must be square", ValueError, GOOD[0]),
        ("cov must be square", ValueError, GOOD[None]),
        ("cov must be positive semi-definite", ValueError, -GOOD),
        ("cov must be positive semi-definite", ValueError, GOOD.flip(0)),
        ("cov must be finite", ValueError, GOOD * math.nan),
        ("cov must be finite", ValueError, GOOD.index_fill(0, torch.tensor(1), math.inf)),
    ],
)
def test_bad_input(message, error, cov):
    with pytest.raises(error, match="covariance_factor: .*" + message):
        genperf.covariance_factor(cov)
