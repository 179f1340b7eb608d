# SPDX-License-Identifier: Apache-2.0
"""How every benchmark is timed, and what is recorded with a time."""

import ctypes
import gc
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genperf import __version__, _library

from report import row_of  # isort: skip

# For calls that take milliseconds, so that at least one round is undisturbed.
MANY_ROUNDS = 15
MINIMUM_SECONDS = 0.3
MAXIMUM_ROUNDS = 30
MAXIMUM_BYTES = 5e9
MAXIMUM_SECONDS = 4.0

# Rounds of two contenders in turn, and when the rival is slow.
TURNS, TURNS_OF_SLOW = 7, 3
SLOW_SECONDS = 1.0


def measure(
    benchmark,
    function: Callable[[], object],
    device: str,
    *,
    moved: int | None = None,
    least_rounds: int = 5,
    once: bool = False,
    **facts: object,
) -> None:
    """Time `function`, and record `facts` (op, workload and contender among them), `moved` and the peak memory.

    CPU: wall clock, for at least `least_rounds` rounds (a third of them if a call takes over a second) and 0.3 s; the minimum counts.
    CUDA: quantiles of device time with a cold L2 cache, and the wall clock of synchronized calls.

    Args:
        moved: the fewest bytes that the call must read and write.
        once: call it once, without a warm-up or a count of its memory; for calls that take a quarter of a minute.
    """
    benchmark.group = " ".join([f"{facts['op']} {facts['workload']}", *(f"{name}={facts[name]}" for name in "NKD" if name in facts)])
    benchmark.extra_info |= {
        "bytes": moved, "device": device_name(device), "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2), "torch": torch.__version__,
        "genperf": f"{__version__}, {_library.isa}" if device == "cpu" else __version__, **facts,
    }  # fmt: skip
    if benchmark.disabled:
        seconds = seconds_of(lambda: benchmark(function))
        record(step="benchmark", row={**benchmark.extra_info, "ms": seconds * 1e3})
        return
    if once:
        benchmark.pedantic(_synchronized(function, device), rounds=1, warmup_rounds=0)
        _record_row(benchmark)
        return
    benchmark.extra_info["extra_bytes"] = peak_extra_bytes(function, device)
    if device == "cuda":
        from triton.testing import do_bench

        benchmark.extra_info["device_ms"] = do_bench(function, quantiles=[0.2, 0.5, 0.8])
    seconds = seconds_of(_synchronized(function, device))
    rounds = int(min(max(least_rounds if seconds < 1 else max(2, least_rounds // 3), MINIMUM_SECONDS / seconds), MAXIMUM_ROUNDS))
    benchmark.pedantic(_synchronized(function, device), rounds=rounds)  # peak_extra_bytes has warmed it up
    _record_row(benchmark)


def record(**facts: object) -> None:
    """Append a line of JSON to the file that GENPERF_RECORDS names, if it names one."""
    if path := os.environ.get("GENPERF_RECORDS"):
        with open(path, "a") as file:
            file.write(json.dumps(facts) + "\n")


def _record_row(benchmark) -> None:
    stats = benchmark.stats.stats
    record(step="benchmark", row=row_of(benchmark.extra_info, {"min": stats.min, "rounds": stats.rounds}))


def in_turn(genperf: Callable[[], object], rival: Callable[[], object], rounds: int = TURNS) -> tuple[float, float]:
    """Shortest seconds of each, timed in alternating turns so that a change in the load of the machine meets both.

    A turn is two calls, of which the first absorbs the threads of the other contender that still spin; a slow rival has one.
    """
    genperf()
    slow = seconds_of(rival) > SLOW_SECONDS
    calls = 1 if slow else 2
    turns = [
        (min(seconds_of(genperf) for _ in range(2)), min(seconds_of(rival) for _ in range(calls)))
        for _ in range(min(rounds, TURNS_OF_SLOW) if slow else rounds)
    ]
    genperf_seconds, rival_seconds = zip(*turns, strict=True)
    return min(genperf_seconds), min(rival_seconds)


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def skip_too_large(contender: str, size: float) -> None:
    """Skip a contender that would hold more than `MAXIMUM_BYTES`."""
    if size > MAXIMUM_BYTES:
        pytest.skip(f"{contender} would hold about {size / 1e9:.0f} GB")


def first_result(contender: str, function: Callable[[], torch.Tensor], device: str) -> torch.Tensor:
    """What `function` returns; skips a contender whose call takes over `MAXIMUM_SECONDS`."""
    for _ in range(2):  # the first call may compile
        start = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds <= MAXIMUM_SECONDS:
            return result
    pytest.skip(f"a call of {contender} takes {seconds:.0f} s")


def peak_extra_bytes(function: Callable[[], object], device: str) -> int | None:
    """Peak memory of a call beyond what is allocated before it, results included; None where unknown."""
    function()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Memory that the allocator kept from earlier calls would hide what this one needs.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return match[1] if match else "CPU"


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def _synchronized(function: Callable[[], object], device: str) -> Callable[[], None]:
    def call() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return call
