# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance in float64: one evaluation, a small sample against a prepared reference, and its gradient for training.

Features are rectified, correlated Gaussians. Each result is first compared with that of a symmetric eigendecomposition.
"""

import ast
import functools
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import genperf
from genperf.metrics import FrechetReference

from frechet_cases import eigvalsh, from_trace, symmetric_root  # isort: skip
from measure import measure  # isort: skip


class Problem(NamedTuple):
    features: Tensor  # [n, d], generated
    mean1: Tensor  # of the features
    cov1: Tensor
    mean2: Tensor  # of the reference
    cov2: Tensor
    distance: Tensor  # exact
    slope: Tensor  # exact derivative of the distance in cov1, [d, d]

    @property
    def moments(self) -> tuple[Tensor, ...]:
        return self.mean1, self.cov1, self.mean2, self.cov2


@functools.lru_cache(maxsize=1)  # the contenders of one size follow one another
def make_problem(n: int, d: int, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)

    def draw(count: int) -> Tensor:
        return torch.relu(torch.randn(count, d, generator=generator, dtype=torch.float64) @ mix + 0.1).to(device)

    features, reference = draw(n), 1.1 * draw(4 * d)
    mean1, cov1, mean2, cov2 = features.mean(0), features.T.cov(), reference.mean(0), reference.T.cov()
    lower = torch.linalg.cholesky(cov2)
    values, vectors = torch.linalg.eigh(lower.T @ cov1 @ lower)
    kept = values > 1e-13 * values[-1]  # a sample of n has a covariance of rank n - 1
    roots, vectors = values[kept].sqrt(), lower @ vectors[:, kept]
    slope = torch.eye(d, dtype=torch.float64, device=device) - (vectors / roots) @ vectors.T
    return Problem(features, mean1, cov1, mean2, cov2, from_trace(mean1, cov1, mean2, cov2, roots.sum()), slope)


def torchmetrics_distance():
    return pytest.importorskip("torchmetrics.image.fid")._compute_fid


def pytorch_fid_distance():
    """calculate_frechet_distance without its module, which imports torchvision, and with a `sqrtm` that accepts `disp`."""
    numpy, linalg = pytest.importorskip("numpy"), pytest.importorskip("scipy.linalg")
    package = importlib.util.find_spec("pytorch_fid") or pytest.skip("could not import 'pytorch_fid'")
    module = ast.parse((Path(package.submodule_search_locations[0]) / "fid_score.py").read_text())
    module.body = [node for node in module.body if getattr(node, "name", None) == "calculate_frechet_distance"]
    sqrtm = SimpleNamespace(sqrtm=lambda a, disp=True: linalg.sqrtm(a) if disp else (linalg.sqrtm(a), None))
    names = {"np": numpy, "linalg": sqrtm}
    exec(compile(module, "fid_score.py", "exec"), names)
    return lambda *moments: torch.tensor(names["calculate_frechet_distance"](*(t.cpu().numpy() for t in moments)))


def with_cached_root(problem):
    return functools.partial(eigvalsh, root2=symmetric_root(problem.cov2))


# Each contender prepares what depends on the reference alone, and returns the function to time.


def genperf_prepared(problem):
    reference = FrechetReference.from_moments(problem.mean2, problem.cov2)
    return lambda mean1, cov1, *_: reference.distance(mean1, cov1)


OF_MOMENTS = {
    "genperf": lambda problem: genperf.frechet_distance,
    "genperf, prepared reference": genperf_prepared,
    "eigvalsh, cached root": with_cached_root,
    "torchmetrics": lambda problem: torchmetrics_distance(),
    "pytorch-fid": lambda problem: pytorch_fid_distance(),
}


def genperf_of_features(problem):
    return FrechetReference.from_moments(problem.mean2, problem.cov2).distance_to_features


def of_features(distance, problem):
    return lambda features: distance(features.mean(0), features.T.cov(), problem.mean2, problem.cov2)


OF_FEATURES = {
    "genperf": genperf_of_features,
    "eigvalsh, cached root": lambda problem: of_features(with_cached_root(problem), problem),
    "torchmetrics": lambda problem: of_features(torchmetrics_distance(), problem),
}


def flops(d: int) -> float:
    """Of a direct computation: a Cholesky factor, two products with it, the reduction of the result to tridiagonal form."""
    return (1 / 3 + 2 + 4 / 3) * d**3


def verify(found: Tensor, exact: Tensor, tolerance: float) -> None:
    error = float((found.to(exact) - exact).norm() / exact.norm())
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("contender", OF_MOMENTS)
@pytest.mark.parametrize("d", [768, 1024, 2048])
def test_of_covariances(benchmark, d, contender, size, device):
    (d,) = size((d,))
    problem = make_problem(4 * d, d, device)
    function = functools.partial(OF_MOMENTS[contender](problem), *problem.moments)
    slow = contender == "pytorch-fid" and d > 1024
    if not slow:
        verify(function(), problem.distance, 1e-8)
    measure(
        benchmark, function, device, flops=flops(d), once=slow,
        op="frechet_distance", workload="full rank, float64", contender=contender, D=d,
    )  # fmt: skip


@pytest.mark.parametrize("contender", ["genperf, prepared reference, mixed"])
@pytest.mark.parametrize("d", [768, 2048])
def test_mixed_precision(benchmark, d, contender, size, device):
    """Iterations in float32, for training on a GPU; a CPU has nothing to gain from them."""
    if device == "cpu":
        pytest.skip("mixed precision is for GPUs")
    (d,) = size((d,))
    problem = make_problem(4 * d, d, device)
    factor = genperf.covariance_factor(problem.cov2)

    def function():
        return genperf.frechet_distance(problem.mean2, None, problem.mean1, problem.cov1, factor1=factor, precision="mixed")

    verify(function(), problem.distance, 1e-4)  # the distance is a small difference of terms that are exact to 1e-6
    measure(
        benchmark, function, device, flops=flops(d),
        op="frechet_distance", workload="full rank, mixed precision", contender=contender, D=d,
    )  # fmt: skip


@pytest.mark.parametrize("contender", OF_FEATURES)
def test_of_a_small_sample(benchmark, contender, size, device):
    n, d = size((256, 2048))
    problem = make_problem(n, d, device)
    function = functools.partial(OF_FEATURES[contender](problem), problem.features)
    verify(function(), problem.distance, 1e-6)  # zero eigenvalues are computed as about 1e-16, and the sum has their roots
    measure(
        benchmark, function, device,
        op="frechet_distance", workload="features against a prepared reference, float64", contender=contender, N=n, D=d,
    )  # fmt: skip


@pytest.mark.parametrize("contender", ["genperf, prepared reference", "eigvalsh, cached root"])
def test_gradient_in_the_covariance(benchmark, contender, size, device):
    (d,) = size((1024,))
    problem = make_problem(4 * d, d, device)
    distance = OF_MOMENTS[contender](problem)
    cov1 = problem.cov1.clone().requires_grad_()

    def step():
        value = distance(problem.mean1, cov1, problem.mean2, problem.cov2)
        return value, torch.autograd.grad(value, cov1)[0]

    value, slope = step()
    verify(value.detach(), problem.distance, 1e-8)
    verify(slope, problem.slope, 1e-8)
    measure(
        benchmark, step, device,
        op="frechet_distance", workload="forward and backward, covariance, float64", contender=contender, D=d,
    )  # fmt: skip


@pytest.mark.parametrize("contender", ["genperf", "eigvalsh, cached root"])
@pytest.mark.parametrize("n", [256, 1024, 4096])
def test_gradient_in_the_features(benchmark, n, contender, size, device):
    n, d = size((n, 1024))
    problem = make_problem(n, d, device)
    distance = OF_FEATURES[contender](problem)
    features = problem.features.clone().requires_grad_()

    def step():
        value = distance(features)
        return value, torch.autograd.grad(value, features)[0]

    value, slope = step()
    verify(value.detach(), problem.distance, 1e-6)
    through_mean, through_cov = 2 / n * (problem.mean1 - problem.mean2), 2 / (n - 1) * (features.detach() - problem.mean1) @ problem.slope
    verify(slope, through_mean + through_cov, 1e-5)
    measure(
        benchmark, step, device,
        op="frechet_distance", workload="forward and backward, features, float64", contender=contender, N=n, D=d,
    )  # fmt: skip
