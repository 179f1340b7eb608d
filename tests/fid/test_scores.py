# SPDX-License-Identifier: Apache-2.0
"""The scores of `genperf fid` against direct formulas."""

import numpy as np
import pytest
from digits_world import DIGITS, PER_CLASS, assert_fails, direct_terms, features_of, fid, fid_json, statistics_of


def test_distance_of_folders_of_digits(world, extractors, capsys):
    results = {}
    for name in ("low_again", "high"):
        result = fid_json(capsys, world / "low", world / name, *DIGITS)
        means, traces = direct_terms(
            *statistics_of(features_of(extractors, world / "low")), *statistics_of(features_of(extractors, world / name))
        )
        assert result["distance"] == pytest.approx(means + traces, rel=1e-6)
        assert result["mean_term"] == pytest.approx(means, rel=1e-6)
        assert result["trace_term"] == pytest.approx(traces, rel=1e-5)
        assert result["n"] == [5 * PER_CLASS] * 2
        assert result["d"] == 16
        assert result["files"] == [str(world / "low"), str(world / name)]
        assert result["extractor"] == "fid_extractors:Digits"
        assert result["biased"] is False
        assert result["seconds"] > 0
        results[name] = result["distance"]
    assert 0 < 3 * results["low_again"] < results["high"]
    assert fid_json(capsys, world / "low", world / "low", *DIGITS)["distance"] == pytest.approx(0, abs=1e-6 * results["high"])


def test_scores_must_be_finite(tmp_path, capsys):
    features = np.random.default_rng(0).normal(size=(9, 4))
    np.save(tmp_path / "a.npy", features)
    np.save(tmp_path / "b.npy", features * 1e100)
    np.save(tmp_path / "c.npy", features * 1e200)
    np.savez(tmp_path / "d.npz", mu=np.full(4, 1e200), sigma=np.eye(4))
    for other in ("c.npy", "d.npz"):
        for options in ((), ("--json",)):
            sentence = f"'.*a.npy' and '.*{other}' must be small enough for a finite distance"
            assert_fails(capsys, [tmp_path / "a.npy", tmp_path / other, *options], sentence)
    assert_fails(capsys, [tmp_path / "a.npy", tmp_path / "b.npy", "--kid"], "must be small enough for a finite kid")
    assert_fails(capsys, ["--save-stats", tmp_path / "e.npz", tmp_path / "c.npy"], "cannot be written: cov must be finite", tmp_path)


@pytest.mark.parametrize("biased", [False, True])
def test_saved_statistics(world, extractors, tmp_path, capsys, biased):
    options = (*DIGITS, *(["--biased"] if biased else []))
    out = tmp_path / "low.npz"
    result = fid_json(capsys, "--save-stats", out, world / "low", *options)
    assert result["saved"] == str(out)
    assert result["n"] == [5 * PER_CLASS]
    assert result["d"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["low.npz"]
    mean, cov = statistics_of(features_of(extractors, world / "low"), correction=0 if biased else 1)
    with np.load(out) as arrays:  # as pytorch-fid reads it
        np.testing.assert_allclose(arrays["mu"][:], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(arrays["sigma"][:], cov, rtol=1e-5, atol=1e-6)
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    direct = fid_json(capsys, world / "low", world / "high", *options)
    assert fid_json(capsys, out, world / "high", *options)["distance"] == pytest.approx(direct["distance"], rel=1e-9)
    assert fid("--save-stats", tmp_path / "again.npz", world / "low", *options) == 0
    assert f"written          {tmp_path / 'again.npz'}" in capsys.readouterr().out


def test_kernel_inception_distance(world, extractors, capsys):
    low, high = (features_of(extractors, world / side) for side in ("low", "high"))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(low)
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (low, high))
    expected = within - 2 * kernel(low, high).mean()
    # Subsets of all samples are identical.
    kid = fid_json(capsys, world / "low", world / "high", *DIGITS, "--kid", "--kid-subsets", 2)["kid"]
    assert kid["mean"] == pytest.approx(expected, rel=1e-4)
    assert kid["std"] == pytest.approx(0, abs=1e-5 * expected)
    assert kid["subset_size"] == n
    options = ("--kid", "--kid-subsets", 20, "--kid-subset-size", 50)
    first, again, other = (fid_json(capsys, world / "low", world / "high", *DIGITS, *options, "--seed", seed)["kid"] for seed in (1, 1, 2))
    assert first == again
    assert first["mean"] != other["mean"]
    assert abs(first["mean"] - expected) < 4 * first["std"]


@pytest.mark.parametrize("k", [2, 4])
def test_precision_and_recall(world, extractors, capsys, k):
    low, high = (features_of(extractors, world / side) for side in ("low", "high"))

    def covered(points, support):
        """Share of `points` within the k-th-neighbor radius of a point of `support`."""
        radii = np.sort(np.linalg.norm(support[:, None] - support[None], axis=-1), axis=1)[:, k]
        return (np.linalg.norm(points[:, None] - support[None], axis=-1) <= radii).any(1).mean()

    result = fid_json(capsys, world / "low", world / "high", *DIGITS, "--precision-recall", "--neighbors", k)
    assert result["precision"] == pytest.approx(covered(high, low), abs=1.01 / (5 * PER_CLASS))
    assert result["recall"] == pytest.approx(covered(low, high), abs=1.01 / (5 * PER_CLASS))
    assert 0 < result["precision"] < 1
