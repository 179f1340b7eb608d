"""README's table of speed, from kept rows: what lies between `<!-- speed: NAME -->` and `<!-- /speed -->`."""

import re
from collections.abc import Callable

from report import cases, machine, markdown, megabytes, milliseconds, times  # isort: skip

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
    ("`gaussian_sample`, forward and backward", "[64, 8, 64, 64]", "gaussian_sample", "forward and backward, [64, 8, 64, 64]"),
    ("`gradient_norm_penalty`, forward and backward", "[64, 3, 64, 64]", "gradient_norm_penalty", "forward and backward, [64, 3, 64, 64]"),
    ("`frechet_distance`, float64", "2,048 features", "frechet_distance", "full rank, float64, D = 2048"),
)


def refreshed(text: str, rows: list[dict], name: str) -> str:
    """README's text with every block made anew.

    Raises:
        ValueError: a block is none of BLOCKS, or the rows lack what it shows.
    """

    def fill(match: re.Match) -> str:
        start, block, before, after, end = match.groups()
        if block not in BLOCKS:
            raise ValueError(f"readme: a block must be one of {', '.join(BLOCKS)}, got {block!r}.")
        return f"{start}{before}{BLOCKS[block](rows, name)}{after}{end}"

    return _BLOCK.sub(fill, text)


def _table(rows: list[dict], name: str) -> str:
    """The rows of _SHOWN, and the machine they were measured on."""
    measured = cases(rows)
    found = {(case.op, case.size): case for case in measured}
    lines = []
    for label, shown_size, op, size in _SHOWN:
        if (op, size) not in found:
            raise ValueError(f"readme: README shows a time of {op} {size}, which the rows do not hold.")
        case = found[op, size]
        genperf, rival = case.genperf, case.rivals[0]
        lines.append(
            {
                "op": label,
                "size": shown_size,
                "genperf": f"{milliseconds(genperf['ms'])} ms",
                "best rival": f"{rival['contender']}, {milliseconds(rival['ms'])} ms",
                "ratio": times(rival, genperf),
                "extra memory": f"{megabytes(genperf)} MB, rival {megabytes(rival)} MB",
            }
        )
    slower = sum(bool(case.rivals) and case.rivals[0]["ms"] < case.genperf["ms"] for case in measured)
    report = f"[all {len(measured)} rows](benchmarks/results/{name}.md)"
    return f"{markdown(lines)}\n\n{machine(rows)}. A rival is faster in {slower} of {report}."


BLOCKS: dict[str, Callable[[list[dict], str], str]] = {"table": _table}
