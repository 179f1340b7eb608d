# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for an architecture without a GPU: what a thread uses, and the instructions of the loop over the codes."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from sass import Kernel, disassemble
from triton.backends.compiler import GPUTarget
from triton.compiler import compile

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# What a multiprocessor has, and the bytes of shared memory that each program takes beside its own.
REGISTERS, WARPS, PROGRAMS, RESERVED = 65536, {80: 64, 90: 64, 100: 64, 120: 48}, 32, 1024
SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}

MATRIX = ("HGMMA", "HMMA", "UTCHMMA")  # sm_90; sm_80 and sm_120; sm_100
# What the pipe of comparisons and integers executes.
ALU = ("FMNMX", "FMNMX3", "SEL", "FSEL", "FSETP", "ISETP", "LOP3", "PLOP3", "IADD3", "VIADD", "SHF", "LEA")


@dataclass(frozen=True)
class Compiled:
    """Counts of a kernel.

    Attributes:
        ptx: its text.
        registers: of a thread.
        stack: bytes of a thread's local memory.
        shared: bytes of shared memory of a program.
        warps: of a program.
        programs: on a multiprocessor at a time.
        loop: opcodes of the shortest loop that multiplies matrices.
        around: opcodes of the next loop around it, without its own.
        rest: opcodes outside it, with those around it.
        loading_loops: opcodes of each other loop that reads memory; they are part of `rest` too.
    """

    ptx: str
    registers: int
    stack: int
    shared: int
    warps: int
    programs: int
    loop: list[str]
    around: list[str]
    rest: list[str]
    loading_loops: list[list[str]]

    def per_score(self, rows: int, codes: int) -> tuple[float, float]:
        """Instructions in the loop of a thread for each score of a tile, and those of the ALU among them."""
        scores = rows * codes / (32 * self.warps)
        return len(self.loop) / scores, sum(name in ALU for name in self.loop) / scores


def compile_for(arch: int, source: Any, options: Mapping[str, Any]) -> Compiled:
    compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
        (instructions,) = disassemble(CUOBJDUMP, path, f"sm_{arch}" if arch == 80 else f"sm_{arch}a").values()
    used = {name: max(map(int, re.findall(rf"{name}:(\d+)", report))) for name in ("REG", "STACK", "LOCAL")}
    names = [instruction.opcode.split(None, 1)[0].split(".")[0] for instruction in instructions]
    loops = Kernel(instructions).loops()
    first, last = min(
        (loop for loop in loops if any(name in MATRIX for name in names[loop[0] : loop[1] + 1])),
        key=lambda loop: loop[1] - loop[0],
        default=(0, -1),
    )
    a, b = min(((a, b) for a, b in loops if a < first and b > last), key=lambda loop: loop[1] - loop[0], default=(first, last))
    around = names[a:first] + names[last + 1 : b + 1]
    others = [names[a : b + 1] for a, b in loops if (b < first or a > last) and "LDG" in names[a : b + 1]]
    of_warp = -(-used["REG"] * 32 // 256) * 256
    programs = min(REGISTERS // (of_warp * warps), SHARED_MEMORY[arch] // (shared + RESERVED), WARPS[arch] // warps, PROGRAMS)
    return Compiled(
        compiled.asm["ptx"], used["REG"], used["STACK"] + used["LOCAL"], shared, warps, programs,
        names[first : last + 1], around, names[:first] + names[last + 1 :], others,
    )  # fmt: skip
