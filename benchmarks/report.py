"""From pytest-benchmark's JSON to a table, a chart and the committed results: results/<device>.json, .md and .png."""

import argparse
import json
import math
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SIZES = ("N", "K", "D")


def read(path: Path) -> list[dict]:
    """One row for each benchmark: what it was, and its best time in milliseconds (median of device times on a GPU)."""
    rows = []
    for entry in json.loads(path.read_text())["benchmarks"]:
        facts = entry["extra_info"]
        device_ms = facts.pop("device_ms", None)
        rows.append({**facts, "ms": device_ms[1] if device_ms else entry["stats"]["min"] * 1e3, "rounds": entry["stats"]["rounds"]})
    return rows


def group(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of one op, workload and size, which are what each contender did with the same inputs."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["workload"], *(row.get(size) for size in SIZES)), []).append(row)
    return groups


def cells(row: dict, ours: float | None) -> dict[str, str]:
    """A row of the table by column. The searches count pairs, what streams counts bytes."""
    found = {
        "contender": row["contender"],
        "ms": f"{row['ms']:.3g}",
        "speed-up of genperf": "" if ours is None or row["contender"] == "genperf" else f"{row['ms'] / ours:.1f}x",
    }
    if "pairs" in row:
        found["Gpairs/s"] = f"{row['pairs'] / row['ms'] / 1e6:.2f}"
    if "flops" in row:
        found["GFLOP/s"] = f"{row['flops'] / row['ms'] / 1e6:.0f}"
    if "pairs" not in row and row.get("bytes") is not None:
        found["GB/s"] = f"{row['bytes'] / row['ms'] / 1e6:.1f}"
    found["extra MB"] = "" if row.get("extra_bytes") is None else f"{row['extra_bytes'] / 1e6:.0f}"
    if "wrong_rows" in row:
        found["wrong rows"] = f"{row['wrong_rows']:.2%}"
    return found


def table(rows: list[dict]) -> str:
    first = rows[0]
    time = "median device time, L2 cold" if "cuda" in first["torch"] and first["device"].startswith("NVIDIA") else "shortest wall time"
    lines = [
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}; float32 where no dtype is named; {time}; "
        f"load {first['load']} at the start.",
        "",
    ]
    for (op, workload, *sizes), members in group(rows).items():
        ours = next((row["ms"] for row in members if row["contender"] == "genperf"), None)
        body = [cells(row, ours) for row in sorted(members, key=lambda row: row["ms"])]
        columns = list(body[0])
        heading = ", ".join([workload, *(f"{name} = {size}" for name, size in zip(SIZES, sizes, strict=True) if size is not None)])
        lines += [f"### {op}: {heading}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in body]
        lines.append("")
    return "\n".join(lines)


def chart(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = group(rows)
    ops = sorted({key[0] for key in groups})
    figure, axes = pyplot.subplots(len(ops), 1, figsize=(12, 4.2 * len(ops)), squeeze=False)
    for axis, op in zip(axes[:, 0], ops, strict=True):
        members = {key: value for key, value in groups.items() if key[0] == op}
        contenders = list(dict.fromkeys(row["contender"] for value in members.values() for row in value))
        width = 0.8 / len(contenders)
        for i, contender in enumerate(contenders):
            times = [next((row["ms"] for row in value if row["contender"] == contender), float("nan")) for value in members.values()]
            axis.bar([x + i * width for x in range(len(members))], times, width, label=contender)
        labels = [
            "\n".join([workload, *(f"{name}={size}" for name, size in zip(SIZES, sizes, strict=True) if size is not None)])
            for _, workload, *sizes in members
        ]
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(members))], labels, fontsize=7)
        # Bars of a logarithmic axis begin at a power of ten, well below the shortest.
        shortest = min(row["ms"] for value in members.values() for row in value)
        axis.set(yscale="log", ylabel="ms", ylim=(10 ** math.floor(math.log10(shortest / 2)), None))
        axis.set_title(f"{op}, {rows[0]['device']}, {rows[0]['threads']} threads", loc="left")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8, ncols=len(contenders), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="files written by pytest --benchmark-json")
    parser.add_argument("--name", help="name of the results (the device's)")
    arguments = parser.parse_args()
    rows = [row for path in arguments.json for row in read(path)]
    if not rows:
        parser.error("the files hold no benchmark")
    name = arguments.name or re.sub(r"[^A-Za-z0-9]+", "-", rows[0]["device"]).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(rows) + "\n")
    print(table(rows))
    chart(rows, RESULTS / f"{name}.png")
    print(f"written: benchmarks/results/{name}.json, .md, .png")


if __name__ == "__main__":
    main()
