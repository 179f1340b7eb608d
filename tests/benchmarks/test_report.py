# SPDX-License-Identifier: Apache-2.0
"""The report of speed: what measurements become, and that README shows the ones that are kept."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import readme  # noqa: E402
import report  # noqa: E402

# The rows that README names.
KEPT = (ROOT / re.search(r"\]\((benchmarks/results/[\w-]+\.md)\)", report.README.read_text())[1]).with_suffix(".json")
MACHINE = {"device": "Some CPU", "threads": 2, "torch": "2.13.0", "load": 0.1}


def measured(op, workload, contender, ms, **facts):
    """An entry of pytest-benchmark."""
    facts = {"bytes": None, "extra_bytes": None, **MACHINE, "op": op, "workload": workload, "contender": contender, **facts}
    return {"extra_info": facts, "stats": {"min": ms / 1e3, "rounds": 5}}


@pytest.fixture
def rows(tmp_path):
    sizes = {"N": 10, "K": 20, "D": 3, "flops": 1.2e9, "pairs": 200_000}
    entries = [
        measured("ceiling", "copy of 8 MB", "torch", 2.0, bytes=8_000_000),
        measured("ceiling", "float32 matrix product", "torch", 2.0, flops=6e8),
        measured("ceiling", "float32 matrix product", "torch", 3.0, flops=6e8),  # of another run
        measured("ceiling", "float64 matrix product", "torch", 1.0, flops=6e9),
        measured("ceiling", "bfloat16 matrix product", "torch", 1.0, flops=6e8),
        measured("nearest_code", "A", "other", 4.0, wrong_rows=1 / 3200, extra_bytes=5_000_000, **sizes),
        measured("nearest_code", "A", "genperf", 1.0, wrong_rows=0.0, extra_bytes=1_000_000, **sizes),
        measured("nearest_code", "B", "other", 1.0, **sizes),
        measured("nearest_code", "B", "genperf", 2.0, **sizes),
        measured("interpolate", "[64, 3]", "genperf", 2.0, bytes=4_000_000),
        measured("interpolate", "[64, 3]", "clone", 1.0, bytes=4_000_000),
        measured("interpolate", "[64, 3]", "torch.lerp", 1.5, bytes=4_000_000),
        measured("frechet_distance", "gradient", "genperf, prepared reference", 1234.5, D=7),
        measured("frechet_distance", "gradient", "eigvalsh", 2469.0, D=7),
        measured("unrivalled", "alone", "genperf", 1.0),
        measured("of others", "alone", "PyTorch", 1.0),
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    return report.read(path)


def test_page(rows):
    page = report.page(rows, "name")
    assert page.startswith("# Speed of genperf: Some CPU\n\nSome CPU, 2 threads, torch 2.13.0; shortest wall time;")
    assert "Ceilings of the machine, measured: copy of 8 MB 4.0 GB/s, float32 matrix product 300 GFLOP/s, " in page
    # The summary: what loses is counted and in bold, a bound is no rival, and genperf's variants are genperf.
    assert "faster than genperf in 2 of 5 rows" in page
    assert "| nearest_code | A, N = 10, K = 20, D = 3 | 1 | other | 4 | 4.0x | 1 | 5 |" in page
    assert "| interpolate | [64, 3] | 2 | torch.lerp | 1.5 | **0.75x** |  |  |" in page
    assert "| frechet_distance | gradient, D = 7 | 1234 | eigvalsh | 2469 | 2.0x |  |  |" in page
    assert "| unrivalled | alone | 1 |  |  |  |  |  |" in page
    # Every contender, fastest first, with the rates that its op has; searches are judged by the fastest matrix product.
    head = "| size | contender | ms | speed-up of genperf | Gpairs/s | GFLOP/s | % of ceiling | extra MB | wrong rows |\n"
    assert f"### nearest_code\n\n{head}|---|" in page
    sizes = "N = 10, K = 20, D = 3"
    assert (
        f"| A, {sizes} | genperf | 1 |  | 0.20 | 1200 | 200.0 | 1 | 0% |\n|  | other | 4 | 4.0x | 0.05 | 300 | 50.0 | 5 | 0.031% |\n"
        in page
    )
    assert f"| B, {sizes} | other | 1 | **0.50x** | 0.20 | 1200 | 200.0 |  |  |\n|  | genperf | 2 |  | 0.10 | 600 |" in page
    assert "### interpolate\n\n| size | contender | ms | speed-up of genperf | GB/s |\n" in page
    assert "| [64, 3] | clone | 1 | 0.50x | 4.0 |\n|  | torch.lerp | 1.5 | **0.75x** | 2.7 |\n|  | genperf | 2 |  | 2.0 |\n" in page
    assert "of others" not in page
    unjudged = report.page([row for row in rows if row["op"] != "ceiling"], "name")
    assert "ceiling" not in unjudged
    assert "| genperf | 1 |  | 0.20 | 1200 | 1 | 0% |" in unjudged


def test_device_times_are_medians_of_a_gpu(tmp_path):
    entry = measured("op", "A", "genperf", 9.0, device_ms=[1.0, 2.0, 3.0])
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"benchmarks": [entry]}))
    (row,) = report.read(path)
    assert row["ms"] == 2.0
    assert "median device time, L2 cold" in report.page([row], "name")


def test_files(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "bench.json"), "--out", str(out)])
    report.main()
    assert "| interpolate |" in capsys.readouterr().out
    assert json.loads((out / "Some-CPU.json").read_text()) == rows
    assert (out / "Some-CPU.png").stat().st_size > 1000
    written = (out / "Some-CPU.md").read_text()
    assert written == report.page(rows, "Some-CPU")
    # The rows that were kept give the same page, in place.
    (out / "Some-CPU.md").unlink()
    monkeypatch.setattr(sys, "argv", ["report.py", str(out / "Some-CPU.json"), "--out", str(out)])
    report.main()
    assert (out / "Some-CPU.md").read_text() == written


def test_a_report_that_cannot_be_written_keeps_the_one_before(rows, tmp_path, monkeypatch):
    out, saved = tmp_path / "out", []
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "bench.json"), "--out", str(out), "--name", "kept"])
    out.mkdir()
    for suffix in (".json", ".md", ".png"):
        (out / f"kept{suffix}").write_text("before")

    def fail(descriptor):
        saved.append(descriptor)
        if len(saved) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for failing in (1, 2, 3):
        saved.clear()
        with pytest.raises(OSError, match="No space left"):
            report.main()
        assert len(list(out.iterdir())) == 3
        assert (out / "kept.png").read_text() == "before"
        assert ((out / "kept.json").read_text() == "before") == (failing == 1)
    failing = 0
    report.main()
    assert (out / "kept.png").stat().st_size > 1000


def test_without_a_measurement_nothing_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": [measured("ceiling", "copy", "torch", 1.0, bytes=1)]}))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "bench.json"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "hold no measurement of genperf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kept_page_is_that_of_the_kept_rows():
    expected = report.page(report.read(KEPT), KEPT.stem)
    assert KEPT.with_suffix(".md").read_text() == expected, f"run `python benchmarks/report.py benchmarks/results/{KEPT.name}`"


def test_readme_shows_the_kept_rows():
    text = report.README.read_text()
    assert readme.refreshed(text, report.read(KEPT), KEPT.stem) == text, (
        f"run `python benchmarks/report.py --readme benchmarks/results/{KEPT.name}`"
    )
    for block in readme.BLOCKS:
        assert text.count(f"<!-- speed: {block} -->") == 1, block


def test_readme_follows_the_rows(tmp_path, monkeypatch):
    rows = report.read(KEPT)
    for row in rows:
        row["ms"] *= 1000 if row["contender"].startswith("genperf") else 1
        row["extra_bytes"] = 3_000_000 if row["op"] == "nearest_code" else None
    # A size that only the report shows.
    searches = [row for row in rows if row["op"] == "nearest_code" and row["workload"] == "VQ-VAE"]
    rows += [{**row, "workload": "IBQ-8k", "extra_bytes": 9_000_000} for row in searches]
    path, kept = tmp_path / "README.md", tmp_path / "slow.json"
    path.write_text("before\n<!-- speed: table -->\n\nx\n\n<!-- /speed -->\nafter\n")
    kept.write_text(json.dumps(rows))
    monkeypatch.setattr(report, "README", path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--readme", str(kept)])
    report.main()
    text = path.read_text()
    assert text.startswith("before\n<!-- speed: table -->\n\n| op | size |")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) == 7
    op, size, genperf, _, _, memory = lines[0]
    assert (op, size, memory) == ("`nearest_code`", "16,384 vectors, 512 codes, D 64", "3 MB, rival 3 MB")
    assert float(genperf.removesuffix(" ms")) > 1000
    assert all(ratio.startswith("**0.0") for *_, ratio, _ in lines)
    slower = len([case for case in report.cases(rows) if case.rivals])
    assert f"A rival is faster in {slower} of [all {len(report.cases(rows))} rows](benchmarks/results/slow.md)." in text
    assert text.endswith(".\n\n<!-- /speed -->\nafter\n")
    assert "IBQ" not in text


@pytest.mark.parametrize(
    ("block", "dropped", "message"),
    [
        ("nearest", None, "a block must be one of table, gpu, got 'nearest'"),
        ("table", "nearest_code", "a time of nearest_code VQ-VAE, N = 16384, K = 512, D = 64, which the rows do not hold"),
        ("table", "gumbel_sample", "a time of gumbel_sample hard, .*, which the rows do not hold"),
        ("table", "frechet_distance", "a time of frechet_distance full rank, float64, D = 2048, which the rows do not hold"),
    ],
)
def test_readme_errors(block, dropped, message):
    rows = [row for row in report.read(KEPT) if row["op"] != dropped]
    with pytest.raises(ValueError, match=message):
        readme.refreshed(f"<!-- speed: {block} -->x<!-- /speed -->", rows, "name")
