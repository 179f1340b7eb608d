# SPDX-License-Identifier: Apache-2.0
"""The report of `genperf bench`: the ceilings of a machine, every op beside its rivals, a chart.

python benchmarks/report.py build/bench.json [--out FOLDER] [--name NAME]  writes NAME.json, .md and .png
python benchmarks/report.py benchmarks/results/NAME.json                   writes the page of kept rows again
python benchmarks/report.py --readme benchmarks/results/NAME.json          writes README's table from kept rows
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

from genperf._files import write_atomically, write_text_atomically

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
SIZES = ("N", "K", "D")
# Lower bounds of the time of an op, which are no rivals.
BOUNDS = ("clone",)
# Columns of an op's table; a table leaves out those that its rows have no value for.
COLUMNS = ("size", "contender", "ms", "speed-up of genperf", "Gpairs/s", "GFLOP/s", "% of ceiling", "GB/s", "extra MB", "wrong rows")
MATRIX_PRODUCTS = ("float32 matrix product", "bfloat16 matrix product")
WALL_TIME, DEVICE_TIME = "shortest wall time", "median device time, L2 cold"


class Case(NamedTuple):
    """The rows of all contenders for one op and size."""

    op: str
    size: str
    rows: list[dict]

    @property
    def genperf(self) -> dict:
        """The row of genperf, or of its first variant."""
        variants = [row for row in self.rows if is_genperf(row)]
        return next((row for row in variants if row["contender"] == "genperf"), variants[0])

    @property
    def rivals(self) -> list[dict]:
        """The rows of the rivals, fastest first."""
        return sorted((row for row in self.rows if not is_genperf(row) and row["contender"] not in BOUNDS), key=lambda row: row["ms"])


def is_genperf(row: dict) -> bool:
    return row["contender"].startswith("genperf")


def read(path: Path) -> list[dict]:
    """One row for each benchmark: its facts, and its shortest time in milliseconds (on a GPU the median device time).

    The file is one of pytest-benchmark, or of kept rows.
    """
    content = json.loads(path.read_text())
    if isinstance(content, list):
        return content
    return [row_of(entry["extra_info"], entry["stats"]) for entry in content["benchmarks"]]


def row_of(facts: dict, stats: dict) -> dict:
    """The row of a benchmark with these facts and statistics of pytest-benchmark."""
    facts = dict(facts)
    device_ms = facts.pop("device_ms", None)
    ms = device_ms[1] if device_ms else stats["min"] * 1e3
    return {**facts, "ms": ms, "time": DEVICE_TIME if device_ms else WALL_TIME, "rounds": stats["rounds"]}


def sizes_of(row: dict) -> str:
    return ", ".join([row["workload"], *(f"{name} = {row[name]}" for name in SIZES if name in row)])


def cases(rows: list[dict]) -> list[Case]:
    """Every op and size that genperf has a row for, in the order of the rows."""
    found: dict[tuple[str, str], Case] = {}
    for row in rows:
        found.setdefault((row["op"], size := sizes_of(row)), Case(row["op"], size, [])).rows.append(row)
    return [case for case in found.values() if any(map(is_genperf, case.rows))]


def milliseconds(ms: float | None) -> str:
    """Three significant digits, and all digits before the point."""
    return "" if ms is None else f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def times(row: dict, genperf: dict) -> str:
    """The rival's time over that of genperf; bold where the rival is faster."""
    ratio = row["ms"] / genperf["ms"]
    text = f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x"
    return f"**{text}**" if ratio < 1 else text


def megabytes(row: dict) -> str:
    return "" if row.get("extra_bytes") is None else f"{row['extra_bytes'] / 1e6:.0f}"


def markdown(lines: list[dict[str, str]]) -> str:
    """A table of lines that all have the same columns."""
    columns = list(lines[0])
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(head + [f"| {' | '.join(line[column] for column in columns)} |" for line in lines])


def machine(rows: list[dict]) -> str:
    first = rows[0]
    parts = [f"{first['device']}, {first['threads']} threads, torch {first['torch']}"]
    parts += [f"genperf {first['genperf']}"] if "genperf" in first else []
    return "; ".join([*parts, first.get("time", WALL_TIME)])


def ceilings(rows: list[dict]) -> str:
    """The measured ceilings of the machine, the highest where rows of several runs are joined; "" where none was measured."""
    fastest: dict[str, dict] = {}
    for row in rows:
        if row["op"] == "ceiling" and row["ms"] <= fastest.get(row["workload"], row)["ms"]:
            fastest[row["workload"]] = row
    return ", ".join(
        f"{workload} {row['flops'] / row['ms'] / 1e6:.0f} GFLOP/s"
        if "flops" in row
        else f"{workload} {row['bytes'] / row['ms'] / 1e6:.1f} GB/s"
        for workload, row in fastest.items()
    )


def matrix_ceiling(rows: list[dict]) -> float | None:
    """Floating-point operations per millisecond of the fastest measured matrix product, None without one."""
    return max((row["flops"] / row["ms"] for row in rows if row["op"] == "ceiling" and row["workload"] in MATRIX_PRODUCTS), default=None)


def summary(rows: list[dict]) -> str:
    """One line for every op and size: genperf, and the fastest rival."""
    lines, lost = [], 0
    for case in cases(rows):
        genperf, rival = case.genperf, next(iter(case.rivals), None)
        lost += rival is not None and rival["ms"] < genperf["ms"]
        lines.append(
            {
                "op": case.op,
                "size": case.size,
                "genperf, ms": milliseconds(genperf["ms"]),
                "fastest rival": rival["contender"] if rival else "",
                "its ms": milliseconds(rival["ms"]) if rival else "",
                "speed-up of genperf": times(rival, genperf) if rival else "",
                "genperf, extra MB": megabytes(genperf),
                "its extra MB": megabytes(rival) if rival else "",
            }
        )
    text = f"The fastest rival is faster than genperf in {lost} of {len(lines)} rows; their speed-up is in bold."
    return f"{text}\n\n{markdown(lines)}"


def cells(row: dict, genperf: dict, ceiling: float | None) -> dict[str, str]:
    """A row of a case by column. Searches have a rate of pairs, streaming ops one of bytes."""
    is_rival = not is_genperf(row) and row["contender"] not in BOUNDS
    speed_up = times(row, genperf) if is_rival else f"{row['ms'] / genperf['ms']:.2f}x"
    found = {
        "contender": row["contender"],
        "ms": milliseconds(row["ms"]),
        "speed-up of genperf": "" if row is genperf else speed_up,
        "extra MB": megabytes(row),
    }
    if "flops" in row:
        found["GFLOP/s"] = f"{row['flops'] / row['ms'] / 1e6:.0f}"
    if "pairs" in row:
        found["Gpairs/s"] = f"{row['pairs'] / row['ms'] / 1e6:.2f}"
        if "flops" in row and ceiling:
            found["% of ceiling"] = f"{100 * row['flops'] / row['ms'] / ceiling:.1f}"
    elif row.get("bytes") is not None:
        found["GB/s"] = f"{row['bytes'] / row['ms'] / 1e6:.1f}"
    if "wrong_rows" in row:
        found["wrong rows"] = f"{100 * row['wrong_rows']:.2g}%"
    return found


def section(found: list[Case], ceiling: float | None) -> str:
    """Every contender at every size of one op, fastest first; only the first row of a size names it."""
    lines = []
    for case in found:
        ordered = sorted(case.rows, key=lambda row: row["ms"])
        lines += [{"size": "" if number else case.size, **cells(row, case.genperf, ceiling)} for number, row in enumerate(ordered)]
    columns = [column for column in COLUMNS if any(line.get(column) for line in lines)]
    return markdown([{column: line.get(column, "") for column in columns} for line in lines])


def head(rows: list[dict]) -> str:
    """The machine, its ceilings and the summary: what is printed."""
    facts = [f"{machine(rows)}; float32 where no dtype is named; load {rows[0]['load']} at the start."]
    facts += [f"Ceilings of the machine, measured: {limits}."] if (limits := ceilings(rows)) else []
    return "\n\n".join([*facts, summary(rows)])


def page(rows: list[dict], name: str) -> str:
    """The whole report in Markdown, with NAME.png as its chart."""
    blocks = [
        f"# Speed of genperf: {rows[0]['device']}",
        head(rows),
        f"![speed-up over the fastest rival of each op]({name}.png)",
        "## Every contender",
    ]
    ceiling = matrix_ceiling(rows)
    if ceiling:
        blocks.append("The ceiling of a search is the faster of the measured float32 and bfloat16 matrix products.")
    by_op: dict[str, list[Case]] = {}
    for case in cases(rows):
        by_op.setdefault(case.op, []).append(case)
    for op, found in by_op.items():
        blocks += [f"### {op}", section(found, ceiling)]
    return "\n\n".join(blocks) + "\n"


def chart(rows: list[dict], path: Path) -> None:
    """Draw how many times faster than its fastest rival genperf is: a bar for each op, at the first size that has a rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first: dict[str, Case] = {}
    for case in cases(rows):
        if case.rivals:
            first.setdefault(case.op, case)
    found = sorted(first.values(), key=lambda case: case.rivals[0]["ms"] / case.genperf["ms"], reverse=True)
    ratios = [case.rivals[0]["ms"] / case.genperf["ms"] for case in found]
    figure, axis = pyplot.subplots(figsize=(10, 1.2 + 0.45 * len(found)), layout="constrained")
    bars = axis.barh(range(len(found)), ratios, color="tab:blue")
    labels = [
        f"{ratio:.2g}x: {milliseconds(case.genperf['ms'])} ms, {case.rivals[0]['contender']} {milliseconds(case.rivals[0]['ms'])} ms"
        for ratio, case in zip(ratios, found, strict=True)
    ]
    axis.bar_label(bars, labels, padding=4, fontsize=8)
    axis.set_yticks(range(len(found)), [f"{case.op}\n{case.size}" for case in found], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xlim=(0, 1.45 * max([1, *ratios])), xlabel="times as fast as the fastest rival (line: as fast)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine(rows), fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="files written by pytest --benchmark-json, or by this command")
    parser.add_argument("--name", help="of the files (the name of the device, or of the kept rows)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where to write")
    parser.add_argument("--readme", action="store_true", help="write README's table instead")
    arguments = parser.parse_args()
    rows = [row for path in arguments.json for row in read(path)]
    if not cases(rows):
        parser.error("the files hold no measurement of genperf")
    first = arguments.json[0]
    if arguments.readme:
        from readme import refreshed

        write_text_atomically(README, refreshed(README.read_text(), rows, first.stem))
        print(f"written: {README.name}")
        return
    in_place = first.parent.resolve() == arguments.out.resolve()
    name = arguments.name or (first.stem if in_place else re.sub(r"[^A-Za-z0-9]+", "-", rows[0]["device"]).strip("-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(arguments.out / f"{name}.json", json.dumps(rows, indent=1) + "\n")
    write_text_atomically(arguments.out / f"{name}.md", page(rows, name))
    chart(rows, arguments.out / f"{name}.png")
    print(f"{head(rows)}\n\nwritten: {arguments.out / name}.json, .md, .png")


if __name__ == "__main__":
    main()
