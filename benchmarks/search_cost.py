"""Estimated time of the search on an H200, from counts of the compiled pass over the codes: a model, not a measurement.

    python benchmarks/search_cost.py [folder of the unpacked flash-kmeans wheel]

For each size: the issue slots, the pipe of comparisons and integers, the tensor cores, the L2 cache and the memory are each taken
as if alone, at full rate; the largest of them is the estimate, with at least 16 warps to a multiprocessor, and their overlap is
assumed to be perfect. With fewer warps a product and the comparisons of its scores follow each other. The instructions outside the loop
over the codes count once for each tile of rows. Launches, the second look at a few percent of the rows and the preparation of the
codes are left out, on both sides.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/cuda"))

from sass import Kernel, disassemble  # noqa: E402
from test_ahead_of_time import ALU, CUOBJDUMP, compile_triton  # noqa: E402
from test_ahead_of_time import types as argument_types  # noqa: E402

from genperf.kernels.nearest_code import scan  # noqa: E402
from genperf.kernels.nearest_code.shape import Shape  # noqa: E402

MULTIPROCESSORS, CLOCK = 132, 1.755e9
ISSUE, ALU_RATE, MATRIX = 128, 64, 4096  # a clock and multiprocessor: instructions of threads, operations, float16 FLOPs
L2, MEMORY = 5.5e12, 4.0e12  # bytes a second
SIZES = ((1048576, 1024, 128), (4194304, 1024, 128), (65536, 16384, 256), (10000000, 20000, 128), (10000000, 20000, 256),
         (1048576, 8192, 64), (1048576, 8192, 32), (1048576, 16384, 16), (1048576, 16384, 8))  # fmt: skip


def loop_and_rest(cubin: bytes, chunks: int) -> tuple[list[str], list[str], int]:
    """Opcodes in the loop over the codes and those outside it, where loops that load take `chunks` turns; and registers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (instructions,) = disassemble(CUOBJDUMP, path, "sm_90a").values()
        report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", report)))
    names = [instruction.opcode.split(None, 1)[0].split(".")[0] for instruction in instructions]
    loops = Kernel(instructions).loops()
    first, last = min((loop for loop in loops if "HGMMA" in names[loop[0] : loop[1] + 1]), key=lambda loop: loop[1] - loop[0])
    rest = names[:first] + names[last + 1 :]
    for a, b in loops:
        if (b < first or a > last) and "LDG" in names[a : b + 1]:
            rest += (chunks - 1) * names[a : b + 1]
    return names[first : last + 1], rest, registers


def estimate(n, k, depth, block_n, block_k, warps, compiled, in_bytes) -> dict[str, float]:
    """Milliseconds of each resource, and the whole."""
    loop, rest, registers = loop_and_rest(compiled.asm["cubin"], max(1, depth // 64))
    tiles, passes = -(-n // block_n), -(-k // block_k)
    threads = 32 * warps * tiles

    def operations(names, rate):
        alu = rate == ALU_RATE
        count = sum(name in ALU for name in names) if alu else len(names)
        return count * threads / (rate * MULTIPROCESSORS * CLOCK)

    programs = min(65536 // (32 * warps * registers), (227 << 10) // max(compiled.metadata.shared + 1024, 1))
    cost = {
        "issue": passes * operations(loop, ISSUE) + operations(rest, ISSUE),
        "ALU": passes * operations(loop, ALU_RATE) + operations(rest, ALU_RATE),
        "matrix": 2 * tiles * block_n * passes * block_k * depth / (MATRIX * MULTIPROCESSORS * CLOCK),
        "L2": tiles * passes * block_k * depth * 2 / L2,
        "memory": n * in_bytes / MEMORY,
    }
    compute = max(cost["issue"], cost["ALU"])
    serial = programs * warps < 16
    whole = max(cost["matrix"] + compute if serial else max(cost["matrix"], compute), cost["L2"], cost["memory"])
    per_score = 32 * warps / (block_n * block_k)
    return {
        **{name: 1e3 * seconds for name, seconds in cost.items()},
        "whole": 1e3 * whole,
        "a score": len(loop) * per_score,
        "ALU a score": sum(name in ALU for name in loop) * per_score,
        "registers": registers,
        "warps": programs * warps,
    }


def genperf(n, k, d):
    s = Shape(d, k, 9)
    options = {"COSINE": False, "PLANAR": False, "SPLITS": False, **s.scan_options()}
    compiled = compile_triton(scan.nearest_code_scan_kernel, argument_types("fp32"), options, 90)
    return estimate(n, k, s.depth, s.block_n, s.block_k, s.warps, compiled, 4 * d + 40)


def flash_kmeans(module, n, k, d):
    options = module._heuristic_euclid_config_h200_smallD(n, k, d, torch.float16)
    kernel = module._euclid_assign_kernel
    strides = {"x_b": n * d, "x_n": d, "x_d": 1, "c_b": k * d, "c_k": d, "c_d": 1, "xsq_b": n, "xsq_n": 1, "csq_b": k, "csq_k": 1}
    constants = {f"stride_{name}": value for name, value in {**strides, "out_b": n, "out_n": 1}.items()}
    depth = module._pad_d(d)
    constants |= {"B": 1, "N": n, "K": k, "D": d, "D_PAD": depth, "BLOCK_N": options["BLOCK_N"], "BLOCK_K": options["BLOCK_K"]}
    pointers = {"x_ptr": "*fp16", "c_ptr": "*fp16", "x_sq_ptr": "*fp32", "c_sq_ptr": "*fp32", "out_ptr": "*i32"}
    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    return estimate(n, k, depth, options["BLOCK_N"], options["BLOCK_K"], options["num_warps"], compiled, 2 * d + 8)


def main() -> None:
    flash = None
    if len(sys.argv) > 1:
        sys.modules["flash_kmeans"] = types.ModuleType("flash_kmeans")
        spec = importlib.util.spec_from_file_location("flash", Path(sys.argv[1]) / "flash_kmeans/assign_euclid_triton.py")
        flash = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(flash)
    print(f"Triton {triton.__version__}, sm_90; milliseconds, estimated")
    columns = ("whole", "matrix", "issue", "ALU", "L2", "memory", "a score", "ALU a score", "registers", "warps")
    print("| N, K, D | kernel |" + "".join(f" {name} |" for name in columns))
    print("|---|---|" + "---|" * len(columns))
    for n, k, d in SIZES:
        rows = {"genperf": genperf(n, k, d)}
        if flash is not None:
            rows["flash-kmeans"] = flash_kmeans(flash, n, k, d)
        for name, row in rows.items():
            print(f"| {n}, {k}, {d} | {name} |" + "".join(f" {row[column]:.3g} |" for column in columns), flush=True)


if __name__ == "__main__":
    main()
