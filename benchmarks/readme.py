# SPDX-License-Identifier: Apache-2.0
"""README's tables of speed, from kept rows: what lies between `<!-- speed: NAME -->` and `<!-- /speed -->`."""

import re
from collections.abc import Callable

from report import Case, cases, machine, markdown, megabytes, milliseconds, times  # isort: skip
from workloads import GPU_GOALS  # isort: skip

_BLOCK = re.compile(r"(<!-- speed: (\w+) -->)(\s*).*?(\s*)(<!-- /speed -->)", re.DOTALL)

# What README's table calls an op and its size, and the op and the size of the rows.
_SHOWN = (
    ("`nearest_code`", "16,384 vectors, 512 codes, D 64", "nearest_code", "VQ-VAE, N = 16384, K = 512, D = 64"),
    ("`vector_quantize`, training step with EMA", "the same", "vector_quantize", "VQ-VAE, N = 16384, K = 512, D = 64"),
    (
        "`gumbel_sample` with a codebook, forward and backward",
        "[2, 8192, 32, 32], D 256",
        "gumbel_sample",
        "hard, 256-dimensional codes, forward and backward, [2, 8192, 32, 32]",
    ),
    ("`kmeans`, 10 iterations", "100,000 vectors, 1,024 codes, D 128", "kmeans", "embeddings, N = 100000, K = 1024, D = 128"),
    ("`gaussian_sample`, forward and backward", "[64, 8, 64, 64]", "gaussian_sample", "forward and backward, [64, 8, 64, 64]"),
    ("`gradient_norm_penalty`, forward and backward", "[64, 3, 64, 64]", "gradient_norm_penalty", "forward and backward, [64, 3, 64, 64]"),
    ("`frechet_distance`, float64", "2,048 features", "frechet_distance", "full rank, float64, D = 2048"),
)
# Ops that the rows of an earlier version lack; the table then goes without them.
_LATER = ("kmeans",)


def refreshed(text: str, rows: list[dict], name: str, block: str = "table") -> str:
    """README's text with one block made anew: "table" of a CPU's rows, or "gpu" of a GPU's.

    Raises:
        ValueError: README holds a block that is none of BLOCKS, or the rows lack what the block shows.
    """

    def fill(match: re.Match) -> str:
        start, found, before, after, end = match.groups()
        if found not in BLOCKS:
            raise ValueError(f"readme: a block must be one of {', '.join(BLOCKS)}, got {found!r}.")
        return f"{start}{before}{BLOCKS[found](rows, name)}{after}{end}" if found == block else match[0]

    return _BLOCK.sub(fill, text)


def _table(rows: list[dict], name: str) -> str:
    """The rows of _SHOWN, and the machine they were measured on."""
    found = {(case.op, case.size): case for case in cases(rows)}
    ops = {op for op, _ in found}
    shown = [row for row in _SHOWN if row[2] in ops or row[2] not in _LATER]
    for _, _, op, size in shown:
        if (op, size) not in found:
            raise ValueError(f"readme: README shows a time of {op} {size}, which the rows do not hold.")
    return _lines(rows, name, [_line(label, shown_size, found[op, size]) for label, shown_size, op, size in shown])


def _gpu_table(rows: list[dict], name: str) -> str:
    """The goal sizes of the search, and those of _SHOWN that the rows hold."""
    labels = {(op, size): (label, size if shown == "the same" else shown) for label, shown, op, size in _SHOWN}
    goals = {workload.name for workload in GPU_GOALS}
    shown = [
        case for case in cases(rows) if (case.op, case.size) in labels or (case.op == "nearest_code" and case.rows[0]["workload"] in goals)
    ]
    lines = [_line(*labels.get((case.op, case.size), (f"`{case.op}`", case.size)), case) for case in shown if case.rivals]
    if not lines:
        raise ValueError("readme: the rows hold nothing that README shows of a GPU.")
    return _lines(rows, name, lines)


def _line(label: str, size: str, case: Case) -> dict[str, str]:
    genperf, rival = case.genperf, case.rivals[0]
    return {
        "op": label,
        "size": size,
        "genperf": f"{milliseconds(genperf['ms'])} ms",
        "best rival": f"{rival['contender']}, {milliseconds(rival['ms'])} ms",
        "ratio": times(rival, genperf),
        "extra memory": f"{megabytes(genperf)} MB, rival {megabytes(rival)} MB",
    }


def _lines(rows: list[dict], name: str, lines: list[dict[str, str]]) -> str:
    measured = cases(rows)
    slower = sum(bool(case.rivals) and case.rivals[0]["ms"] < case.genperf["ms"] for case in measured)
    report = f"[all {len(measured)} rows](benchmarks/results/{name}.md)"
    return f"{markdown(lines)}\n\n{machine(rows)}. A rival is faster in {slower} of {report}."


BLOCKS: dict[str, Callable[[list[dict], str], str]] = {"table": _table, "gpu": _gpu_table}
