# SPDX-License-Identifier: Apache-2.0
"""`genperf bench --in-turn` and `--accuracy`, and what the modes of `genperf bench` share."""

import argparse
import errno
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import genperf
from genperf._errors import UserError
from genperf.cli import bench

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("vector_quantize_pytorch")
import compare
import frechet_cases
import measure
import modes
import ratios
import workloads


def run(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(options))


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.1)
    calls = []

    def contender(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    genperf, rival = measure.in_turn(contender("a", 0), contender("b", 0.001))
    assert genperf < rival < 0.1
    assert "".join(calls) == "ab" + "aabb" * measure.TURNS
    calls.clear()
    _, rival = measure.in_turn(contender("a", 0), contender("b", 0.12))
    assert rival >= 0.12
    assert "".join(calls) == "ab" + "aab" * measure.TURNS_OF_SLOW


def test_ratios_of_a_search():
    missed, reached, unknown = 1e9, 1e-9, None
    lines = ratios.search_lines(workloads.Workload("small", 100, 70, 12), (missed, reached, unknown))
    assert [line[""].partition(",")[0] for line in lines] == ["wrong rows of 100", *["extra MB"] * (len(lines) - 4), "ms", "ms", "ms"]
    assert lines[0]["genperf"] == "0"
    assert [line["reached"] for line in lines[-3:]] == ["no", "yes", ""]
    assert all(line["N, K, D"] == "100, 70, 12" for line in lines)
    expected = [float(line["rival"]) / float(line["genperf"]) for line in lines[-3:]]
    assert [float(line["ratio"].removesuffix("x")) for line in lines[-3:]] == pytest.approx(expected, rel=0.02, abs=0.01)


def test_every_search_has_goals():
    assert [workload.name for workload in workloads.IN_TURN] == list(ratios.SEARCH_GOALS)
    assert all(len(ratios.search_goals(workload)) == len(ratios.RIVALS) for workload in workloads.IN_TURN)


@pytest.mark.parametrize("layer", ["VectorQuantize", "ResidualVQ", "SimVQ", "FSQ", "LFQ"])
def test_ratios_of_a_layer(layer):
    options = {"ResidualVQ": {"num_quantizers": 2}, "FSQ": {"levels": [4, 4]}}.get(layer, {})
    dim = {"FSQ": 2, "LFQ": 4}.get(layer, 5)
    line = ratios.layer_line(ratios.Layer(layer, (64, 16, dim), options, step=1e9))
    assert line["reached"] == "no"
    genperf, upstream = (float(ms) for ms in line["step, ms"].split(" / "))
    assert float(line["step, ratio"].removesuffix("x")) == pytest.approx(upstream / genperf, rel=0.05, abs=0.1)


def test_page_of_ratios(monkeypatch, tmp_path, capsys):
    """One row of each table; the exit code says whether a goal was missed."""
    workload, layer = workloads.Workload("small", 50, 30, 4), ratios.Layer("FSQ", (64, 16, 2), {"levels": [4, 4]})
    monkeypatch.setattr(ratios, "IN_TURN", (workload,))
    monkeypatch.setattr(ratios, "LAYERS", (layer,))
    monkeypatch.setattr(ratios, "search_goals", lambda workload: (1.0, None, None))
    monkeypatch.setattr(ratios, "in_turn", lambda genperf, rival, rounds: (1.0, 0.5))
    assert run("--in-turn", "--quick", "--out", str(tmp_path), "-k", "small or FSQ or vqvae", "--name", "here") == 1
    page = (tmp_path / "here.md").read_text()
    assert page in capsys.readouterr().out
    assert "| 50, 30, 4 | ms, faiss | 1000 | 500 | 0.50x | >= 1.0x | no |" in page
    assert "| FSQ | 64, 16, 2 | levels=[4, 4] |" in page
    assert "| loss, steps 10 to 10 |" in page
    assert run("--in-turn", "--quick", "--out", str(tmp_path), "-k", "FSQ") == 0
    page = (tmp_path / "in-turn.md").read_text()
    assert "FSQ" in page
    assert "Searches" not in page


def test_page_of_accuracy(tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    assert run("--accuracy", "--quick", "--out", str(tmp_path), "-k", "identical or (rank and against)") == 0
    page = (tmp_path / "frechet_cases.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("| identical |") == page.count("| rank 1 against full rank |") == 2
    assert page.count("\n| ") == 6
    kept = (Path(frechet_cases.__file__).parent / "results" / "frechet_cases.md").read_text()
    for line in page.splitlines():
        assert line.startswith(("# Errors", "`genperf", "| identical", "| rank")) or line in kept.splitlines()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (None, ["Search A 10", "layer b levels=[4, 4]", "layer c"]),
        ("LAYER", ["layer b levels=[4, 4]", "layer c"]),
        ("layer and not c or 10", ["Search A 10", "layer b levels=[4, 4]"]),
        ("not (a and (b or c))", []),
        ("levels=[4,", ["layer b levels=[4, 4]"]),
    ],
)
def test_selected_rows(expression, expected):
    names = ["Search A 10", "layer b levels=[4, 4]", "layer c"]
    if expected:
        assert modes.selected(names, expression) == expected
    else:
        with pytest.raises(UserError, match=r"no row matches -k .*; the rows are Search A 10; layer b"):
            modes.selected(names, expression)


@pytest.mark.parametrize(
    ("mode", "runs"),
    [(["--in-turn"], "ratios"), (["--accuracy"], "frechet_cases"), (["--compare", str(Path(genperf.__file__).parents[1])], "compare")],
)
def test_a_page_that_cannot_be_written_is_printed(mode, runs, tmp_path, monkeypatch, capsys):
    """The page before it stays whole, and what was measured is printed."""
    monkeypatch.setattr(ratios, "sections", lambda quick: {"Rows": {"row": lambda: [{"row": "measured"}]}})
    monkeypatch.setattr(frechet_cases, "report", lambda arguments: "measured\n")
    build = SimpleNamespace(describe=lambda: {"threads": 1, "isa": "none"}, close=lambda: None)
    monkeypatch.setattr(compare, "Build", lambda *arguments: build)
    monkeypatch.setattr(compare, "line", lambda *arguments: {"row": "measured", "outputs": "equal"})
    (tmp_path / "page.md").write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = [*mode, "--out", str(tmp_path), "--name", "page", *(["--device", "cpu", "-k", "eval"] if runs == "compare" else [])]
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"page\.md' cannot be written: No space left on device\."):
            run(*options)
    assert "measured" in capsys.readouterr().out
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.md", "before")]
    assert run(*options) == 0
    assert "measured" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--in-turn", "-k", "a b"], "-k must be words joined by and, or and not, got 'a b'"),
        (["--accuracy", "-k", "nothing"], "no row matches -k 'nothing'"),
        (["--in-turn", "--device", "cuda"], "--in-turn measures on the CPU, got --device cuda"),
    ],
)
def test_errors(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(*options, "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())
