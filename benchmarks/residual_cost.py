# SPDX-License-Identifier: Apache-2.0
"""Estimated time of residual_vector_quantize on an H200, all quantizers in one launch beside a search and a launch for each: a model.

    python benchmarks/residual_cost.py > benchmarks/results/residual_cost.md

The kernels are compiled as a launch would, and the assumptions are those of search_cost.py.
"""

import math
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/cuda"))

from compiled import Compiled, compile_for
from genperf.kernels.nearest_code import residual_launch
from mocked_driver import mocked_driver
from search_cost import CLOCK, ISSUE, L2, LAUNCH, MEMORY, MULTIPROCESSORS, ROUND_TRIP, genperf_pass
from workloads import Workload

# Of a program between the codes of two quantizers: loads that wait for the one before, counted in the source; and instructions of a
# thread for 64 rows of 4 warps, counted along the usual way in the code for sm_90, and for each dimension.
ROUND_TRIPS, BETWEEN, BETWEEN_DIM = 14, 2000, 15
ASSUMPTIONS = f"""
- Those of search_cost.py for a search, and here the L2 cache counts for rows too: in a pass of the search for reading x twice and for
  writing and reading it rounded.
- At once: for each quantizer the slowest of the instructions, of the L2 cache (codes of the pass; the residual, read three times and
  written once; rounded rows, written and read; codes that are subtracted, and those that are added in the end), and of waiting, where
  programs are few: {ROUND_TRIPS} round trips of {ROUND_TRIP * 1e6:.1f} us, and 2 clocks for an instruction. Between the codes of two
  quantizers a thread executes {BETWEEN} + {BETWEEN_DIM} D instructions for 64 rows of 4 warps, and twice as many for 128.
- In steps: for each quantizer a search, and a kernel that reads and writes the residual and reads the codes. Of the search also the
  round trips of the kernels that settle rows.
- A launch takes {LAUNCH * 1e6:.0f} us on the device. The host, which launches 5 kernels for each quantizer in steps and 3 in all at
  once, is left out.
"""

SIZES = (
    *[(Workload("EnCodec", n, 1024, 128), q) for n, q in ((1000, 8), (1000, 32), (4800, 8), (10000, 8), (100000, 8), (100000, 32))],
    (Workload("DAC", 2360, 1024, 8), 9),
    *[(Workload("RQ-VAE", n, 256, d), 4) for n in (1000, 10000, 100000, 1000000) for d in (32, 64)],
    *[(Workload("more codes", n, k, 128), 8) for n in (1000, 100000) for k in (2048, 4096, 16384)],
    *[(Workload("more vectors", 1000000, 1024, d), 8) for d in (64, 128)],
)


def kernel_of(arch: int, workload: Workload, quantizers: int) -> tuple[Compiled, residual_launch.ResidualShape]:
    """The kernel that passes through all quantizers, as a launch would compile it, and its shape."""
    _, n, k, d = workload
    x, codebooks = torch.empty(n, d, 1), torch.empty(quantizers, k, d)
    with mocked_driver(arch) as driver:
        residual_launch.residual_vector_quantize(x, codebooks, None, None, False)
        shape = residual_launch.ResidualShape(d, k, x.device, n)
    (source, options), *_ = [found for found in driver.sources if "residual_quantize" in found[0].fn.__name__]
    return compile_for(arch, source, options), shape


def at_once(workload: Workload, quantizers: int) -> float:
    """Milliseconds in one launch."""
    _, n, k, d = workload
    compiled, shape = kernel_of(90, workload, quantizers)
    tiles_of_rows, tiles = math.ceil(n / shape.block_n), shape.tiles
    instructions = tiles * len(compiled.loop) + (BETWEEN + BETWEEN_DIM * d) * shape.block_n // (16 * compiled.warps)
    items = math.ceil(tiles_of_rows / MULTIPROCESSORS)  # of the busiest multiprocessor
    issue = items * 32 * compiled.warps * instructions / (ISSUE * CLOCK)
    waiting = math.ceil(items / compiled.programs) * (ROUND_TRIPS * ROUND_TRIP + 2 * instructions / CLOCK)
    rows = n * d * (4 * 4 + 2 * 2 + 2 * 4)
    cache = (tiles_of_rows * tiles * shape.block_k * shape.depth * 2 + rows) / L2
    prepare = (2 + 3 * math.ceil(d / 32)) * ROUND_TRIP + quantizers * 4 * k * d / MEMORY
    return 1e3 * (quantizers * max(issue, waiting, cache) + prepare + n * d * 8 / MEMORY + 3 * LAUNCH)


def in_steps(workload: Workload, quantizers: int) -> float:
    """Milliseconds in a search and a launch for each quantizer."""
    _, n, _, d = workload
    made, others = genperf_pass(workload)
    cost = made.milliseconds()
    search = max(cost["pass"], cost["L2"] + 1e3 * n * d * (2 * 4 + 2 * 2) / L2)
    step = LAUNCH + 2 * ROUND_TRIP + max(n * d * 8 / MEMORY, n * d * 16 / L2)
    return quantizers * (search + others + 1e3 * (step + ROUND_TRIPS // 2 * ROUND_TRIP))


def main() -> None:
    print("# All quantizers in one launch\n")
    print(f"Triton {triton.__version__}. Estimated by benchmarks/residual_cost.py, not measured.\n{ASSUMPTIONS}")
    print("| workload | N | K | D | quantizers | at once, ms | in steps, ms | ratio | chosen |\n|---|---|---|---|---|---|---|---|---|")
    for workload, quantizers in SIZES:
        once, steps = at_once(workload, quantizers), in_steps(workload, quantizers)
        name, n, k, d = workload
        chosen = "at once" if residual_launch.ResidualShape(d, k, 9, n).pays else "in steps"
        print(f"| {name} | {n} | {k} | {d} | {quantizers} | {once:.3f} | {steps:.3f} | {once / steps:.2f} | {chosen} |", flush=True)
    print("\nThe kernel as compiled:\n")
    print("| | D | tile | instructions a score | registers | stack | shared, KB | programs x warps |\n|---|---|---|---|---|---|---|---|")
    for arch in (80, 90, 100, 120):
        for n, d in ((1000, 128), (100000, 128), (100000, 64)):
            compiled, shape = kernel_of(arch, Workload("", n, 1024, d), 8)
            score = compiled.per_score(shape.block_n, shape.block_k)[0]
            tile, uses = f"{shape.block_n} x {shape.block_k}", f"{compiled.programs} x {compiled.warps}"
            used = f"{compiled.registers} | {compiled.stack} | {compiled.shared / 1024:.0f}"
            print(f"| sm_{arch} | {d} | {tile} | {score:.2f} | {used} | {uses} |", flush=True)


if __name__ == "__main__":
    main()
