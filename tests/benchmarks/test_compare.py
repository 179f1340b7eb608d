# SPDX-License-Identifier: Apache-2.0
"""`genperf bench --compare`: two builds of genperf, timed in turn."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genperf
from genperf._errors import UserError
from genperf.cli import bench

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compare
import compare_worker

PACKAGES = Path(genperf.__file__).parents[1]


def test_a_build_compared_with_itself(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = ["--compare", str(PACKAGES), "--device", "cpu", "--quick", "--out", str(tmp_path), "-k", "eval"]
    assert bench.run(parser.parse_args(options)) == 0
    page = (tmp_path / "compare.md").read_text()
    assert page in capsys.readouterr().out
    *_, line = page.splitlines()
    workload, *times, outputs = line.strip("| ").split(" | ")
    assert (workload, outputs) == ("VectorQuantizer eval 1024, 64, 32", "equal")
    base_min, current_min, base_median, current_median = map(float, times[:4])
    assert 0 < base_min <= base_median
    assert 0 < current_min <= current_median
    ratios = [float(ratio.removesuffix("x")) for ratio in times[4:]]
    assert ratios == pytest.approx([base_min / current_min, base_median / current_median], rel=0.05)
    assert f"base: {PACKAGES}, {genperf._library.isa}; current: genperf {genperf.__version__}" in page


@pytest.mark.parametrize("workload", compare_worker.WORKLOADS)
def test_workloads_are_reproducible(workload, tmp_path):
    outputs = []
    for number in range(2):
        path = tmp_path / f"{number}.pt"
        compare_worker.Worker("cpu").prepare(workload, str(path))
        outputs.append(torch.load(path))
    assert all(output.isfinite().all() for output in outputs[0])
    assert compare.difference(*outputs) == ""


class FakeBuild:
    def __init__(self, name, log, seconds, failure=None):
        self.name, self.log, self.seconds, self.failure = name, log, seconds, failure

    def ask(self, what, **arguments):
        if self.failure:
            raise compare.WorkloadError(f"{self.name}: {self.failure}")
        if what == "prepare":
            torch.save([torch.ones(2) * self.seconds], arguments["outputs"])
            return {}
        self.log.append((self.name, arguments["calls"]))
        return {"seconds": [self.seconds] * arguments["calls"]}


def test_builds_take_turns():
    log = []
    builds = [FakeBuild("a", log, 0.02), FakeBuild("b", log, 0.01)]
    base, current = compare.in_turn(builds, compare.Budget(seconds=0.0, least=3, most=9))
    assert log == [("b", 1), *((name, 5) for name in "abbaab")]
    assert (base, current) == ([0.02] * 15, [0.01] * 15)
    log.clear()
    compare.in_turn(builds, compare.Budget(seconds=0.6, least=1, most=9))
    assert len(log) == 1 + 2 * 5


def test_lines(tmp_path):
    fast = compare.Budget(seconds=0.0, least=1, most=1)
    line = compare.line("w", [FakeBuild("base", [], 0.02), FakeBuild("current", [], 0.01)], tmp_path, fast)
    expected = ["w", "20", "10", "20", "10", "2.00x", "2.00x", "output 0 differs by 5.0e-01 of its largest value"]
    assert list(line.values()) == expected
    line = compare.line("w", [FakeBuild("base", [], 1), FakeBuild("current", [], 1, "AttributeError: x|y")], tmp_path, fast)
    assert list(line.values()) == ["w", *[""] * 6, "current: AttributeError: x/y"]


@pytest.mark.parametrize(
    ("base", "current", "expected"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "output 0: 1 of 2 integers differ"),
        (torch.tensor([100.0, 0]), torch.tensor([100.0, 0.009]), ""),
        (torch.tensor([100.0, 0]), torch.tensor([100.0, 0.02]), "output 0 differs by 2.0e-04 of its largest value"),
        (torch.tensor([1.0, 0]).double(), torch.tensor([1.0, 1e-6]).double(), "output 0 differs by 1.0e-06 of its largest value"),
        (torch.tensor([0.0]), torch.tensor([0.0]), ""),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), "output 0 differs by nan of its largest value"),
        (torch.tensor([1.0]), torch.tensor([1]), "other shapes or dtypes"),
    ],
)
def test_difference(base, current, expected):
    assert compare.difference([base], [current]) == expected


def test_import_times(tmp_path):
    builds = []
    for name in "ab":
        package = tmp_path / name / "genperf"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"import time\ntime.sleep({0.2 if name == 'a' else 0})\n")
        (tmp_path / name / "torch.py").touch()  # that of the installation takes seconds
        builds.append(FakeBuild(name, [], 0))
        builds[-1].folder = tmp_path / name
    (slow, other), (fast, another) = compare.imports(builds, 2)
    assert min(slow, other) > 0.2 > max(fast, another)


def test_a_build_that_cannot_be_imported(tmp_path):
    (tmp_path / "genperf").mkdir()
    (tmp_path / "genperf" / "__init__.py").write_text("raise ImportError('broken')\n")
    with pytest.raises(UserError, match=r"the process of the build in .* ended with exit code 1"):
        compare.Build("base", tmp_path, "cpu").describe()


SETUP = """
import os, pathlib, sys

package = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1], "genperf")
package.mkdir(parents=True)
(package / "__init__.py").write_text(pathlib.Path("version").read_text())
(package / "isas").write_text(os.environ.get("GENPERF_BUILD_ISAS", ""))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout whose build takes no compiler, with two commits."""
    folder = tmp_path / "checkout"
    (tmp_path / "work").mkdir()
    (folder / "csrc").mkdir(parents=True)
    (folder / "csrc" / "library.cpp").touch()
    (folder / "setup.py").write_text(SETUP)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for version in ("1", "2"):
        (folder / "version").write_text(version)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", version], check=True)
    monkeypatch.setattr(compare, "PACKAGES", folder)
    monkeypatch.setattr(compare._library, "isa", "amx")
    monkeypatch.delenv("GENPERF_BUILD_ISAS", raising=False)
    return folder


def test_a_revision_is_built_apart(repository, tmp_path):
    commit = compare.git(repository, "rev-parse", "HEAD~1")
    name, folder = compare.revision("HEAD~1", tmp_path / "work")
    assert name == f"HEAD~1 ({commit[:10]})"
    assert (folder / "genperf" / "__init__.py").read_text() == "1"
    assert (folder / "genperf" / "isas").read_text() == "x86-64-v4"
    assert compare.git(repository, "status", "--short") == ""
    assert compare.running() == f"genperf {genperf.__version__} ({compare.git(repository, 'rev-parse', '--short=10', 'HEAD')})"
    (repository / "version").write_text("3")
    assert compare.running().endswith("-dirty)")


def test_errors_of_revisions(repository, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--compare must be a git revision of .* or a folder with a built genperf, got 'nope'"):
        compare.revision("nope", tmp_path / "work")
    (repository / "setup.py").write_text("raise SystemExit(3)\n")
    subprocess.run(["git", "-C", str(repository), "add", "."], check=True)
    tree = compare.git(repository, "write-tree")
    commit = subprocess.run(
        ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.org", "commit-tree", tree, "-m", "broken"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    with pytest.raises(UserError, match=rf"could not build {commit[:10]} \(exit code 3\)"):
        compare.revision(commit, tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "PACKAGES", tmp_path)
    with pytest.raises(UserError, match="--compare needs a git checkout of genperf"):
        compare.revision("HEAD", tmp_path / "work")
