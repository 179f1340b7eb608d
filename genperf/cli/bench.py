# SPDX-License-Identifier: Apache-2.0
"""`genperf bench`: time every op beside its rivals, or the whole of genperf beside another build of it."""

import argparse
import errno
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .._errors import UserError, import_extra, reason
from . import options

_DESCRIPTION = """\
Measure every op beside plain PyTorch, torch.compile and the best rivals that are installed. Each is first checked for the same result.
Writes NAME.json, NAME.md and NAME.png: the machine and its ceilings, a line for every op and size, every contender, a chart. Rows in which
genperf is slower are in bold. This takes about 30 minutes on a quiet machine, or a few with --quick.

One of these options measures something else, and writes NAME.md:
  --in-turn      searches, quantizer layers and the training of a VQ-VAE, timed in alternating turns with a rival and compared with goals
  --compare REV  this genperf and a build of another git revision, timed in alternating turns, in milliseconds and as ratios
  --goals        the goals of genperf on a CPU, each beside its rival, timed in turn; with --full at all sizes
  --accuracy     errors of the ways to compute a Frechet distance on difficult covariances

exit codes: 0; 1 where a benchmark failed, a goal was missed or the outputs of two builds differ; 2 after an invalid option, with a sentence
on stderr; 130 after Ctrl-C.
"""

_PACKAGE = Path(__file__).parents[1]
_NONE_SELECTED = 5  # exit code of pytest

# For each mode the module of the benchmarks that runs it, and the packages it needs.
_MODES = {
    "in_turn": ("ratios", {"vector_quantize_pytorch": "vector-quantize-pytorch"}),
    "goals": ("goals", {}),
    "compare": ("compare", {}),
    "accuracy": ("frechet_cases", {"scipy": "scipy", "torchmetrics": "torchmetrics"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--in-turn", action="store_true", help="ratios to rivals, timed in turn, with goals")
    mode.add_argument(
        "--compare", type=options.path_text, metavar="REV", help="a git revision of this checkout, or a folder with a built genperf"
    )
    mode.add_argument("--goals", action="store_true", help="goals on a CPU, and whether they are reached")
    mode.add_argument("--accuracy", action="store_true", help="errors of Frechet distances")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU where there is one; the CPU for the modes that measure on it"
    )
    parser.add_argument("-k", metavar="OPS", help="only what matches, as pytest's -k: 'nearest_code', 'gumbel_sample or interpolate'")
    parser.add_argument("--quick", action="store_true", help="fewer sizes of the searches, or fewer rounds")
    parser.add_argument("--full", action="store_true", help="with --goals: all sizes")
    parser.add_argument(
        "--out", type=options.path_text, default="runs/bench", metavar="FOLDER", help="folder for what is written (%(default)s)"
    )
    parser.add_argument(
        "--name", type=options.path_text, help="name of the files that are written (that of the mode; for the report that of the device)"
    )


def run(arguments: argparse.Namespace) -> int:
    mode = next((mode for mode in _MODES if getattr(arguments, mode)), None)
    module, packages = _MODES[mode] if mode is not None else (None, {"matplotlib": "matplotlib"})
    for needed, package in {"pytest_benchmark": "pytest-benchmark", **packages}.items():
        import_extra(needed, package, "bench")
    if mode in ("in_turn", "goals", "accuracy") and arguments.device == "cuda":
        raise UserError(f"--{mode.replace('_', '-')} measures on the CPU, got --device cuda.")
    if arguments.full and mode != "goals":
        raise UserError("--full needs --goals.")
    try:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        if not os.access(arguments.out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written, got {arguments.out!r}: {reason(error)}.") from error
    if module is None:
        return _report(arguments)
    if str(benchmarks()) not in sys.path:
        sys.path.insert(0, str(benchmarks()))  # they import each other by plain names
    return importlib.import_module(module).run(arguments)


def _report(arguments: argparse.Namespace) -> int:
    """Run the benchmarks with pytest, and turn their measurements into the report."""
    device = options.device(arguments.device).type
    out, folder = Path(arguments.out).resolve(), benchmarks()
    # Without the settings of a surrounding pytest, and without byte code in the folder, which may be that of an installed package.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="genperf-bench-") as temporary:
        measured = Path(temporary) / "measured.json"
        command = [sys.executable, "-m", "pytest", *sorted(path.name for path in folder.glob("bench_*.py"))]
        # Without the configuration of a project around the benchmarks, such as one whose .venv they are in.
        command += ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}", "-p", "no:cacheprovider", "-q", "-ra"]
        command += ["--benchmark-enable", "--benchmark-columns=min,median,rounds", f"--benchmark-json={measured}"]
        command += [f"--benchmark-storage=file://{temporary}", f"--device={device}"]
        command += ["--quick"] if arguments.quick else []
        # The report always shows the ceilings.
        command += ["-k", f"({arguments.k}) or ceilings"] if arguments.k else []
        failed = subprocess.run(command, cwd=folder, env=environment).returncode
        if failed not in (0, 1, _NONE_SELECTED):
            raise UserError(f"pytest could not run the benchmarks (exit code {failed}); its message is above.")
        if not any(entry["extra_info"]["op"] != "ceiling" for entry in _entries(measured)):
            none = "every benchmark failed; pytest's message is above" if failed == 1 else "no benchmark can run here"
            raise UserError(f"{none}{f', of those that match -k {arguments.k!r}' if arguments.k else ''}.")
        report = [sys.executable, str(folder / "report.py"), str(measured), "--out", str(out)]
        report += ["--name", arguments.name] if arguments.name else []
        if written := subprocess.run(report, cwd=folder, env=environment).returncode:
            kept = _keep(measured)
            raise UserError(f"the report could not be written (exit code {written}); the message is above.{kept}")
    if failed:
        print("genperf: some benchmarks failed, as said above; the report lacks them.", file=sys.stderr)
    return failed


def _keep(measured: Path) -> str:
    """Copy the measurements, which took long, to a temporary file that stays; where to, for an error message."""
    try:
        with tempfile.NamedTemporaryFile(prefix="genperf-bench-", suffix=".json", delete=False) as file:
            file.write(measured.read_bytes())
    except OSError:
        return ""
    return f" The measurements are in {file.name!r}."


def benchmarks() -> Path:
    """The folder of the benchmarks: in an installed package, or beside the package in a checkout."""
    installed = _PACKAGE / "benchmarks"
    return installed if installed.is_dir() else _PACKAGE.parent / "benchmarks"


def _entries(measured: Path) -> list[dict[str, Any]]:
    """The measurements that pytest-benchmark wrote; its file is empty where nothing was measured."""
    text = measured.read_text() if measured.exists() else ""
    return json.loads(text)["benchmarks"] if text else []
