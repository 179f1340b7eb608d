"""Every benchmark runs, at a small size and without timing; what it verifies first is verified here too. And `genperf bench`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genperf._errors import UserError
from genperf.cli import bench

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import measure  # noqa: E402
import search_ratios  # noqa: E402
import turns  # noqa: E402
import workloads  # noqa: E402

# Of the many workloads of the searches, one of each kind of size.
SELECTED = "VQ-VAE-N or LDM-f8-N or SimVQ-N or not (nearest_code or vector_quantize)"


def test_benchmarks_run():
    scripts = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", "--benchmark-disable", "-k", SELECTED]
    command += [f"benchmarks/{script}" for script in scripts]
    # At these sizes threads would only wait for each other.
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout


def test_workloads_have_names_of_their_own():
    names = [workload.name for workload in workloads.SEARCHES]
    assert len(set(names)) == len(names)
    assert set(workloads.QUICK) <= {workload.name for workload in workloads.WORKLOADS}


def test_slow_rivals_are_skipped(monkeypatch):
    calls = []

    def slow_at_first():
        calls.append(None)
        time.sleep(0.2 if len(calls) == 1 else 0)
        return torch.ones(1)

    monkeypatch.setattr(measure, "MAXIMUM_SECONDS", 0.1)
    assert measure.first_result("it", slow_at_first, "cpu") == 1
    with pytest.raises(pytest.skip.Exception, match="a call of it takes 0 s"):
        measure.first_result("it", lambda: time.sleep(0.11), "cpu")


def test_ratios_of_the_search():
    missed, reached, unknown = 1e9, 1e-9, None
    lines = search_ratios.compared(100, 70, 12, (missed, reached, unknown))
    assert [line[""].partition(",")[0] for line in lines] == ["wrong rows of 100", *["extra MB"] * (len(lines) - 4), "ms", "ms", "ms"]
    assert lines[0]["genperf"] == "0"
    assert [line["reached"] for line in lines[-3:]] == ["no", "yes", ""]
    assert all(line["N, K, D"] == "100, 70, 12" for line in lines)
    ratios = [float(line["other"]) / float(line["genperf"]) for line in lines[-3:]]
    assert [float(line["ratio"].removesuffix("x")) for line in lines[-3:]] == pytest.approx(ratios, rel=0.02, abs=0.01)


def test_ratios_are_of_alternating_turns(monkeypatch):
    monkeypatch.setattr(turns, "SLOW_SECONDS", 0.1)
    calls = []

    def contender(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    ours, theirs = turns.in_turn(contender("a", 0), contender("b", 0.001))
    assert ours < theirs < 0.1
    assert "".join(calls) == "ab" + "aabb" * turns.ROUNDS
    calls.clear()
    _, theirs = turns.in_turn(contender("a", 0), contender("b", 0.12))
    assert theirs >= 0.12
    assert "".join(calls) == "ab" + "aab" * turns.ROUNDS_OF_SLOW


@pytest.mark.parametrize("layer", ["VectorQuantize", "ResidualVQ", "SimVQ", "FSQ", "LFQ"])
def test_ratios_of_layers(layer):
    pytest.importorskip("vector_quantize_pytorch")
    import quantizer_ratios

    options = {"ResidualVQ": {"num_quantizers": 2}, "FSQ": {"levels": [4, 4]}}.get(layer, {})
    dim = {"FSQ": 2, "LFQ": 4}.get(layer, 5)
    row = quantizer_ratios.compared(quantizer_ratios.Case(layer, (64, 16, dim), options, step=1e9))
    assert row["reached"] == "no"
    ours, theirs = (float(ms) for ms in row["step, ms"].split(" / "))
    assert float(row["step, ratio"].removesuffix("x")) == pytest.approx(theirs / ours, rel=0.05, abs=0.1)


def parse(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(options)


def test_bench_from_an_installed_package(tmp_path, monkeypatch, capfd):
    """Installed, the benchmarks are a part of the package, and around it may be a project with its own configuration."""
    package, out = tmp_path / "genperf", tmp_path / "out"
    installed = package / "benchmarks"
    installed.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("conftest", "measure", "workloads", "report", "bench_gradient_norm_penalty", "bench_nearest_code"):
        shutil.copy(ROOT / f"benchmarks/{name}.py", installed)
    before = sorted(installed.iterdir())
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --benchmark-disable --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise AssertionError('loaded')\n")
    monkeypatch.setattr(bench, "_PACKAGE", package)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Of the searches, --quick leaves out VQ-VAE-2 and TiTok.
    expression = "gradient_norm and not compile or nearest_code and genperf and not again and (VQ-VAE or TiTok)"
    assert bench.run(parse("--device", "cpu", "--quick", "--out", str(out), "--name", "here", "-k", expression)) == 0
    rows = json.loads((out / "here.json").read_text())
    step = "forward and backward, [64, 3, 64, 64]"
    assert [(row["workload"], row["contender"]) for row in rows] == [(step, "genperf"), (step, "PyTorch"), ("VQ-VAE", "genperf")]
    assert all(row["ms"] > 0 and row["rounds"] >= 1 for row in rows)
    assert f"| gradient_norm_penalty | {step} |" in capfd.readouterr().out
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]
    assert sorted(installed.iterdir()) == before


CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--device")
    parser.addoption("--quick", action="store_true")
"""
BENCHMARKS = """
import pytest

FACTS = {"device": "a CPU", "threads": 1, "torch": "2", "load": 0, "workload": "a size", "op": "an op", "contender": "genperf"}

def test_good(benchmark):
    benchmark.extra_info |= FACTS
    benchmark.pedantic(sum, ([1],))

def test_wrong(benchmark):
    assert sum([1]) == 2
"""


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A folder of benchmarks that are quick to load, in place of the real one."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "bench_few.py").write_text(BENCHMARKS)
    shutil.copy(ROOT / "benchmarks/report.py", folder)
    monkeypatch.setattr(bench, "benchmarks", lambda: folder)
    return folder


def test_bench_reports_what_passed(few, tmp_path, capfd):
    assert bench.run(parse("--device", "cpu", "--out", str(tmp_path / "out"))) == 1
    output = capfd.readouterr()
    assert "1 failed, 1 passed" in output.out
    assert "some benchmarks failed" in output.err
    assert (tmp_path / "out/a-CPU.md").read_text().count("| an op |") == 1


def test_bench_in_a_checkout_uses_its_benchmarks():
    assert (bench.benchmarks() / "measure.py").read_text() == (ROOT / "benchmarks/measure.py").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", "nothing"], "no benchmark can run here, of those that match -k 'nothing'"),
        (["-k", "wrong"], "every benchmark failed; .* of those that match -k 'wrong'"),
        (["-k", "a b"], r"could not run the benchmarks \(exit code 4\)"),
        (["--out", "file"], "--out must be a folder that can be written, got 'file'"),
    ],
)
def test_bench_errors(few, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        bench.run(parse("--device", "cpu", "--out", "out", *options))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(("module", "package"), [("pytest_benchmark", "pytest-benchmark"), ("matplotlib", "matplotlib")])
def test_bench_needs_its_extra(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {package} .* `pip install 'genperf\[bench\]'`"):
        bench.run(parse("--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
