# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs at a small size, with its checks and without timing; and the report of `genperf bench`."""

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
import workloads  # noqa: E402

# One of each kind of size of the many searches.
SELECTED = "VQ-VAE-N or LDM-f8-N or SimVQ-N or nearest_codes or not (nearest_code or vector_quantize)"


def test_benchmarks_run():
    scripts = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", "--benchmark-disable", "-k", SELECTED]
    command += [f"benchmarks/{script}" for script in scripts]
    # At these sizes threads only wait for each other.
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout


def test_workloads_have_unique_names():
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


def parse(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(options)


def test_bench_from_an_installed_package(tmp_path, monkeypatch, capfd):
    """Installed benchmarks are part of the package, and a project with its own configuration may surround them."""
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
    # --quick leaves out the searches VQ-VAE-2 and TiTok.
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
    """A folder of benchmarks that load fast, instead of the real one."""
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
        (["--full"], "--full needs --goals"),
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
