# SPDX-License-Identifier: Apache-2.0
"""The report of a GPU: its steps with the CPU in place of the device, its time limits, and the page of made-up records."""

import json
import sys
import time
from pathlib import Path

import pytest

from genperf.ops import OPS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_page  # noqa: E402
import gpu_report  # noqa: E402
import gpu_steps  # noqa: E402
from gpu_report import Run, Step  # noqa: E402
from workloads import GPU_GOALS, QUICK  # noqa: E402


def records_in(folder):
    return gpu_page.read([folder])


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("GENPERF_RECORDS", str(tmp_path / "records.jsonl"))
    return Run(tmp_path, rehearse=True, deadline=time.monotonic() + 60)


def test_smoke_covers_every_op():
    assert set(gpu_steps.SMOKE) == set(OPS)


def test_steps_run_and_record(run, tmp_path):
    gpu = gpu_steps.Rehearsal()
    for step in ("facts", "checked", "search", "invariants", "tiles"):
        gpu_steps.STEPS[step](gpu)
    records = records_in(tmp_path)
    assert {record["op"] for record in gpu_page.of_step(records, "smoke")} == set(OPS)
    checks = [record for record in records if "ok" in record]
    assert len(checks) > 3 * len(OPS) - 5
    assert [record for record in checks if not record["ok"]] == []
    searches = gpu_page.of_step(records, "search")
    assert [record["workload"] for record in searches] == [workload.name for workload in GPU_GOALS]
    assert all(record["wrong_rows"] == 0 and record["eager_ms"] > 0 for record in searches)
    assert {record["tiles"] for record in gpu_page.of_step(records, "tiles") if record["ms"] > 0} == {
        str(tiles) for candidates in gpu_steps.TILES.values() for tiles in candidates
    }


def test_a_wrong_op_is_recorded_and_the_others_go_on(run, tmp_path, monkeypatch):
    def wrong(x, codebook, impl):
        raise RuntimeError("no kernel image")

    make, _ = gpu_steps.SMOKE["nearest_code"]
    few = {"nearest_code": (make, wrong), "interpolate": gpu_steps.SMOKE["interpolate"]}
    few["gradient_norm_penalty"] = (few["interpolate"][0], lambda a, b, impl: (a if impl is None else b).square().sum())
    monkeypatch.setattr(gpu_steps, "SMOKE", few)
    gpu_steps.checked(gpu_steps.Rehearsal())
    found = {record["op"]: record for record in records_in(tmp_path)}
    assert {op: record["ok"] for op, record in found.items()} == {
        "nearest_code": False,
        "interpolate": True,
        "gradient_norm_penalty": False,
    }
    assert found["nearest_code"]["error"] == "RuntimeError: no kernel image"


def test_a_step_ends_within_its_limit_and_what_it_recorded_stays(run, tmp_path):
    code = """
import os, time
with open(os.environ["GENPERF_RECORDS"], "a") as file:
    file.write('{"step": "slow", "found": 1}\\n{"step": "slow", "fou')
print("printed", flush=True)
time.sleep(60)
"""
    assert not run.do(Step("slow", 2, [sys.executable, "-c", code]))
    assert not run.do(Step("wrong", 30, [sys.executable, "-c", "raise SystemExit(3)"]))
    assert not run.do(Step("tool", 30, ["no-such-tool"], tool="no-such-tool"))
    assert run.do(Step("right", 30, [sys.executable, "-c", "pass"]))
    late = run._replace(deadline=time.monotonic())
    assert not late.do(Step("late", 30, [sys.executable, "-c", "pass"]))
    records = records_in(tmp_path)
    assert records[0] == {"step": "slow", "found": 1}
    ends = {record["step"]: record["status"] for record in records[1:]}
    expected = {"wrong": "failed: exit code 3", "tool": "skipped: no no-such-tool", "right": "ok", "late": "skipped: no time left"}
    assert ends == expected
    assert "printed" in (tmp_path / "log.txt").read_text()


def test_steps_have_limits_and_commands_that_exist(tmp_path):
    steps = gpu_report.measuring_steps(False, tmp_path)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        scripts = [part for part in step.command if part.endswith(".py")]
        assert scripts
        assert all((ROOT / "benchmarks" / script).exists() for script in scripts)
        assert not any("rehearse" in part or "disable" in part for part in step.command)
        # Others are deselected by --quick.
        goals = {workload.name for workload in GPU_GOALS if any(f"{workload.name}-N" in part for part in step.command)}
        assert "--quick" not in step.command or goals <= set(QUICK)
    assert gpu_report.MEASURE_SECONDS + gpu_report.TEST_SECONDS <= 12 * 60


def row(op, workload, contender, ms, **facts):
    common = {
        "device": "Some GPU",
        "threads": 1,
        "torch": "2.11",
        "load": 0,
        "extra_bytes": 1e6,
        "bytes": 1e6,
        "time": "median device time, L2 cold",
    }
    return {"step": "benchmark", "row": {**common, "op": op, "workload": workload, "contender": contender, "ms": ms, **facts}}


def test_page_of_made_up_records(tmp_path, capsys):
    goal = GPU_GOALS[0]
    size = {"N": goal.n, "K": goal.k, "D": goal.d}
    records = [
        {"step": "facts", "device": "Some GPU", "capability": "9.0"},
        {"step": "facts", "status": "ok", "seconds": 3.2},
        row("nearest_code", goal.name, "genperf", 2.0, wrong_rows=0.0, **size),
        row("nearest_code", goal.name, "flash-kmeans", 3.0, wrong_rows=0.01, **size),
        row("interpolate", "[64, 3]", "genperf", 1.0),
        {"step": "search", "workload": goal.name, **size, "eager_ms": 2.0, "graph_ms": 1.9, "host_us": 31.4, "wrong_rows": 0.0},
        {"step": "kernels", "op": "nearest_code", "workload": goal.name, "kernels": {"nearest_code_scan_kernel": {"calls": 1, "ms": 1.5}}},
        {"step": "smoke", "op": "interpolate", "ok": True, "error": 1e-7},
        {"step": "invariants", "name": "search: K = 2^20", "ok": False},
        {"step": "tests", "passed": 900, "failed": 1, "failures": ["tests/ops/test_kmeans.py::test_it"]},
        *({"step": "tiles", "workload": goal.name, "tiles": f"block_n {n}", "ok": n != 64, "ms": n / 64} for n in (256, 64, 128)),
        {"step": "tiles", "workload": goal.name, "tiles": "block_n 512", "error": "OutOfResources"},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": "cut o')
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed: table -->\nkept\n<!-- /speed -->\n<!-- speed: gpu -->\nstale\n<!-- /speed -->\nafter\n")
    gpu_page.render([tmp_path], tmp_path / "out", None, readme)
    assert json.loads((tmp_path / "out/some-gpu.json").read_text()) == records
    assert (tmp_path / "out/some-gpu.png").stat().st_size > 1000
    page = (tmp_path / "out/some-gpu.md").read_text()
    assert (
        f"| {goal.name}, N = {goal.n}, K = {goal.k}, D = {goal.d} | 2 | 1.9 | 137.4 | 31 | 0% | nearest_code_scan_kernel 1.5 (1) |" in page
    )
    assert "3 of 5 checks hold. Tests: 900 passed, 1 failed." in page
    different = f"| {goal.name} with other tiles: block_n 64 | does not hold |"
    assert f"| search: K = 2^20 | does not hold |\n{different}\n| tests/ops/test_kmeans.py::test_it | failed |" in page
    assert "| 2 | block_n 128: 2 ms; block_n 256: 4 ms |" in page
    assert "| facts | ok | 3 |" in page
    text = readme.read_text()
    assert text.startswith("before\n<!-- speed: table -->\nkept\n")
    assert "| `nearest_code` |" in text
    assert "| 2 ms | flash-kmeans, 3 ms | 1.50x |" in text
    assert "stale" not in text


def test_readme_stays_without_rows_to_show(tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text('{"step": "facts", "device": "Some GPU"}\n')
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed: gpu -->\nstale\n<!-- /speed -->\n")
    gpu_page.render([tmp_path], tmp_path / "out", "name", readme)
    assert "stale" in readme.read_text()
    assert "README.md stays as it is" in capsys.readouterr().out
    assert "No benchmark was measured." in (tmp_path / "out/name.md").read_text()
