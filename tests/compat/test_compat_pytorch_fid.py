# SPDX-License-Identifier: Apache-2.0
"""genperf.compat.pytorch_fid against pytorch-fid, if it is installed with a compatible scipy, and against scipy."""

import importlib
import sys
import types
import warnings

import numpy as np
import pytest

import genperf
from genperf.compat.pytorch_fid import calculate_frechet_distance


def statistics(count, dim, seed=0, offset=0.0):
    """Mean and covariance of `count` correlated features after a ReLU."""
    rng = np.random.default_rng(seed)
    features = np.maximum(rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) / dim**0.5 + offset, 0)
    return features.mean(0), np.cov(features, rowvar=False)


def by_scipy(mu1, sigma1, mu2, sigma2):
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm(sigma1 @ sigma2)
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real)


def by_eigenvalues(mu1, sigma1, mu2, sigma2):
    """The distance by symmetric eigenvalues, for any covariances."""
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace


@pytest.fixture
def upstream(monkeypatch):
    """The module pytorch_fid.fid_score, with stubs for missing image packages."""
    pytest.importorskip("pytorch_fid")
    pytest.importorskip("scipy")
    try:
        return importlib.import_module("pytorch_fid.fid_score")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchvision"):
            raise
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["torchvision"], "transforms", sys.modules["torchvision.transforms"], raising=False)
    inception = types.ModuleType("pytorch_fid.inception")
    inception.InceptionV3 = type("InceptionV3", (), {"BLOCK_INDEX_BY_DIM": {64: 0, 192: 1, 768: 2, 2048: 3}})
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", inception)
    module = importlib.import_module("pytorch_fid.fid_score")
    monkeypatch.delitem(sys.modules, "pytorch_fid.fid_score")
    return module


@pytest.mark.parametrize("dim", [2, 7, 64])
def test_matches_pytorch_fid(upstream, dim):
    inputs = statistics(20 * dim + 2, dim), statistics(30 * dim + 2, dim, seed=1, offset=0.3)
    arguments = [a for pair in inputs for a in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            expected = upstream.calculate_frechet_distance(*arguments)
        except TypeError as error:
            pytest.skip(f"pytorch-fid does not work with this scipy: {error}")
    found = calculate_frechet_distance(*arguments)
    assert type(found) is np.float64
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01


def test_replaces_the_function_of_pytorch_fid(upstream, tmp_path, monkeypatch):
    """In pytorch-fid's computation from two statistics files."""
    monkeypatch.setattr(upstream, "calculate_frechet_distance", calculate_frechet_distance)
    monkeypatch.setattr(
        upstream, "InceptionV3", type("Untouched", (), {"BLOCK_INDEX_BY_DIM": {64: 0}, "__init__": lambda *_: None, "to": lambda *_: None})
    )
    first, second = statistics(300, 8), statistics(300, 8, seed=1)
    paths = [str(tmp_path / "first.npz"), str(tmp_path / "second.npz")]
    for path, (mu, sigma) in zip(paths, (first, second), strict=True):
        np.savez(path, mu=mu, sigma=sigma)
    found = upstream.calculate_fid_given_paths(paths, 50, "cpu", 64)
    assert found == pytest.approx(by_eigenvalues(*first, *second), rel=1e-9)


@pytest.mark.parametrize("dim", [3, 48])
def test_matches_scipy(dim):
    arguments = (*statistics(30 * dim, dim), *statistics(30 * dim, dim, seed=1, offset=0.5))
    assert calculate_frechet_distance(*arguments) == pytest.approx(by_scipy(*arguments), rel=1e-8)


@pytest.mark.parametrize(("count1", "count2"), [(10, 2000), (2000, 10), (10, 12), (2, 3)])
def test_fewer_samples_than_features(count1, count2):
    """Here pytorch-fid raises an error about an imaginary component, or its value depends on the version of scipy."""
    arguments = (*statistics(count1, 40), *statistics(count2, 40, seed=1))
    found = calculate_frechet_distance(*arguments)
    assert found == pytest.approx(by_eigenvalues(*arguments), rel=1e-6)


def test_zero_covariances_and_dead_features():
    mu, sigma = statistics(200, 6)
    assert calculate_frechet_distance(mu, np.zeros((6, 6)), mu, np.zeros((6, 6))) == 0
    assert calculate_frechet_distance(mu, np.zeros((6, 6)), mu, sigma) == pytest.approx(np.trace(sigma))
    dead = sigma.copy()
    dead[2], dead[:, 2] = 0, 0
    assert calculate_frechet_distance(mu, dead, mu, sigma) == pytest.approx(by_eigenvalues(mu, dead, mu, sigma), rel=1e-6)


@pytest.mark.parametrize("count", [20, 500])
def test_equal_statistics_have_distance_zero(count):
    mu, sigma = statistics(count, 40)
    distance = calculate_frechet_distance(mu, sigma, mu, sigma)
    assert 0 <= distance <= 1e-6 * np.trace(sigma)


def test_lists_and_dtypes():
    assert calculate_frechet_distance([1.0], [[4.0]], [3], [[9]]) == pytest.approx(4 + (2 - 3) ** 2)
    assert calculate_frechet_distance([0, 0], [[4, 0], [0, 1]], [1, 0], [[1, 0], [0, 1]]) == pytest.approx(1 + 1)
    arguments = (*statistics(300, 5), *statistics(300, 5, seed=1))
    single = [a.astype(np.float32) for a in arguments]
    widened = [a.astype(np.float64) for a in single]
    assert calculate_frechet_distance(*single) == calculate_frechet_distance(*widened)
    strided = [np.asfortranarray(a)[::-1][::-1] for a in arguments]
    assert calculate_frechet_distance(*strided) == pytest.approx(calculate_frechet_distance(*arguments), rel=1e-12)


def test_eps_is_accepted_and_unused():
    arguments = (*statistics(10, 20), *statistics(10, 20, seed=1))
    assert calculate_frechet_distance(*arguments, eps=1e3) == calculate_frechet_distance(*arguments)
    assert calculate_frechet_distance(*arguments, 1e-9) == calculate_frechet_distance(*arguments)


def test_arguments_are_not_changed():
    arguments = [*statistics(50, 5), *statistics(50, 5, seed=1)]
    before = [a.copy() for a in arguments]
    for a in arguments:
        a.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calculate_frechet_distance(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(2)), "means must have one shape"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.eye(3)), "covariances must have one shape"),
        ((np.zeros(3), np.eye(2), np.zeros(3), np.eye(2)), "covariances \\[d, d\\]"),
        ((np.zeros((1, 2)), np.eye(2), np.zeros((1, 2)), np.eye(2)), "means must have shape \\[d\\]"),
        ((1.0, 4.0, 3, 9), r"got \(\) and \(\). Were the features flattened\?"),
        (([1.0], 4.0, [3.0], 9.0), r"got \(1,\) and \(\). Were the features flattened\?"),
        ((np.zeros(2), np.ones(2), np.zeros(2), np.ones(2)), r"got \(2,\) and \(2,\). Were the features flattened\?"),
    ],
)
def test_bad_shapes(arguments, message):
    with pytest.raises(AssertionError, match=message):
        calculate_frechet_distance(*arguments)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_statistics(position, value):
    arguments = [np.zeros(2), np.eye(2), np.zeros(2), np.eye(2)]
    arguments[position].flat[0] = value
    with pytest.raises(ValueError, match=f"{('mu1', 'sigma1', 'mu2', 'sigma2')[position]} must be finite"):
        calculate_frechet_distance(*arguments)


def test_name_in_the_package():
    assert genperf.compat.pytorch_fid.calculate_frechet_distance is calculate_frechet_distance


def test_negative_strides():
    (mean1, cov1), (mean2, cov2) = statistics(60, 5), statistics(60, 5, seed=1)
    reversed_first = calculate_frechet_distance(mean1[::-1], cov1[::-1, ::-1], mean2[::-1], cov2[::-1, ::-1])
    assert reversed_first == pytest.approx(calculate_frechet_distance(mean1, cov1, mean2, cov2), rel=1e-9)
