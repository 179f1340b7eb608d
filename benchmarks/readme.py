"""README's tables and figures of speed, from kept rows: what lies between `<!-- speed: NAME -->` and `<!-- /speed -->`."""

import re
from collections.abc import Callable

from report import ceilings, machine, markdown, milliseconds  # isort: skip
from workloads import WORKLOADS  # isort: skip

_BLOCK = re.compile(r"(<!-- speed: (\w+) -->)(\s*).*?(\s*)(<!-- /speed -->)", re.DOTALL)

# Of the sizes of the searches, those that README shows.
_SHOWN = {workload.name for workload in WORKLOADS}

# Contender by column of its table.
_SEARCH = {
    "genperf": "genperf",
    "cdist + argmin": "torch.cdist+argmin",
    "torch.compile": "torch.compile",
    "faiss": "faiss",
    "vector-quantize-pytorch": "vector-quantize-pytorch",
}
_PLAIN = {"genperf": "genperf", "PyTorch": "PyTorch", "torch.compile": "torch.compile"}
_QUANTIZER = {**_PLAIN, "vector-quantize-pytorch": "vector-quantize-pytorch"}
_FRECHET = {
    "genperf": "genperf",
    "genperf, prepared reference": "genperf, prepared reference",
    "cached root": "eigvalsh, cached root",
    "torchmetrics": "torchmetrics",
    "pytorch-fid": "pytorch-fid",
}
# A reference is always prepared where features are compared with it.
_FRECHET_OF_FEATURES = {**_FRECHET, "genperf": None, "genperf, prepared reference": "genperf"}

_STEP = "forward and backward"
_CODES = "hard, 256-dimensional codes, forward and backward"
# What the table calls it, its size there, and op and workload of the rows.
_BETWEEN = (
    (f"`gaussian_sample`, {_STEP}", "[64, 8, 64, 64] packed", "gaussian_sample", f"{_STEP}, [64, 8, 64, 64]"),
    ("", "[128, 128] packed", "gaussian_sample", f"{_STEP}, [128, 128]"),
    ("`gumbel_sample`, hard, with KL", "[16, 1024, 16, 16]", "gumbel_sample", "hard, forward, [16, 1024, 16, 16]"),
    (f"with 256-dimensional codes, {_STEP}", "[2, 8192, 32, 32]", "gumbel_sample", f"{_CODES}, [2, 8192, 32, 32]"),
    ("`interpolate` (`torch.lerp`: {lerp})", "[64, 3, 64, 64]", "interpolate", "[64, 3, 64, 64]"),
    ("", "[64, 3, 256, 256]", "interpolate", "[64, 3, 256, 256]"),
    (f"`gradient_norm_penalty`, {_STEP}", "[64, 3, 64, 64]", "gradient_norm_penalty", f"{_STEP}, [64, 3, 64, 64]"),
    (f"`minibatch_similarity`, {_STEP}", "N 128, B 50, C 5", "minibatch_similarity", f"{_STEP}, [128, 50, 5]"),
    ("", "N 256, B 100, C 16", "minibatch_similarity", f"{_STEP}, [256, 100, 16]"),
)
_FRECHET_ROWS = (
    *((f"d {d}", _FRECHET, "full rank, float64", {"D": d}) for d in (768, 1024, 2048)),
    ("256 samples, d 2048", _FRECHET_OF_FEATURES, "features against a prepared reference, float64", {"N": 256, "D": 2048}),
    (f"{_STEP}, covariance, d 1024", _FRECHET, f"{_STEP}, covariance, float64", {"D": 1024}),
    *(
        (label, _FRECHET_OF_FEATURES, f"{_STEP}, features, float64", {"N": n, "D": 1024})
        for label, n in ((f"{_STEP}, 256 samples, d 1024", 256), ("1024 samples", 1024), ("4096 samples", 4096))
    ),
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


def _row(rows: list[dict], contender: str | None, **facts: object) -> dict | None:
    return next((row for row in rows if row["contender"] == contender and all(row.get(key) == value for key, value in facts.items())), None)


def _ms(rows: list[dict], contender: str, **facts: object) -> str:
    return milliseconds(_measured(_row(rows, contender, **facts), **facts)["ms"])


def _measured(row: dict | None, **facts: object) -> dict:
    if row is None:
        raise ValueError(f"readme: README shows a time of {' '.join(map(str, facts.values()))}, which the rows do not hold.")
    return row


def _times(rows: list[dict], columns: dict[str, str | None], **facts: object) -> dict[str, str]:
    """Milliseconds by column, in bold where a rival takes fewer than genperf."""
    found = {column: _row(rows, contender, **facts) for column, contender in columns.items()}
    ours = [row for row in found.values() if row and row["contender"].startswith("genperf")]
    least = min(_measured(row, **facts)["ms"] for row in ours or [None])
    texts = {column: milliseconds(row and row["ms"]) for column, row in found.items()}
    return {column: f"**{text}**" if text and found[column]["ms"] < least else text for column, text in texts.items()}


def _of_machine(rows: list[dict], name: str) -> str:
    limits = ceilings(rows)
    return machine(rows) + (f"; ceilings: {limits}" if limits else "")


def _searches(op: str, columns: dict[str, str]) -> Callable[[list[dict], str], str]:
    def table(rows: list[dict], name: str) -> str:
        lines = []
        for row in rows:
            if row["op"] == op and row["contender"] == "genperf" and row["workload"] in _SHOWN:
                sizes = {key: row[key] for key in ("workload", "N", "K", "D")}
                shown = {"sizes of": sizes["workload"], "vectors": f"{row['N']:,}", "codes": f"{row['K']:,}", "D": str(row["D"])}
                lines.append({**shown, **_times(rows, columns, op=op, **sizes)})
        _measured(lines[0] if lines else None, op=op)
        return markdown(lines)

    return table


def _search_memory(rows: list[dict], name: str) -> str:
    def most(contender: str) -> float:
        found = [row for row in rows if row["op"] == "nearest_code" and row["contender"] == contender and row["workload"] in _SHOWN]
        return max(row["extra_bytes"] for row in found if row["extra_bytes"] is not None)

    return f"at most {most('genperf') / 1e6:.0f} MB beyond the inputs in these rows, cdist up to {most('torch.cdist+argmin') / 1e9:.1f} GB"


def _between(rows: list[dict], name: str) -> str:
    lerp = ", ".join(_ms(rows, "torch.lerp", op="interpolate", workload=workload) for _, _, op, workload in _BETWEEN if op == "interpolate")
    return markdown(
        [
            {"op": label.format(lerp=lerp), "size": size, **_times(rows, _PLAIN, op=op, workload=workload)}
            for label, size, op, workload in _BETWEEN
        ]
    )


def _critic_step(rows: list[dict], name: str) -> str:
    ours, plain, estimated = (_ms(rows, contender, op="critic_step") for contender in ("genperf", "PyTorch", "genperf, finite-difference"))
    return f"{ours} ms with this penalty, {plain} with the plain lines and {estimated} with the finite differences"


def _frechet(rows: list[dict], name: str) -> str:
    return markdown(
        [
            {"": label, **_times(rows, columns, op="frechet_distance", workload=workload, **sizes)}
            for label, columns, workload, sizes in _FRECHET_ROWS
        ]
    )


def _matrix_sqrt(rows: list[dict], name: str) -> str:
    ours, eigh = (
        _ms(rows, contender, op="matrix_sqrt", workload="forward, float64", D=1024) for contender in ("genperf", "torch.linalg.eigh")
    )
    return f"{ours} ms at d 1024, torch.linalg.eigh {eigh}"


def _chart(rows: list[dict], name: str) -> str:
    return f"![time of every contender, relative to genperf's](benchmarks/results/{name}.png)"


BLOCKS: dict[str, Callable[[list[dict], str], str]] = {
    "machine": _of_machine,
    "nearest_code": _searches("nearest_code", _SEARCH),
    "search_memory": _search_memory,
    "vector_quantize": _searches("vector_quantize", _QUANTIZER),
    "between_networks": _between,
    "critic_step": _critic_step,
    "frechet_distance": _frechet,
    "matrix_sqrt": _matrix_sqrt,
    "chart": _chart,
}
