# SPDX-License-Identifier: Apache-2.0
"""`genperf fid`: what it prints, its options and errors."""

import errno
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from genperf import metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "fid"))
import digits_world
from digits_world import DIGITS, PER_CLASS, assert_fails, fid, fid_json

_one_thread, world, extractors = digits_world._one_thread, digits_world.world, digits_world.extractors


def test_text(world, extractors, capsys):
    result = fid_json(capsys, world / "low", world / "high", *DIGITS, "--kid", "--precision-recall")
    assert fid(world / "low", world / "high", *DIGITS, "--kid", "--precision-recall") == 0
    printed = capsys.readouterr()
    shown = {line[:17].strip(): line[17:] for line in printed.out.splitlines()}
    assert float(shown["Frechet distance"]) == pytest.approx(result["distance"], rel=1e-5)
    assert float(shown["of means"]) == pytest.approx(result["mean_term"], rel=1e-5)
    assert float(shown["of covariances"]) == pytest.approx(result["trace_term"], rel=1e-5)
    assert float(shown["KID"].split(",")[0]) == pytest.approx(result["kid"]["mean"], rel=1e-4)
    for name in ("precision", "recall", "density", "coverage"):
        assert shown[name] == f"{result[name]:.4f}"
    assert shown["B"] == f"{5 * PER_CLASS} samples of 16 features, {world / 'high'}"
    assert "image" in printed.err  # the progress bar


def test_too_few_samples_warn(tmp_path, capsys):
    features = np.random.default_rng(0).normal(size=(9, 8))
    np.save(tmp_path / "enough.npy", features)
    np.save(tmp_path / "few.npy", features[:8])
    assert fid(tmp_path / "enough.npy", tmp_path / "few.npy") == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert re.search(r"^genperf: 8 samples of 8 features in '.*few.npy' have a singular covariance", warnings[0])


def test_interrupt_writes_nothing(world, extractors, tmp_path, capsys):
    assert fid("--save-stats", tmp_path / "a.npz", world / "low", "--extractor", "fid_extractors:interrupted") == 130
    assert capsys.readouterr().err.endswith("genperf: interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(world, extractors, tmp_path, monkeypatch, capsys):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez", fail)
    assert_fails(capsys, ["--save-stats", tmp_path / "a.npz", world / "low", *DIGITS], "cannot be written: the disk is full", tmp_path)


def test_statistics_that_cannot_be_written_are_kept(world, extractors, tmp_path, monkeypatch, capsys):
    save = metrics.save_statistics

    def full(path, *arguments):
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, *arguments)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(metrics, "save_statistics", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert fid("--save-stats", tmp_path / "a.npz", world / "low", *DIGITS) == 2
    (kept,) = (tmp_path / "temporary").iterdir()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"genperf: --save-stats '{tmp_path / 'a.npz'}' cannot be written: No space left on device; ")
    assert last.endswith(f"; the statistics are in '{kept}' instead.")
    assert fid_json(capsys, kept, world / "low", *DIGITS)["distance"] == pytest.approx(0, abs=1e-5)


def test_invalid_options(world, extractors, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", mu=np.zeros(16), sigma=np.eye(16))
    np.save(tmp_path / "three.npy", np.random.default_rng(0).normal(size=(3, 16)))
    low, statistics = world / "low", tmp_path / "a.npz"

    def fails(sentence, *arguments):
        assert_fails(capsys, [*arguments, *DIGITS], sentence, tmp_path)

    fails("two inputs are needed, or one with --save-stats, got one", low)
    fails("--save-stats takes one input, got two", low, low, "--save-stats", tmp_path / "b.npz")
    fails(
        "--save-stats takes one input and computes no distance, got it with --kid and --precision-recall",
        low,
        "--save-stats",
        tmp_path / "b.npz",
        "--kid",
        "--precision-recall",
    )
    fails("features or images are needed for --save-stats, got the statistics file", statistics, "--save-stats", tmp_path / "b.npz")
    fails("features or images are needed for --kid, got the statistics file '.*a.npz'", low, statistics, "--kid")
    fails("features or images are needed for --precision-recall, got", statistics, low, "--precision-recall")
    fails("--neighbors 3 needs at least 4 samples, got 3 in '.*three.npy'", tmp_path / "three.npy", low, "--precision-recall")
    for path in (statistics, tmp_path / "b.npy", tmp_path / "b", tmp_path / "none" / "b.npz"):
        fails("must name a new .npz file in a folder that can be written to, got '.*'", low, "--save-stats", path)
    fails("--device must be cpu, cuda or cuda:N, .* got 'tpu'", low, low, "--device", "tpu")


@pytest.mark.parametrize("module", ["PIL", "tqdm"])
def test_missing_package(world, extractors, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert_fails(capsys, [world / "low", world / "high", *DIGITS], r"needs the package .* `pip install 'genperf\[fid\]'`")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([f"--size={size}"], f"--size: must be N or WxH in pixels, got '{size}'")
        for size in ("0", "8x", "x8", "8x0", "-8", "8.5", "8x8x8", "")
    ]
    + [
        (["--batch-size", "0"], "--batch-size: must be a whole number of at least 1"),
        (["--workers", "0"], "--workers: must be"),
        (["--channels", "2"], "--channels: invalid choice"),
        (["--pixels", "float"], "--pixels: invalid choice"),
        (["--kid-subset-size", "1"], "--kid-subset-size: must be a whole number of at least 2"),
        (["--neighbors", "0"], "--neighbors: must be"),
    ],
)
def test_option_errors_state_the_rule(options, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        fid("A", "B", *options)
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err
