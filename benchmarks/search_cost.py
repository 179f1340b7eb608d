# SPDX-License-Identifier: Apache-2.0
"""Estimated time of the search on an H200, from counts of the kernels as compiled: a model, not a measurement.

    python benchmarks/search_cost.py [--flash FOLDER] [--records FILE]... > benchmarks/results/search_cost.md

The kernels of genperf are those that a launch on a mock of the driver would compile. --flash: the unpacked wheel of flash-kmeans, whose
kernel is compiled the same way. --records: records.jsonl of gpu_report.py, whose times stand beside the estimates.
"""

import argparse
import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/cuda"))

from compiled import ALU, MATRIX, Compiled, compile_for  # noqa: E402
from genperf.kernels.nearest_code import launch  # noqa: E402
from genperf.kernels.nearest_code.shape import Shape  # noqa: E402
from mocked_driver import mocked_driver  # noqa: E402
from workloads import GPU_GOALS, SEARCHES, Workload  # noqa: E402

MULTIPROCESSORS, CLOCK = 132, 1.755e9
ISSUE, ALU_RATE, MATRIX_RATE = 128, 64, 4096  # a clock and multiprocessor: instructions of threads, of which the ALU's, float16 FLOPs
L2, MEMORY = 5.5e12, 4.0e12  # bytes a second
LAUNCH, ROUND_TRIP = 2e-6, 0.8e-6  # seconds between kernels that follow each other, and of a load with what waits for it
ENOUGH_WARPS = 16  # to multiply while others compare
ASSUMPTIONS = f"""
- An H200: {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9} GHz. In a clock each issues {ISSUE} instructions of threads, of which
  {ALU_RATE} compare or compute with integers (ALU), and does {MATRIX_RATE} float16 FLOPs.
  L2 cache: {L2 / 1e12} TB/s, memory: {MEMORY / 1e12} TB/s.
- The pass over the codes takes as long as the slowest of issue, ALU, matrix, L2 and memory, each as if alone and at its full rate. With
  fewer than {ENOUGH_WARPS} warps on a multiprocessor the products and the comparisons of their scores follow each other.
- Tiles of rows are divided evenly over the multiprocessors, and rounded up. Each tile of rows costs the instructions outside the loop
  over the codes once, loops that load once for each 64 columns.
- Each launch takes {LAUNCH * 1e6:.0f} us. Preparing the codes takes the time to issue its instructions,
  and at least {ROUND_TRIP * 1e6:.1f} us for each load that waits for the one before.
  Rows that the pass leaves open (a few percent on normal data) are left out.
- genperf reads float32, flash-kmeans float16 and norms of the points that are given (they are not timed); its kernel is not exact.
"""

MORE = tuple(Workload("ten-millions", 10_000_000, 20_000, d) for d in (128, 256)) + tuple(
    Workload("small-dimensions", 1 << 20, k, d) for k, d in ((8192, 64), (8192, 32), (16384, 16), (16384, 8))
)
COUNTED = {(1024, 128), (16384, 256), (20000, 128), (8192, 64), (8192, 32), (16384, 16), (16384, 8)}  # K, D of the table of counts


@dataclass(frozen=True)
class Pass:
    """A pass over the codes: its kernel, and how the work is divided."""

    compiled: Compiled
    n: int
    k: int
    depth: int
    block_n: int
    block_k: int
    row_bytes: int  # read and written for each row
    splits: int = 1  # of the codes
    columns: int | None = None  # multiplied in one turn of the loop, where that is not all of them

    def milliseconds(self) -> dict[str, float]:
        """Of each resource, and of the whole."""
        tiles_of_rows, tiles = math.ceil(self.n / self.block_n), math.ceil(self.k / self.block_k)
        turns = 1 if self.columns is None else math.ceil(self.depth / self.columns)
        tiles_of_item = math.ceil(tiles / self.splits)
        items = math.ceil(tiles_of_rows * self.splits / MULTIPROCESSORS)  # of the busiest multiprocessor
        threads = 32 * self.compiled.warps

        def operations(rate: int) -> float:
            def count(names: Iterable[str]) -> int:
                return sum(rate == ISSUE or name in ALU for name in names)

            compiled = self.compiled
            of_tile = turns * count(compiled.loop) + (0 if self.columns is None else count(compiled.around))
            once = count(compiled.rest) - (0 if self.columns is None else count(compiled.around))
            once += (max(1, math.ceil(self.depth / 64)) - 1) * sum(map(count, compiled.loading_loops))
            return items * threads * (tiles_of_item * of_tile + once) / (rate * CLOCK)

        flops = 2 * items * self.block_n * tiles_of_item * self.block_k * self.depth
        cost = {
            "issue": operations(ISSUE),
            "ALU": operations(ALU_RATE),
            "matrix": flops / (MATRIX_RATE * CLOCK),
            "L2": tiles_of_rows * tiles * self.block_k * self.depth * 2 / L2,
            "memory": self.n * self.row_bytes / MEMORY,
        }
        compute = max(cost["issue"], cost["ALU"])
        warps = min(self.compiled.programs, items) * self.compiled.warps
        together = max(cost["matrix"], compute) if warps >= ENOUGH_WARPS else cost["matrix"] + compute
        return {**{name: 1e3 * seconds for name, seconds in cost.items()}, "pass": 1e3 * max(together, cost["L2"], cost["memory"])}

    def counts(self) -> dict[str, Any]:
        turns = 1 if self.columns is None else math.ceil(self.depth / self.columns)
        names = turns * self.compiled.loop + (self.compiled.around if self.columns else [])
        scores = self.block_n * self.block_k / (32 * self.compiled.warps)
        return {
            "tile": f"{self.block_n} x {self.block_k}",
            "instructions a score": len(names) / scores,
            "of the ALU": sum(name in ALU for name in names) / scores,
            "matrix instructions a tile": sum(name in MATRIX for name in names),
            "bytes from L2 a score": 2 * self.depth / self.block_n,
            "registers": self.compiled.registers,
            "stack": self.compiled.stack,
            "shared, KB": self.compiled.shared / 1024,
            "programs x warps": f"{self.compiled.programs} x {self.compiled.warps}",
        }


_compiled: dict[tuple[str, str], Compiled] = {}


def compile_once(source: Any, options: dict[str, Any]) -> Compiled:
    """A kernel does not depend on the numbers of rows and codes, so that many sizes share it."""
    key = (source.hash(), str(options))
    if key not in _compiled:
        _compiled[key] = compile_for(90, source, options)
    return _compiled[key]


def genperf_pass(workload: Workload) -> tuple[Pass, float]:
    """The pass, and the milliseconds of everything else."""
    _, n, k, d = workload
    x, codebook = torch.empty(n, d, 1, device="meta"), torch.empty(k, d, device="meta")
    with mocked_driver(90) as driver:
        launch.nearest_code(x, codebook, None, False)
        shape = Shape(d, k, x.device)
    splits, _ = shape.split(n, 1)
    sources = {source.fn.__name__: (source, options) for source, options in driver.sources}
    columns = None if shape.held else shape.columns
    scan = compile_once(*sources["nearest_code_scan_kernel"])
    made = Pass(scan, n, k, shape.depth, shape.block_n, shape.block_k, 4 * d + 12 * splits + 8, splits, columns)
    # The center and the limit of lengths, the norms, the rounded codes, 32 columns at a time; repeated codes.
    turns = math.ceil(d / 32)
    prepare = compile_once(*sources["nearest_code_prepare_kernel"])
    instructions = len(prepare.rest) + (turns - 1) * sum(map(len, prepare.loading_loops))
    issue = math.ceil(shape.tiles / MULTIPROCESSORS) * instructions * 32 * prepare.warps / (ISSUE * CLOCK)
    preparation = max(issue, (4 + 3 * turns) * ROUND_TRIP, 6 * k * d / MEMORY)
    return made, 1e3 * (preparation + n * (12 * splits + 8) / MEMORY + 4 * LAUNCH)


def flash_kmeans_pass(module: types.ModuleType, workload: Workload) -> tuple[Pass, float] | None:
    _, n, k, d = workload
    d = max(16, triton.next_power_of_2(d))
    if d > 256:
        return None
    options = module._heuristic_euclid_config_h200_smallD(n, k, d, torch.float16)
    kernel = module._euclid_assign_kernel
    strides = {"x_b": n * d, "x_n": d, "x_d": 1, "c_b": k * d, "c_k": d, "c_d": 1, "xsq_b": n, "xsq_n": 1, "csq_b": k, "csq_k": 1}
    constants: dict[str, Any] = {f"stride_{name}": value for name, value in {**strides, "out_b": n, "out_n": 1}.items()}
    constants |= {"B": 1, "N": n, "K": k, "D": d, "D_PAD": module._pad_d(d)}
    constants |= {name: options[name] for name in ("BLOCK_N", "BLOCK_K")}
    pointers = {"x_ptr": "*fp16", "c_ptr": "*fp16", "x_sq_ptr": "*fp32", "c_sq_ptr": "*fp32", "out_ptr": "*i32"}
    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = compile_for(90, source, {name: options[name] for name in ("num_warps", "num_stages")})
    # Two kernels for the norms of the codes come before.
    return Pass(compiled, n, k, module._pad_d(d), options["BLOCK_N"], options["BLOCK_K"], 2 * d + 8), 1e3 * 3 * LAUNCH


def load_flash_kmeans(folder: Path) -> types.ModuleType:
    sys.modules["flash_kmeans"] = types.ModuleType("flash_kmeans")
    spec = importlib.util.spec_from_file_location("flash", folder / "flash_kmeans/assign_euclid_triton.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(paths: Iterable[Path]) -> dict[str, str]:
    """Milliseconds of the search by workload, with the device."""
    found, device = {}, ""
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            device = record.get("device", device)
            if record.get("step") == "search" and "eager_ms" in record:
                found[record["workload"]] = f"{record['eager_ms']:.3g} ({device})"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(text(row[name]) for name in head)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flash", type=Path, metavar="FOLDER")
    parser.add_argument("--records", type=Path, nargs="*", default=[], metavar="FILE")
    arguments = parser.parse_args()
    flash = None if arguments.flash is None else load_flash_kmeans(arguments.flash)
    times = measured(arguments.records)
    estimates, counts, seen = [], [], set()
    for workload in dict.fromkeys((*GPU_GOALS, *MORE, *SEARCHES)):
        name, n, k, d = workload
        print(name, n, k, d, file=sys.stderr, flush=True)
        passes = {"genperf": genperf_pass(workload)}
        if flash is not None and (found := flash_kmeans_pass(flash, workload)):
            passes["flash-kmeans"] = found
        costs = {contender: made.milliseconds() for contender, (made, _) in passes.items()}
        whole = {contender: costs[contender]["pass"] + rest for contender, (_, rest) in passes.items()}
        parts = {part: ms for part, ms in costs["genperf"].items() if part != "pass"}
        slowest = max(parts, key=lambda part: parts[part])
        row: dict[str, Any] = {"workload": name, "N, K, D": f"{n}, {k}, {d}", "genperf, ms": whole["genperf"]}
        row |= {"pass": costs["genperf"]["pass"], "limit": slowest}
        row |= {f"{part}": ms for part, ms in parts.items()}
        other = whole.get("flash-kmeans")
        row |= {"flash-kmeans, ms": other or "", "ratio": whole["genperf"] / other if other else "", "measured, ms": times.get(name, "")}
        estimates.append(row)
        if (k, d) in COUNTED and (k, d) not in seen:
            seen.add((k, d))
            counts += [{"K, D": f"{k}, {d}", "kernel": contender, **made.counts()} for contender, (made, _) in passes.items()]
    print("# The search on an H200, estimated\n")
    print(f"Nothing here was measured unless a column says so. Triton {triton.__version__}, sm_90; `python benchmarks/search_cost.py`.")
    print(f"{ASSUMPTIONS}\n## Estimated time\n\n{table(estimates)}\n\n## The loop over the codes as compiled\n\n{table(counts)}")


if __name__ == "__main__":
    main()
