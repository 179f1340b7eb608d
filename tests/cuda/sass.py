# SPDX-License-Identifier: Apache-2.0
"""Counts of the instructions that a thread of a compiled kernel executes.

The instructions of a kernel are a graph, whose edges are branches and the steps to the next instruction. A count is that of the
cheapest path that meets each given landmark, a part of an instruction's text, the given number of times: over a loop, from its first
instruction back to it, or over a whole kernel without a loop over elements. Landmarks choose the path of full, aligned vectors, for
example two loads of 16 bytes, a multiplier of Philox and a store of 16 bytes; the tails of rows and the rare operands of divisions,
which are calls, lie off it. An instruction counts whether or not its predicate holds.
"""

import heapq
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PHILOX = "-0x2daee0ad"  # the first multiplier of Philox, 0xd2511f53, as a signed number


@dataclass(frozen=True)
class Instruction:
    text: str
    address: int

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text)

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@")


def disassemble(cuobjdump: str | Path, compiled: Path, arch: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel for an architecture, by its mangled name."""
    text = subprocess.run([cuobjdump, "-sass", "-arch", arch, compiled], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in text.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?) ?;", section, re.MULTILINE)
        kernels[section.split(None, 1)[0]] = [Instruction(code, int(address, 16)) for address, code in lines]
    return kernels


class Kernel:
    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        numbers = {instruction.address: i for i, instruction in enumerate(instructions)}
        self.next = [[n for n in self._successors(i, numbers) if n < len(instructions)] for i in range(len(instructions))]

    def _successors(self, i: int, numbers: dict[int, int]) -> list[int]:
        instruction = self.instructions[i]
        opcode = instruction.opcode
        if opcode.startswith("BRA"):
            target = numbers[int(re.findall(r"0x[0-9a-f]+", opcode)[-1], 16)]
            conditional = instruction.predicated or re.search(r"\b!?U?P\d", opcode)
            return [target, i + 1] if conditional else [target]
        if opcode.startswith(("EXIT", "RET", "BRX", "TRAP")):
            return [i + 1] if instruction.predicated else []
        if opcode.startswith("CALL"):  # a subroutine for rare operands, which the cheapest path avoids
            return [i + 1] if instruction.predicated else []
        return [i + 1]

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, the longest first."""
        back = {}
        for i, targets in enumerate(self.next):
            for target in targets:
                if target <= i and self.instructions[i].opcode.startswith("BRA") and target != i:
                    back[target] = max(back.get(target, 0), i)
        return sorted(back.items(), key=lambda loop: loop[0] - loop[1])

    def path(self, start: int, end: int | None, landmarks: dict[str, int]) -> list[int] | None:
        """The cheapest path from instruction `start` back to `end`, or to the end of the kernel, through the landmarks."""
        names, wanted = list(landmarks), tuple(landmarks.values())
        queue = [(0, start, (0,) * len(names), None)]
        before = {}
        while queue:
            cost, i, met, previous = heapq.heappop(queue)
            text = self.instructions[i].text
            met = tuple(min(n + (name in text), most) for n, name, most in zip(met, names, wanted, strict=True))
            if (i, met) in before:
                continue
            before[i, met] = previous
            ends = end in self.next[i] if end is not None else "EXIT" in text
            if ends and met == wanted:
                return self._trace(before, (i, met))
            for n in self.next[i]:
                if n not in (start, end):
                    heapq.heappush(queue, (cost + 1, n, met, (i, met)))
        return None

    @staticmethod
    def _trace(before: dict, state: tuple | None) -> list[int]:
        path = []
        while state is not None:
            path.append(state[0])
            state = before[state]
        return path[::-1]

    def passes(self, landmarks: dict[str, int]) -> Iterator[list[int]]:
        """The cheapest pass of each loop that has one through the landmarks."""
        for first, _ in self.loops():
            path = self.path(first, first, landmarks)
            if path is not None:
                yield path

    def count(self, landmarks: dict[str, int], loop: bool) -> int:
        """Instructions of the cheapest pass over any loop, or of the cheapest path over the kernel, through the landmarks."""
        paths = list(self.passes(landmarks)) if loop else [self.path(0, None, landmarks)]
        lengths = [len(path) for path in paths if path is not None]
        assert lengths, f"no path has {landmarks}"
        return min(lengths)
