# SPDX-License-Identifier: Apache-2.0
"""`genperf kmeans` and what it consists of: files of vectors, identifiers, stages that are resumed."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import genperf
from genperf import clustering
from genperf._errors import UserError
from genperf.cli.main import main
from genperf.clustering import run

CODES, STAGES = 8, 3


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    centers = 3 * generator.standard_normal((12, 5))
    x = (centers[generator.integers(12, size=400)] + generator.standard_normal((400, 5))).astype(np.float32)
    np.save(tmp_path / "data.npy", x)
    return x


def cluster(tmp_path, *options, data="data.npy", out="ids.npy"):
    sizes = ("--codes", str(CODES), "--stages", str(STAGES), "--iterations", "4", "--device", "cpu")
    return main(["kmeans", str(tmp_path / data), "--out", str(tmp_path / out), *sizes, *options])


def test_command(tmp_path, data, capsys):
    assert cluster(tmp_path, "--balance", "1.05", "--seed", "3") == 0
    ids, codebooks = np.load(tmp_path / "ids.npy"), np.load(tmp_path / "ids.codebooks.npy")
    assert (ids.shape, ids.dtype, codebooks.shape) == ((400, STAGES), np.int32, (STAGES, CODES, 5))
    report = json.loads((tmp_path / "ids.json").read_text())
    assert max(report["largest_cluster"]) <= 1.05
    rows, counts = np.unique(ids, axis=0, return_counts=True)
    assert report["distinct_identifiers"] == len(rows)
    assert report["colliding_vectors"] == counts[counts > 1].sum() > 0
    assert report["most_of_one_identifier"] == counts.max()
    residual, variance = data.astype(np.float64), data.astype(np.float64).var(0).sum()
    for stage in range(STAGES):
        residual = residual - codebooks[stage][ids[:, stage]]
        mean = np.square(residual).sum(1).mean()
        assert report["mean_squared_distance"][stage] == pytest.approx(mean, rel=1e-5)
        assert report["explained"][stage] == pytest.approx(1 - mean / variance, rel=1e-5)
        share = np.bincount(ids[:, stage], minlength=CODES) / 400
        assert report["perplexity"][stage] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        assert report["largest_cluster"][stage] == pytest.approx(share.max() * CODES)
    assert report["empty_codes"] == [0] * STAGES
    with Image.open(tmp_path / "ids.png") as picture:
        assert picture.width >= 400
    assert {path.name for path in tmp_path.iterdir()} == {"data.npy", "ids.npy", "ids.codebooks.npy", "ids.json", "ids.png"}
    printed = capsys.readouterr()
    assert f"{len(rows)} distinct; {counts[counts > 1].sum()} vectors share theirs, at most {counts.max()} the same one" in printed.out
    assert "stage 3, iteration 4: mean squared distance" in printed.err


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_weights_and_metric(tmp_path, data, metric, capsys):
    weights = np.random.default_rng(1).integers(0, 5, 400)
    np.save(tmp_path / "weights.npy", weights)
    assert cluster(tmp_path, "--metric", metric, "--weights", str(tmp_path / "weights.npy"), "--seed", "3", out="ids.npz") == 0
    with np.load(tmp_path / "ids.npz") as written:
        ids, codebooks = torch.from_numpy(written["ids"]), torch.from_numpy(written["codebooks"])
    x, mass = torch.from_numpy(data), torch.from_numpy(weights).double()
    single = genperf.kmeans(x, CODES, iterations=4, weights=mass, metric=metric, generator=torch.Generator().manual_seed(3))
    assert torch.equal(single.codebook, codebooks[0])
    assert torch.equal(single.indices, ids[:, 0].long())
    rows = (x if metric == "euclidean" else torch.nn.functional.normalize(x)).double()
    variance = mass @ (rows - mass @ rows / mass.sum()).square().sum(1) / mass.sum()
    report = json.loads((tmp_path / "ids.json").read_text())
    assert report["weight"] == mass.sum()
    for stage in range(STAGES):
        rows = rows - codebooks[stage][ids[:, stage].long()]
        mean = float(mass @ rows.square().sum(1) / mass.sum())
        assert report["mean_squared_distance"][stage] == pytest.approx(mean, rel=1e-5)
        assert report["explained"][stage] == pytest.approx(1 - mean / float(variance), rel=1e-5)
        share = np.bincount(ids[:, stage], weights, CODES) / weights.sum()
        assert report["largest_cluster"][stage] == pytest.approx(share.max() * CODES)
    progress = re.findall(r"stage 3, iteration 4: mean squared distance (\S+)", capsys.readouterr().err)
    assert float(progress[-1]) == pytest.approx(report["mean_squared_distance"][-1], rel=1e-4)


def test_a_stage_that_explains_no_variance_says_so(tmp_path, capsys):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((60, 16), np.float32))
    assert cluster(tmp_path, "--metric", "cosine", "--codes", "2", "--stages", "2") == 0
    report = json.loads((tmp_path / "ids.json").read_text())
    assert report["explained"][0] < 0 < report["explained"][1]
    assert f"explained    none, {report['explained'][1]:.2%} of the variance" in capsys.readouterr().out


def test_identifiers_are_those_of_the_quantizer(tmp_path, data):
    assert cluster(tmp_path, out="ids.npz") == 0
    with np.load(tmp_path / "ids.npz") as found:
        ids, codebooks = found["ids"], torch.from_numpy(found["codebooks"])
    assert np.array_equal(genperf.residual_vector_quantize(torch.from_numpy(data), codebooks)[1].numpy(), ids)
    assert not (tmp_path / "ids.codebooks.npy").exists()


def test_distinct_identifiers(tmp_path, data, capsys):
    assert cluster(tmp_path, "--distinct", "--json") == 0
    ids = np.load(tmp_path / "ids.npy")
    assert ids.shape == (400, STAGES + 1)
    assert len(np.unique(ids, axis=0)) == 400
    report = json.loads(capsys.readouterr().out)
    assert ids[:, -1].max() + 1 == report["most_of_one_identifier"]
    assert report["distinct_identifiers"] < 400


@pytest.mark.parametrize(
    "options", [(), ("--balance", "1.1"), ("--update", "ema", "--n-init", "2"), ("--metric", "cosine", "--weights", "weights.npy")], ids=str
)
def test_resumed_run_equals_uninterrupted_one(tmp_path, data, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    np.save("weights.npy", np.arange(400) % 3)
    assert cluster(tmp_path, *options) == 0
    fit_stage, stages = run.fit_stage, []

    def interrupted(data, done, *arguments):
        stages.append(len(done))
        if len(done) == 2:
            raise KeyboardInterrupt
        return fit_stage(data, done, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit_stage", interrupted)
        assert cluster(tmp_path, *options, out="parts.npy") == 130
    assert "with --resume continues" in capsys.readouterr().err
    assert (tmp_path / "parts.npy.resume").exists()
    assert not (tmp_path / "parts.npy").exists()

    assert cluster(tmp_path, *options, "--seed", "1", "--resume", out="parts.npy") == 2
    assert "seed was 0, got 1." in capsys.readouterr().err
    np.save("other.npy", np.arange(400) % 2)
    assert cluster(tmp_path, *options, "--weights", "other.npy", "--resume", out="parts.npy") == 2
    assert f"weights was {399.0 if options[-1:] == ('weights.npy',) else None}, got 200.0." in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(run, "fit_stage", lambda data, done, *rest: calls.append(len(done)) or fit_stage(data, done, *rest))
    assert cluster(tmp_path, *options, "--resume", out="parts.npy") == 0
    assert calls == [2, 0]  # the last stage, and the mean
    for name in ("{}.npy", "{}.codebooks.npy", "{}.png"):
        assert (tmp_path / name.format("ids")).read_bytes() == (tmp_path / name.format("parts")).read_bytes()
    whole, parts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ids", "parts"))
    assert whole | {"seconds": 0} == parts | {"seconds": 0}
    assert not (tmp_path / "parts.npy.resume").exists()


def test_formats_of_vectors(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "one.npz", a=x)
    np.savez(tmp_path / "two.npz", a=x, b=x + 1)
    np.save(tmp_path / "half.npy", x.astype(np.float16))
    np.save(tmp_path / "whole.npy", x.astype(np.uint8))
    np.save(tmp_path / "swapped.npy", x.astype(">f8"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(x))
    for name, key, dtype, offset in (
        ("one.npz", None, torch.float32, 0),
        ("two.npz", "b", torch.float32, 1),
        ("half.npy", None, torch.float16, 0),
        ("whole.npy", None, torch.float32, 0),
        ("swapped.npy", None, torch.float64, 0),
        ("columns.npy", None, torch.float32, 0),
    ):
        found = clustering.open_vectors(tmp_path / name, key)
        assert found.dtype == dtype
        assert torch.equal(found.double(), torch.from_numpy(x).double() + offset)


def test_parquet(tmp_path, data):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(data.ravel()), 5)
    parquet.write_table(pyarrow.table({"item": list(range(400)), "fixed": rows, "free": data.tolist()}), tmp_path / "data.parquet")
    for name in ("fixed", "free"):
        assert np.array_equal(clustering.open_vectors(tmp_path / "data.parquet", name).numpy(), data)
    assert cluster(tmp_path, "--name", "fixed", data="data.parquet", out="ids.parquet") == 0
    assert cluster(tmp_path) == 0
    table = parquet.read_table(tmp_path / "ids.parquet").to_pydict()
    assert np.array_equal(np.stack([table[f"code_{i}"] for i in range(STAGES)], 1), np.load(tmp_path / "ids.npy"))


@pytest.mark.parametrize("codes", [3, 1 << 40])
def test_collisions(codes):
    """With codes so large that a product of their numbers does not fit in 64 bits, too."""
    indices = torch.randint(3, (200, 4), generator=torch.Generator().manual_seed(0)) * (codes // 3)
    rows, counts = np.unique(indices.numpy(), axis=0, return_counts=True)
    assert clustering.collisions(indices) == (len(rows), counts[counts > 1].sum(), counts.max())
    numbers = clustering.number_collisions(indices)
    seen = {}
    for row, number in zip(indices.tolist(), numbers.tolist(), strict=True):
        assert number == seen.get(tuple(row), 0)
        seen[tuple(row)] = number + 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_collisions_of_narrow_indices(dtype):
    """As in ids.npy: products of the numbers of codes need more bits than the indices have."""
    indices = torch.tensor([[0, 1, 2], [256, 1, 2], [4095, 4095, 4095]]).to(dtype)
    assert clustering.collisions(indices) == (3, 0, 1)
    assert clustering.number_collisions(indices).tolist() == [0, 0, 0]


@pytest.mark.parametrize("function", [clustering.collisions, clustering.number_collisions])
def test_invalid_identifiers(function):
    for indices, error, message in (
        (torch.zeros(3, 2), TypeError, "indices must be integers, got torch.float32"),
        ([[1, 2]], TypeError, "indices must be a tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"indices must have shape \[N, stages\], neither of them 0, got \[3\]"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, r"got \[0, 2\]"),
    ):
        with pytest.raises(error, match=f"^{function.__name__}: .*{message}"):
            function(indices)


def test_errors(tmp_path, data, monkeypatch, capsys):
    np.savez(tmp_path / "two.npz", a=data, b=data)
    np.save(tmp_path / "flat.npy", data[0])
    np.save(tmp_path / "negative.npy", -np.ones(400, np.float32))
    weights = {name: str(tmp_path / f"{name}.npy") for name in ("flat", "negative", "data", "none")} | {"text": str(tmp_path / "data.txt")}
    np.save(tmp_path / "nan.npy", data * np.nan)
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    (tmp_path / "data.txt").write_text("1 2")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    cases = (
        ({"data": "none.npy"}, (), "vectors cannot be read from .*No such file"),
        ({"data": "data.txt"}, (), r"vectors must be in a file of \.npy, \.npz, \.parquet"),
        ({"data": "broken.npy"}, (), "vectors cannot be read"),
        ({"data": "flat.npy"}, (), r"a table of numbers \[N, D\], got float32 of shape \[5\]"),
        ({"data": "text.npy"}, (), "a table of numbers"),
        ({"data": "two.npz"}, (), "--name must be one of the arrays in '.*two.npz', which are a, b, got none"),
        ({"data": "two.npz"}, ("--name", "c"), "which are a, b, got 'c'"),
        ({}, ("--name", "c"), "one array without a name"),
        ({"data": "nan.npy"}, (), "x must be finite"),
        ({"out": "ids.txt"}, (), r"identifiers must go to a file of \.npy"),
        ({"out": "missing/ids.npy"}, (), "the state cannot be written"),
        ({}, ("--resume",), "there is nothing to resume"),
        ({}, ("--weights", weights["none"]), "weights cannot be read from .*No such file"),
        ({}, ("--weights", weights["text"]), r"weights must be in an \.npy file"),
        ({}, ("--weights", weights["flat"]), r"weights must be 400 numbers, one for each vector, got float32 \[5\]"),
        ({}, ("--weights", weights["data"]), r"weights must be 400 numbers, one for each vector, got float32 \[400, 5\]"),
        ({}, ("--weights", weights["negative"]), "weights must be finite and not negative"),
        ({}, ("--batch-size", "3"), 'batch_size is for update="ema"'),
    )
    for files, options, message in cases:
        assert cluster(tmp_path, *options, **files) == 2
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.fullmatch(rf"genperf: .*{message}.*\.", printed), printed
    (tmp_path / "ids.npy.resume").write_bytes(b"PK")
    assert cluster(tmp_path, "--resume") == 2
    assert "the state cannot be read" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow .*genperf\[cluster\]"):
        clustering.open_vectors(tmp_path / "data.parquet")
