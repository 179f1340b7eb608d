# SPDX-License-Identifier: Apache-2.0
"""What a quarter of an hour with a GPU should tell.

python benchmarks/gpu_report.py measure --out FOLDER      at most 9 minutes: installs genperf, checks it and times it
python benchmarks/gpu_report.py test --out FOLDER         at most 3 minutes: runs the tests on the GPU
python benchmarks/gpu_report.py render FOLDER [FOLDER...] writes the results page, the chart and README's table

Each step is a process with a time limit of its own; nothing stops the rest. FOLDER gets records.jsonl, with a line for every result as
soon as it is known, and log.txt. Nothing needs a network: genperf is installed from a wheel in --wheels that fits this Python and torch, or
compiled here.
--rehearse runs every step in miniature with the CPU in place of the GPU.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from workloads import GPU_GOALS  # isort: skip

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
MEASURE_SECONDS, TEST_SECONDS = 540, 180
TEST_PROCESSES, SECONDS_PER_TEST = 14, 60
COUNTERS = (
    "gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed,gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed,"
    "lts__t_bytes.sum,smsp__inst_executed.sum,sm__inst_executed_pipe_tensor.sum,launch__registers_per_thread,"
    "sm__warps_active.avg.pct_of_peak_sustained_active"
)
STREAMING = ("gaussian_sample", "gumbel_sample", "interpolate", "gradient_norm_penalty", "minibatch_similarity", "implicit_codebooks")


class Step(NamedTuple):
    name: str
    seconds: int
    command: list[str]
    tool: str | None = None  # an executable without which the step is skipped


class Run(NamedTuple):
    """Where the results of a call go, and until when it may run."""

    out: Path
    rehearse: bool
    deadline: float

    def record(self, **facts: object) -> None:
        with open(self.out / "records.jsonl", "a") as file:
            file.write(json.dumps(facts) + "\n")

    def do(self, step: Step, environment: dict[str, str] | None = None) -> bool:
        """Run a step within its limit and the time that is left; record how it ended. Whether it succeeded."""
        seconds = min(step.seconds, self.deadline - time.monotonic())
        if step.tool is not None and shutil.which(step.tool) is None:
            self.record(step=step.name, status=f"skipped: no {step.tool}")
            return False
        if seconds < 1:
            self.record(step=step.name, status="skipped: no time left")
            return False
        start = time.monotonic()
        with open(self.out / "log.txt", "ab") as log:
            log.write(f"\n===== {step.name}: {' '.join(step.command)}\n".encode())
            log.flush()
            records = str((self.out / "records.jsonl").resolve())
            variables = {**os.environ, "PYTHONUNBUFFERED": "1", "GENPERF_RECORDS": records, **(environment or {})}
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(step.command, cwd=FOLDER, env=variables, start_new_session=True, **streams)
            try:
                code = process.wait(seconds)
                status = "ok" if code == 0 else f"failed: exit code {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"stopped after {seconds:.0f} s"
        self.record(step=step.name, status=status, seconds=round(time.monotonic() - start, 1))
        print(f"{step.name:<12} {status}, {time.monotonic() - start:.0f} s", flush=True)
        return status == "ok"


def measuring_steps(rehearse: bool, out: Path) -> list[Step]:
    """In the order of their worth, so that what time cuts off is worth least."""
    rehearsed = ["--rehearse"] if rehearse else []

    def step(name: str, seconds: int, function: str | None = None, prefix: list[str] | None = None, tool: str | None = None) -> Step:
        command = [*(prefix or []), sys.executable, str(FOLDER / "gpu_steps.py"), function or name, *rehearsed]
        return Step(name, seconds, command, tool)

    def benchmark(name: str, seconds: int, ops: tuple[str, ...], expression: str, quick: bool = True) -> Step:
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={FOLDER}"]
        command += [f"--confcutdir={FOLDER}", f"--device={'cpu' if rehearse else 'cuda'}", *["--quick"] * quick, "-k", expression]
        command += ["--benchmark-disable"] if rehearse else ["--benchmark-enable", "--benchmark-warmup=off"]
        return Step(name, seconds, [*command, *(f"bench_{op}.py" for op in ops)])

    counters = ["ncu", "--clock-control", "none", "--csv", "--log-file", str(out.resolve() / "counters.csv"), "--metrics", COUNTERS]
    checker = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    goals = " or ".join(f"{workload.name}-N" for workload in GPU_GOALS)
    rivals = f"({goals}) and (flash or cdist or genperf) and not same"
    return [
        step("facts", 30),
        step("search", 80),
        step("tiles", 100),
        benchmark("ceilings", 40, ("ceilings",), "copy or product"),
        step("smoke", 90),
        benchmark("rivals", 80, ("nearest_code",), rivals, quick=False),
        benchmark("streaming", 90, STREAMING, "not compile"),
        benchmark("quantizers", 70, ("vector_quantize", "residual_vector_quantize"), "not compile"),
        benchmark("frechet", 60, ("frechet_distance",), "(genperf or cached) and (768 or 2048)"),
        step("invariants", 70),
        step("counters", 60, "counted", counters, "ncu"),
        step("memcheck", 60, "checked", [*checker, "memcheck"], "compute-sanitizer"),
        step("racecheck", 60, "checked", [*checker, "racecheck"], "compute-sanitizer"),
    ]


def install(run: Run, wheels: Path) -> bool:
    """Install genperf from a wheel that fits, or compile it here for this GPU and processor."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--force-reinstall"]
    found = sorted(wheels.glob("genperf-*.whl"))
    loaded = "from genperf import _library; raise SystemExit(_library.cpu_failure or _library.cuda_failure)"
    check = [sys.executable, "-c", loaded]
    if found and run.do(Step("wheel", 40, [*pip, str(found[-1])])) and run.do(Step("loads", 30, check)):
        return True
    capability = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    archs = subprocess.run([sys.executable, "-c", capability], capture_output=True, text=True).stdout.strip()
    variables = {"GENPERF_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs, "GENPERF_BUILD_ISAS": "x86-64-v3 x86-64-v4", "MAX_JOBS": "16"}
    return run.do(Step("build", 150, [*pip, "-v", "--no-build-isolation", str(ROOT)]), variables) and run.do(Step("loads", 30, check))


def measure(run: Run, wheels: Path) -> None:
    if not run.rehearse:
        install(run, wheels)
    for step in measuring_steps(run.rehearse, run.out):
        run.do(step, {"OMP_NUM_THREADS": "1"} if run.rehearse else None)


def test(run: Run) -> None:
    """The tests that take a device, each with a time limit, in many processes; results are in log.txt as they come."""
    tests = ROOT / "tests"
    files = [str(path) for path in sorted(tests.rglob("test_*.py")) if re.search(r"def test.*\bdevice\b", path.read_text())]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    command += [f"--rootdir={tests}", f"--confcutdir={tests}"]
    if run.rehearse:
        files, command = [file for file in files if "test_interpolate" in file], [*command, "--device=cpu"]
    else:
        command += ["--device=cuda", "-v", "-n", str(TEST_PROCESSES), f"--timeout={SECONDS_PER_TEST}"]
    run.do(Step("tests", TEST_SECONDS, [*command, *files]))
    log = (run.out / "log.txt").read_text(errors="replace")
    ends = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", log)[-4:]
    failures = [" ".join(line)[:300] for line in re.findall(r"^(?:FAILED|ERROR) (\S+)(.*)$", log, re.MULTILINE)]
    run.record(step="tests", **{outcome: int(number) for number, outcome in ends}, failures=failures[:50])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, seconds in (("measure", MEASURE_SECONDS), ("test", TEST_SECONDS)):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        command.add_argument("--rehearse", action="store_true")
        command.add_argument("--seconds", type=float, default=seconds, help="for everything together (%(default)s)")
        command.add_argument("--wheels", type=Path, default=ROOT / "dist", metavar="FOLDER", help="with a wheel of genperf (dist)")
    command = commands.add_parser("render")
    command.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="with records.jsonl")
    command.add_argument("--out", type=Path, default=FOLDER / "results", metavar="FOLDER")
    command.add_argument("--name", help="of the files (the device's)")
    command.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="whose GPU table is written")
    arguments = parser.parse_args()
    if arguments.command == "render":
        from gpu_page import render

        render(arguments.folders, arguments.out, arguments.name, arguments.readme)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.out, arguments.rehearse, time.monotonic() + arguments.seconds)
    if arguments.command == "measure":
        measure(run, arguments.wheels)
    else:
        test(run)


if __name__ == "__main__":
    main()
