# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from genperf import testing
from genperf.ops import _symmetric_eigenvalues

pytestmark = pytest.mark.compiled

SIZES = [1, 2, 3, 31, 32, 33, 34, 64, 65, 97, 127, 200]
EPS = torch.finfo(torch.float64).eps


def eigenvalues(a):
    return torch.ops.genperf.symmetric_eigenvalues(a)


def rotation(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def symmetric(n, seed=0):
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a + a.T


def spectra(n):
    """Matrices whose eigenvalues are known or difficult to compute."""
    q, steps = rotation(n), torch.arange(n, dtype=torch.float64)
    values = {
        "graded": 10.0 ** (-16 * steps / n),
        "clustered": 1 + 1e-13 * steps,
        "two_values": torch.where(steps < n // 3, -1.0, 1.0).double(),
        "rank_deficient": torch.where(steps < n // 4, steps + 1, 0.0),
        "one_large": torch.where(steps == 0, 1e8, 1.0).double(),
    }
    matrices = {name: q @ torch.diag(value) @ q.T for name, value in values.items()}
    features = torch.randn(max(1, n // 2), n, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).relu()
    matrices["covariance"] = torch.cov(features.T, correction=0).reshape(n, n)
    matrices["graded_rows"] = symmetric(n, 3) * torch.outer(2.0**-steps, 2.0**-steps)
    matrices["wilkinson"] = (
        torch.diag((steps - n // 2).abs()) + torch.diag(torch.ones(n - 1).double(), 1) + torch.diag(torch.ones(n - 1).double(), -1)
    )
    matrices["ones"] = torch.ones(n, n, dtype=torch.float64)
    matrices["arrow"] = torch.diag(steps).index_fill(0, torch.tensor([n - 1]), 1.0)
    matrices["arrow"] = matrices["arrow"].tril() + matrices["arrow"].tril(-1).T
    return {name: (matrix + matrix.T) / 2 for name, matrix in matrices.items()}


def assert_eigenvalues(name, found, a):
    """Compare with LAPACK: each may be wrong by sqrt(n) roundings of the largest eigenvalue."""
    expected = torch.linalg.eigvalsh(a)
    error = (found - expected).abs().max()
    assert found.shape == expected.shape
    assert (found.diff() >= 0).all(), name
    budget = 4 * math.sqrt(a.shape[0]) * EPS * expected.abs().max()
    assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


@pytest.mark.parametrize("n", SIZES)
def test_random(n):
    a = symmetric(n)
    assert_eigenvalues("random", eigenvalues(a), a)


@pytest.mark.parametrize("n", [3, 33, 65, 130])
def test_spectra(n):
    for name, a in spectra(n).items():
        assert_eigenvalues(name, eigenvalues(a), a)


@pytest.mark.parametrize("n", [1, 2, 33, 100])
def test_exact(n):
    """The eigenvalues of a diagonal matrix are exact up to a rounding."""
    diagonal = torch.linspace(-3, 5, n, dtype=torch.float64)
    assert (eigenvalues(torch.diag(diagonal.flip(0))) - diagonal).abs().max() <= 8 * EPS
    assert (eigenvalues(torch.eye(n, dtype=torch.float64)) - 1).abs().max() <= 2 * EPS
    assert (eigenvalues(torch.zeros(n, n, dtype=torch.float64)) == 0).all()


def test_closed_form():
    """The second difference matrix, also after a rotation, compared with 2 - 2 cos(pi k / (n + 1))."""
    n = 300
    ones = torch.ones(n - 1, dtype=torch.float64)
    a = 2 * torch.eye(n, dtype=torch.float64) - torch.diag(ones, 1) - torch.diag(ones, -1)
    expected = 4 * torch.sin(torch.pi / 2 / (n + 1) * torch.arange(1, n + 1, dtype=torch.float64)).square()
    assert (eigenvalues(a) - expected).abs().max() <= 16 * EPS
    q = rotation(n)
    assert (eigenvalues(q @ a @ q.T) - expected).abs().max() <= 4 * math.sqrt(n) * EPS


@pytest.mark.parametrize("scale", [1e-320, 1e-310, 1e-300, 1e-160, 1e160, 1e300])
def test_scales(scale):
    a = symmetric(70)
    a = a / a.abs().max()
    found = eigenvalues(a * scale)
    rounded = (a * scale) / scale if scale >= 1e-300 else None
    if rounded is not None:
        assert_eigenvalues("scaled", found / scale, rounded)
    else:  # entries are multiples of the smallest subnormal number
        assert (found - torch.linalg.eigvalsh(a) * scale).abs().max() <= 70 * 5e-324


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (40, 3), (69, 69)])
def test_nonfinite_values(bad, place):
    a = symmetric(70)
    a[place] = bad
    assert eigenvalues(a).isnan().all()
    assert _symmetric_eigenvalues.symmetric_eigenvalues(a).isnan().all()


@pytest.mark.parametrize("n", [2, 33, 100])
def test_reads_the_lower_triangle(n):
    a = symmetric(n)
    lower = a.tril() + torch.full_like(a, math.nan).triu(1)
    before = lower.clone()
    assert torch.equal(eigenvalues(lower), eigenvalues(a))
    assert torch.equal(lower.nan_to_num(), before.nan_to_num())
    assert torch.equal(_symmetric_eigenvalues.symmetric_eigenvalues(lower), _symmetric_eigenvalues.symmetric_eigenvalues(a))


def test_layouts_agree():
    a = symmetric(70)
    expected = eigenvalues(a)
    for name, laid_out in testing.strided(a).items():
        assert torch.equal(eigenvalues(laid_out), expected), name
    assert torch.equal(
        eigenvalues(torch.ones(1, 1, dtype=torch.float64).expand(40, 40)), eigenvalues(torch.ones(40, 40, dtype=torch.float64))
    )


def test_bitwise_equal_for_any_number_of_threads(set_threads):
    a = symmetric(700)  # large enough that every stage is parallel
    expected = eigenvalues(a)
    for count in (1, 2, 3, 8):
        set_threads(count)
        for _ in range(3):
            assert torch.equal(eigenvalues(a), expected)


def test_poisoned_memory():
    a = symmetric(100)
    expected = eigenvalues(a)
    with testing.poisoned_memory():
        assert torch.equal(eigenvalues(a), expected)


def test_kernel_and_lapack_agree():
    """Above and below the size from which the compiled kernel is used, and for dtypes that it does not support."""
    limit = int(min(_symmetric_eigenvalues.min_size(), 256))
    for n in (0, 1, 5, limit - 1, limit):
        a = symmetric(n).requires_grad_()
        found = _symmetric_eigenvalues.symmetric_eigenvalues(a)
        assert not found.requires_grad
        expected = torch.linalg.eigvalsh(a.detach())
        assert found.shape == (n,)
        if n:
            assert (found - expected).abs().max() <= 4 * math.sqrt(n) * EPS * expected.abs().max()
    if limit == _symmetric_eigenvalues.min_size():
        assert torch.equal(_symmetric_eigenvalues.symmetric_eigenvalues(symmetric(limit)), eigenvalues(symmetric(limit)))
    assert _symmetric_eigenvalues.symmetric_eigenvalues(symmetric(limit).float()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 3)], ids=str)
def test_unsupported_shapes(shape):
    with pytest.raises(RuntimeError, match=r"a must be float64 \[n, n\]"):
        eigenvalues(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"a must be float64 \[n, n\]"):
        eigenvalues(torch.zeros(3, 3))


@pytest.mark.once
def test_contract():
    testing.check_op("symmetric_eigenvalues", [(symmetric(n),) for n in (0, 1, 40)])
    function = _symmetric_eigenvalues.symmetric_eigenvalues
    for n in (5, 256):
        a = symmetric(n)
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(a), function(a))
