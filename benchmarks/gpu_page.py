# SPDX-License-Identifier: Apache-2.0
"""The results page of gpu_report.py, from its records: NAME.json, NAME.md and NAME.png, and README's GPU table."""

import json
import re
from pathlib import Path

from genperf._files import write_text_atomically

from readme import refreshed  # isort: skip
from report import cases, chart, markdown, milliseconds, page  # isort: skip

BEST_TILES = 3
OUTCOMES = ("passed", "failed", "skipped", "error", "errors")


def read(folders: list[Path]) -> list[dict]:
    """All records, in order. A line that a stopped process left unfinished is no record."""
    records = []
    for folder in folders:
        for line in (folder / "records.jsonl").read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def of_step(records: list[dict], step: str) -> list[dict]:
    """What a step recorded, without how it ended."""
    return [record for record in records if record["step"] == step and "status" not in record]


def facts_section(records: list[dict]) -> str:
    facts = {name: value for record in of_step(records, "facts") for name, value in record.items() if name != "step"}
    return markdown([{"fact": name, "value": str(value)} for name, value in facts.items()]) if facts else "Not recorded."


def search_section(records: list[dict]) -> str:
    """The goal sizes: times, what a call costs the host, and the kernels of a call."""
    kernels = {record["workload"]: record["kernels"] for record in of_step(records, "kernels")}
    lines = []
    for found in of_step(records, "search"):
        parts = kernels.get(found["workload"], {})
        operations = 2.0 * found["N"] * found["K"] * found["D"]
        lines.append(
            {
                "size": f"{found['workload']}, N = {found['N']}, K = {found['K']}, D = {found['D']}",
                "ms": milliseconds(found["eager_ms"]),
                "ms, graph replay": milliseconds(found["graph_ms"]),
                "TFLOP/s": f"{operations / found['eager_ms'] / 1e9:.1f}",
                "host, µs": f"{found['host_us']:.0f}",
                "wrong rows": f"{100 * found['wrong_rows']:.2g}%",
                "kernels, ms": "; ".join(f"{name} {milliseconds(part['ms'])} ({part['calls']:g})" for name, part in parts.items()),
            }
        )
    return markdown(lines) if lines else "Not measured."


def checks_section(records: list[dict]) -> str:
    checks = [(f"smoke: {record['op']}", record) for record in of_step(records, "smoke")]
    checks += [(record["name"], record) for record in of_step(records, "invariants")]
    timed = [record for record in of_step(records, "tiles") if "ok" in record]
    checks += [(f"{record['workload']} with other tiles: {record['tiles']}", record) for record in timed]
    failed = [{"check": name, "result": str(record.get("error", "does not hold"))} for name, record in checks if not record["ok"]]
    text = f"{len(checks) - len(failed)} of {len(checks)} checks hold."
    for record in of_step(records, "tests"):
        text += f" Tests: {', '.join(f'{record[name]} {name}' for name in ('passed', 'failed', 'skipped', 'error') if name in record)}."
        failed += [{"check": name, "result": "failed"} for name in record["failures"]]
    return f"{text}\n\n{markdown(failed)}" if failed else text


def tiles_section(records: list[dict]) -> str:
    """The fastest tiles of each size, beside the time of those that are chosen today."""
    chosen = {record["workload"]: record["eager_ms"] for record in of_step(records, "search")}
    by_workload: dict[str, list[dict]] = {}
    for record in of_step(records, "tiles"):
        if record.get("ok"):
            by_workload.setdefault(record["workload"], []).append(record)
    lines = [
        {
            "size": workload,
            "chosen, ms": milliseconds(chosen.get(workload)),
            "fastest": "; ".join(
                f"{record['tiles']}: {milliseconds(record['ms'])} ms"
                for record in sorted(found, key=lambda record: record["ms"])[:BEST_TILES]
            ),
        }
        for workload, found in by_workload.items()
    ]
    return markdown(lines) if lines else "Not measured."


def steps_section(records: list[dict]) -> str:
    ended = [record for record in records if "status" in record]
    lines = [{"step": record["step"], "end": record["status"], "seconds": f"{record.get('seconds', 0):.0f}"} for record in ended]
    return markdown(lines) if lines else "None."


def gpu_page(records: list[dict], name: str) -> str:
    rows = [record["row"] for record in of_step(records, "benchmark")]
    blocks = [page(rows, name).rstrip()] if cases(rows) else [f"# Speed of genperf: {name}", "No benchmark was measured."]
    sections = {
        "The search at its goal sizes": search_section,
        "Checks on the device": checks_section,
        "Tiles of the search": tiles_section,
        "The machine": facts_section,
        "Steps of the run": steps_section,
    }
    for title, section in sections.items():
        blocks += [f"## {title}", section(records)]
    return "\n\n".join(blocks) + "\n"


def render(folders: list[Path], out: Path, name: str | None, readme: Path) -> None:
    records = read(folders)
    rows = [record["row"] for record in of_step(records, "benchmark")]
    device = next((record["device"] for record in of_step(records, "facts")), "gpu")
    name = name or re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / f"{name}.json", json.dumps(records, indent=1) + "\n")
    write_text_atomically(out / f"{name}.md", gpu_page(records, name))
    if cases(rows):
        chart(rows, out / f"{name}.png")
    print(f"written: {out / name}.json, .md{', .png' if cases(rows) else ''}")
    try:
        text = refreshed(readme.read_text(), rows, name, "gpu")
    except ValueError as error:
        print(f"{readme.name} stays as it is: {error}")
        return
    write_text_atomically(readme, text)
    print(f"written: {readme.name}")
