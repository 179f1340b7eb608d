"""`genperf bench`: every op against plain PyTorch, torch.compile and the best rivals here, as one report."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .._errors import UserError, import_extra
from . import options

HELP = "measure every op beside plain PyTorch and its rivals, and write one report"

_DESCRIPTION = """\
Measure every op beside plain PyTorch, torch.compile and the best rivals that are installed, each first checked for the same result.
Writes NAME.json, NAME.md and NAME.png: the machine and its ceilings, a line for every op and size, every contender, a chart. Rows in which
genperf is slower stay, and are in bold. A quiet machine and some 30 minutes are needed, or a few with --quick.

exit codes: 0; 1 where a benchmark failed, which the report then lacks; 2 with a sentence on stderr after a mistake; 130 after Ctrl-C.
"""

_PACKAGE = Path(__file__).parents[1]
_NONE_SELECTED = 5  # exit code of pytest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("-k", metavar="OPS", help="only what matches, as pytest's -k: 'nearest_code', 'gumbel_sample or interpolate'")
    parser.add_argument("--quick", action="store_true", help="of the searches only one of each kind of size")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for the report (%(default)s)")
    parser.add_argument("--name", help="of the report's files (the device's)")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("pytest_benchmark", "pytest-benchmark"), ("matplotlib", "matplotlib")):
        import_extra(module, package, "bench")
    device = options.device(arguments.device).type
    out, folder = Path(arguments.out).resolve(), benchmarks()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written, got {arguments.out!r}: {error.strerror}.") from error
    # Nothing of a pytest around this one, and nothing left beside the benchmarks, which may lie where packages are installed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="genperf-bench-") as temporary:
        measured = Path(temporary) / "measured.json"
        command = [sys.executable, "-m", "pytest", *sorted(path.name for path in folder.glob("bench_*.py"))]
        # Nothing of a project around the benchmarks, such as one whose .venv they are in.
        command += ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}", "-p", "no:cacheprovider", "-q", "-ra"]
        command += ["--benchmark-enable", "--benchmark-columns=min,median,rounds", f"--benchmark-json={measured}"]
        command += [f"--benchmark-storage=file://{temporary}", f"--device={device}"]
        command += ["--quick"] if arguments.quick else []
        # A report always has its ceilings.
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
            raise UserError(f"the report could not be written (exit code {written}); the message is above.")
    if failed:
        print("genperf: some benchmarks failed, as said above; the report lacks them.", file=sys.stderr)
    return failed


def benchmarks() -> Path:
    """The folder of the benchmarks: in the package, or beside it where the package is a checkout's."""
    installed = _PACKAGE / "benchmarks"
    return installed if installed.is_dir() else _PACKAGE.parent / "benchmarks"


def _entries(measured: Path) -> list[dict]:
    """What pytest-benchmark has written, whose file is empty where nothing was measured."""
    text = measured.read_text() if measured.exists() else ""
    return json.loads(text)["benchmarks"] if text else []
