# SPDX-License-Identifier: Apache-2.0
"""The matrix products of the polar route: their number, those that only a large matrix or a GPU takes, and the choice of the route."""

import collections
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import genperf
from genperf.ops import _device_rates, _nuclear, _polar, _products
from genperf.ops._nuclear import Side, polar_route
from genperf.ops.covariance_factor import FLOAT32_SHIFT, factor_without_sync
from genperf.ops.trace_sqrt_product import unavailable

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from frechet_cases import make_cases

CASES = make_cases(64)
D = 2048


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch):
    """Matrices of 16 rows take the way of large ones."""
    monkeypatch.setattr(_products, "TRIANGLE_FROM", {torch.float64: 16, torch.float32: 16})
    monkeypatch.setattr(_products, "BLOCK", 4)


@pytest.fixture
def tensor_cores(monkeypatch):
    """float32 products from half-precision parts, as on a GPU with tensor cores, from 16 rows on."""
    monkeypatch.setattr(_polar, "has_fast_half", lambda device: True)
    monkeypatch.setattr(_polar, "SPLIT_FROM", 16)


class Operators(TorchDispatchMode):
    """Counts calls of each operator, matrices that are factored and solved for, and products, in units of 2 D^3 operations per dtype."""

    def __init__(self):
        super().__init__()
        self.calls, self.products = collections.Counter(), collections.Counter()
        self.factored = self.solved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:] if name in ("addmm", "baddbmm") else args[:2]
            self.products[left.dtype] += left.numel() * right.shape[-1] / D**3
        elif name == "linalg_cholesky_ex":
            self.factored += args[0].shape[:-2].numel()
        elif name in ("linalg_solve_triangular", "cholesky_solve"):
            matrices = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.solved += max(t.numel() for t in matrices) / D**2 * (2 if name == "cholesky_solve" else 1)
        return result


def meta(*shape):
    return torch.empty(shape, dtype=torch.float64, device="meta")  # has no data, so that reading a value would raise


COVARIANCE, FACTOR, FEATURES = Side(meta(D, D), False), Side(meta(D, D), True), Side(meta(D, 256), True)


@pytest.mark.parametrize(
    ("sides", "needed", "precision", "factored", "solved", "products", "calls"),
    [
        ((COVARIANCE, COVARIANCE), (False, False), "float64", 8, 2, {torch.float64: 32.5}, 260),
        ((FACTOR, COVARIANCE), (False, False), "float64", 4, 1, {torch.float64: 32.5}, 260),
        ((FACTOR, FACTOR), (False, False), "float64", 0, 0, {torch.float64: 32.5}, 200),
        ((FACTOR, FEATURES), (False, False), "float64", 0, 0, {torch.float64: 0.6}, 90),
        ((FACTOR, COVARIANCE), (False, True), "float64", 6, 6, {torch.float64: 36.2}, 290),
        ((COVARIANCE, COVARIANCE), (True, True), "float64", 12, 12, {torch.float64: 39.8}, 310),
        ((FACTOR, COVARIANCE), (False, False), "mixed", 3, 1, {torch.float64: 1, torch.float16: 61}, 260),
        ((FACTOR, FACTOR), (False, False), "mixed", 0, 0, {torch.float64: 1, torch.float16: 61}, 210),
        ((FACTOR, FACTOR), (False, True), "mixed", 0, 0, {torch.float64: 2, torch.float16: 77}, 290),
        ((FACTOR, FEATURES), (False, False), "mixed", 0, 0, {torch.float64: 0.13, torch.float32: 0.25, torch.float16: 0.15}, 90),
    ],
)
def test_operators_at_the_width_of_inception_features(sides, needed, precision, factored, solved, products, calls, monkeypatch):
    """At most as many as given, with one batched factorization, and without a host synchronization."""
    monkeypatch.setattr(_polar, "has_fast_half", lambda device: True)
    with Operators() as found:
        trace, _, gradients = polar_route(sides, needed, precision, False)
    assert trace.shape == ()
    assert [g is not None for g in gradients] == list(needed)
    assert (found.factored, found.solved) == (factored, solved)
    assert found.calls["linalg_cholesky_ex"] == (factored > 0)
    assert found.products.keys() == products.keys()
    assert all(found.products[dtype] <= most for dtype, most in products.items()), found.products
    views = ("as_strided", "select", "unbind", "unsqueeze", "transpose", "t", "diagonal", "empty", "new_empty", "detach", "narrow", "slice",
             "squeeze", "split", "view", "expand", "alias", "_unsafe_view", "unflatten", "permute", "empty_like")  # fmt: skip
    assert sum(count for name, count in found.calls.items() if name not in views) <= calls


@pytest.mark.parametrize("n", [16, 17, 32, 35, 70])
def test_symmetric_product(n, small_blocks):
    left, base = randn(n, 23), randn(n, n)
    base = base + base.T
    square = left @ left.T
    for rows in (left, left.T.contiguous().T, torch.cat([left, left], 1)[:, :23]):
        found = _products.symmetric_product(rows, rows)
        torch.testing.assert_close(found, square, rtol=1e-12, atol=1e-12)
        assert torch.equal(found, found.T)
    found = _products.symmetric_product(square, square, base, beta=-3.0, alpha=0.5)
    torch.testing.assert_close(found, 0.5 * square @ square - 3 * base, rtol=1e-12, atol=1e-9)
    with Operators() as operators:
        _products.symmetric_product(left, left)
    assert operators.products[torch.float64] * D**3 <= (0.63 * n + 4) * n * 23  # and a remainder of at most three rows


def test_products_from_half_precision():
    """Nearly as exact as float32, for entries of any size that the iterations have."""
    for size in (1.0, 1e-2, 1e-4):
        x = size * torch.nn.functional.normalize(torch.randn(48, 80)) / 3
        wide = x.double()
        error = _products.split_gram(x) - wide @ wide.T
        assert error.abs().max() <= 1e-7 * size * (size + 1e-2)
        for a, b, c in (_polar.STEPS[torch.float32][0], _polar.STEPS[torch.float32][5]):
            gram = wide @ wide.T
            exact = a * wide + (b * gram + c * gram @ gram) @ wide
            found = _products.split_step(x, (a, b, c))
            assert (found - exact).norm() <= 2e-6 * exact.norm()
            assert size < 1 or (_polar._half_step(x, (a, b, c)) - exact).norm() > 100 * (found - exact).norm()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("disjoint supports", "all samples equal")])
def test_difficult_cases_with_blocks_and_tensor_cores(name, small_blocks, tensor_cores):
    """The value and, where it is unique, the gradient, within the errors that the docstring gives."""
    case = CASES[name]
    cov1, cov2 = case.covariances()
    for covs, factors in (((cov1, cov2), {}), ((cov1, None), {"factor2": case.factor2})):
        exact = genperf.trace_sqrt_product(*covs, **factors, impl="polar")
        assert abs(float(exact) / case.trace() - 1) <= 1e-6
        found = genperf.trace_sqrt_product(*covs, **factors, impl="polar", precision="mixed")
        assert abs(float(found) / case.trace() - 1) <= 1e-5
    if name in ("full rank", "n = 2 d"):
        leaf = case.factor1.clone().requires_grad_()
        expected = case.factor1 - case.gradient() / 2
        for precision, tolerance in (("float64", 1e-12), ("mixed", 1e-4)):
            value = genperf.trace_sqrt_product(leaf @ leaf.T, cov2, impl="polar", precision=precision)
            (slope,) = torch.autograd.grad(value, leaf)
            assert (slope - expected).norm() <= tolerance * expected.norm()


def test_slow_double_precision_in_mixed_mode(monkeypatch):
    monkeypatch.setattr(_nuclear, "has_fast_double", lambda device: False)
    case = CASES["n = d / 2"]
    cov1, cov2 = case.covariances()
    for covs, factors in (((cov1, cov2), {}), ((cov1, None), {"factor2": case.factor2})):
        found = genperf.trace_sqrt_product(*covs, **factors, impl="polar", precision="mixed")
        assert abs(float(found) / case.trace() - 1) <= 1e-5


@pytest.mark.parametrize(
    ("capability", "capturing", "precision", "first"),
    [
        ((9, 0), False, "float64", "polar"),
        ((8, 0), False, "mixed", "polar"),
        ((8, 9), False, "float64", "eigen"),
        ((8, 9), False, "mixed", "polar"),
        ((12, 0), True, "float64", "polar"),
        (None, False, "float64", "polar"),
    ],
)
def test_choice_of_the_route(capability, capturing, precision, first, monkeypatch):
    """By the rate of float64 on the device."""
    monkeypatch.setattr(_device_rates, "_capability", lambda device: capability)
    monkeypatch.setattr(sys.modules[unavailable.__module__], "is_capturing", lambda device: capturing)
    implementations = unavailable(torch.device("cuda"), precision=precision)
    assert next(iter(implementations)) == first
    assert set(implementations) == {"polar", "eigen", "reference"}
    assert next(iter(unavailable(torch.device("cpu"), precision=precision))) == "eigen"


def test_rate_is_a_constant_of_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(_device_rates, "_capability", lambda device: (8, 9))
    device = torch.device("cuda")
    compiled = torch.compile(lambda x: x + 1 if _device_rates.has_fast_double(device) else x - 1, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == -1


@pytest.mark.parametrize("precision", ["float64", "mixed"])
def test_no_overflow_in_the_norm(precision):
    """Of factors with equal entries, and of factors that are nearly orthogonal."""
    ones = torch.ones(1000, 100)
    found = genperf.trace_sqrt_product(None, None, factor1=ones, factor2=ones, precision=precision, impl="polar")
    torch.testing.assert_close(found, torch.tensor(1000.0 * 100), rtol=1e-5, atol=0)
    for size in (1e-20, 1e-60, 1e-150):
        first, second = torch.eye(2, 1, dtype=torch.float64), torch.tensor([[size], [1.0]], dtype=torch.float64)
        found = genperf.trace_sqrt_product(None, None, factor1=first, factor2=second, precision=precision, impl="polar")
        torch.testing.assert_close(found / size, torch.ones_like(found), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("below", [1e-3, 1e-8])
def test_eigenvalue_just_above_a_shift(size, below):
    """A correlation matrix with the smallest eigenvalue -shift (1 - below), alone or beside others, does not spoil the factor."""
    for shift, tolerance in ((1e-12, 1e-4), (FLOAT32_SHIFT * 16**0.5, 1e-2)):
        rho = -(1 + shift * (1 - below)) / (size - 1)  # the eigenvalues are 1 - rho and 1 + (size - 1) rho
        cov = torch.eye(16, dtype=torch.float64)
        cov[:size, :size] += rho * (1 - torch.eye(size, dtype=torch.float64))
        factor = factor_without_sync(cov).factor
        positive = (1 - rho) ** 0.5 * (size - 1) + 16 - size
        assert (factor @ factor.T - cov).abs().max() <= tolerance
        trace = genperf.trace_sqrt_product(cov, torch.eye(16, dtype=torch.float64), impl="polar")
        assert math.isclose(trace, positive, rel_tol=tolerance)
