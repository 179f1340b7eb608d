# SPDX-License-Identifier: Apache-2.0
"""`genperf bench --compare REV`: the running genperf and a build of another revision, timed in alternating turns.

Both register the same torch ops, so each gets a process of its own; one of them runs at a time. Their outputs are compared first.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from compare_worker import WORKLOADS
from measure import device_name
from modes import command, selected, write
from report import markdown, milliseconds
from torch import Tensor

import genperf
from genperf import _library
from genperf._errors import UserError
from genperf.cli import options

WORKER = Path(__file__).parent / "compare_worker.py"
PACKAGES = Path(genperf.__file__).parents[1]
IMPORT = "import genperf, with torch imported"
COLUMNS = ("base, min ms", "current, min ms", "base, median ms", "current, median ms", "speed-up, min", "speed-up, median", "outputs")
# How far outputs may differ, relative to the largest magnitude: float64, and narrower types.
TOLERANCES = {torch.float64: 1e-8}
TOLERANCE = 1e-4

TURN_SECONDS, MAXIMUM_CALLS = 0.05, 50


class Budget(NamedTuple):
    """How long a workload is measured: rounds of a turn of each build, for about so many seconds."""

    seconds: float
    least: int
    most: int


FULL, QUICK = Budget(6.0, 7, 40), Budget(0.5, 2, 10)


class WorkloadError(UserError):
    """A workload failed in a build, such as one of an op that this revision does not have."""


class Build:
    """A process that runs one build of genperf."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        self.name, self.folder = name, folder
        command = [sys.executable, str(WORKER), str(folder), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def describe(self) -> dict:
        """Its instruction set and number of threads."""
        found = self.ask("describe")
        if not Path(found["file"]).resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"--compare needs a genperf that can be imported from {self.folder}, got that of {found['file']}.")
        return found

    def ask(self, what: str, **arguments: object) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise UserError(f"the process of the build in {self.folder} ended with exit code {self.process.wait()}; its message is above.")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkloadError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def run(arguments: argparse.Namespace) -> int:
    """Compare the workloads that -k selects, and write a page; returns 1 where outputs differ."""
    chosen = selected([*WORKLOADS, IMPORT], arguments.k)
    device = options.device(arguments.device).type
    budget = QUICK if arguments.quick else FULL
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="genperf-compare-") as temporary, contextlib.ExitStack() as stack:
        name, folder = revision(arguments.compare, Path(temporary).resolve())
        builds = []
        for label, place in (("base", folder), ("current", PACKAGES)):
            builds.append(Build(label, place, device))
            stack.callback(builds[-1].close)
        base, current = (build.describe() for build in builds)
        lines = []
        for workload in chosen:
            print(workload, file=sys.stderr)
            lines.append(line(workload, builds, Path(temporary), budget))
    facts = [f"{device_name(device)}, {current['threads']} threads, torch {torch.__version__}", f"load {load:.2f} at the start"]
    blocks = [
        f"# genperf compared with {arguments.compare}",
        f"{command(arguments, '--compare', arguments.compare)}. {'; '.join(facts)}.",
        f"base: {name}, {base['isa']}; current: {running()}, {current['isa']}. The speed-up is the time of base over that of current.",
        markdown(lines),
    ]
    code = write("\n\n".join(blocks) + "\n", arguments, "compare")
    return code or int(any(row["outputs"] not in ("equal", "") for row in lines))


def line(workload: str, builds: list[Build], temporary: Path, budget: Budget) -> dict[str, str]:
    row = {"workload": workload, **dict.fromkeys(COLUMNS, "")}
    try:
        if workload == IMPORT:
            found = imports(builds, budget.least)
        else:
            paths = [temporary / f"outputs-{number}.pt" for number in range(2)]
            for build, path in zip(builds, paths, strict=True):
                build.ask("prepare", name=workload, outputs=str(path))
            row["outputs"] = difference(*(torch.load(path) for path in paths)) or "equal"
            found = in_turn(builds, budget)
    except WorkloadError as error:
        return {**row, "outputs": str(error).replace("|", "/")}
    for what, of in (("min", min), ("median", statistics.median)):
        base, current = (of(seconds) for seconds in found)
        row |= {f"base, {what} ms": milliseconds(base * 1e3), f"current, {what} ms": milliseconds(current * 1e3)}
        ratio = base / current
        row[f"speed-up, {what}"] = f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.3g}x"
    return row


def in_turn(builds: list[Build], budget: Budget) -> tuple[list[float], list[float]]:
    """Seconds of each call with each build, which take turns; the first of a round is the second of the next."""
    once = builds[1].ask("turn", calls=1)["seconds"][0]
    calls = max(1, min(MAXIMUM_CALLS, int(TURN_SECONDS / once)))
    rounds = int(max(budget.least, min(budget.most, budget.seconds / (2 * (calls + 1) * once))))
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found[which].extend(builds[which].ask("turn", calls=calls)["seconds"])
    return found


def imports(builds: list[Build], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of `import genperf` in new processes, in turn."""
    program = (
        "import sys; sys.path[0] = sys.argv[1]; import time, torch\n"  # in place of the current folder
        "start = time.perf_counter(); import genperf; print(time.perf_counter() - start)"
    )
    # The first round compiles byte code where there is none, and does not count.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for seconds, build in zip(found, builds, strict=True):
            command = [sys.executable, "-c", program, str(build.folder)]
            seconds.append(float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout))
    return found[0][1:], found[1][1:]


def difference(base: list[Tensor], current: list[Tensor]) -> str:
    """What differs between the outputs of two builds, "" for nothing; floats may differ by a tolerance, integers not at all."""
    if [(t.shape, t.dtype) for t in base] != [(t.shape, t.dtype) for t in current]:
        return "other shapes or dtypes"
    found = []
    for number, (a, b) in enumerate(zip(base, current, strict=True)):
        if not a.is_floating_point():
            if different := int((a != b).sum()):
                found.append(f"output {number}: {different} of {a.numel()} integers differ")
            continue
        allowed = TOLERANCES.get(a.dtype, TOLERANCE)
        error = (a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)
        if not error <= allowed:
            found.append(f"output {number} differs by {error:.1e} of its largest value")
    return "; ".join(found)


def revision(given: str, temporary: Path) -> tuple[str, Path]:
    """The name of what is compared with, and the folder that holds its built package `genperf`.

    Args:
        given: a git revision of this checkout, which is built, or a folder with a built package.
    """
    if Path(given, "genperf", "__init__.py").is_file():
        return given, Path(given).resolve()
    root = checkout()
    if root is None:
        raise UserError("--compare needs a git checkout of genperf around the package or the current folder, or a folder with a built one.")
    commit = git(root, "rev-parse", "--verify", "--quiet", f"{given}^{{commit}}")
    if commit is None:
        raise UserError(f"--compare must be a git revision of {root} or a folder with a built genperf, got {given!r}.")
    return f"{given} ({commit[:10]})", built(root, commit, temporary)


def built(root: Path, commit: str, temporary: Path) -> Path:
    """Build a commit with the compiler and flags of the environment, for the instruction set that is in use here."""
    print(f"building {commit[:10]}", file=sys.stderr)
    source, library = temporary / "source", temporary / "library"
    archive = temporary / "source.zip"
    if git(root, "archive", "--output", str(archive), commit) is None:
        raise UserError(f"--compare could not read the files of {commit} in {root}.")
    with zipfile.ZipFile(archive) as file:
        file.extractall(source)
    # With relative paths ccache finds what it compiled in another temporary folder.
    environment = {"CCACHE_BASEDIR": str(temporary), **os.environ}
    if _library.isa not in (None, "native"):
        environment.setdefault("GENPERF_BUILD_ISAS", _library.built_isa(_library.isa))
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(temporary / "objects"), "--build-lib", str(library)]
    if code := subprocess.run(command, cwd=source, env=environment, stdout=sys.stderr).returncode:
        raise UserError(f"--compare could not build {commit[:10]} (exit code {code}); the message is above.")
    return library


def checkout() -> Path | None:
    """The git checkout of genperf that holds the running package or else the current folder."""
    for place in (PACKAGES, Path.cwd()):
        top = git(place, "rev-parse", "--show-toplevel")
        if top and Path(top, "csrc", "library.cpp").is_file():
            return Path(top)
    return None


def running() -> str:
    """The running genperf: its version and, in a checkout, its commit."""
    described = git(PACKAGES, "describe", "--always", "--dirty", "--abbrev=10") if (PACKAGES / "setup.py").is_file() else None
    return f"genperf {genperf.__version__}" + (f" ({described})" if described else "")


def git(root: Path, *arguments: str) -> str | None:
    """What git prints, None if it fails."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("--compare needs git, which is not on PATH; a folder with a built genperf can be compared without it.") from error
    return result.stdout.strip() if result.returncode == 0 else None
