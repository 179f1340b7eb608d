"""Every benchmark runs, at a small size and without timing; what it verifies first is verified here too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# Of the many workloads of the searches, one of each kind of size.
SELECTED = "VQ-VAE-N or LDM-f8 or SimVQ"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py")))
def test_benchmark_runs(script):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", "--benchmark-disable", f"benchmarks/{script}"]
    if script in ("bench_nearest_code.py", "bench_vector_quantize.py"):
        command += ["-k", SELECTED]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    facts = {"op": "nearest_code", "workload": "A", "N": 10, "K": 20, "D": 3, "flops": 1200.0, "bytes": 400, "pairs": 200}
    facts |= {"device": "Some CPU", "threads": 2, "torch": "2.13.0", "load": 0.1, "extra_bytes": 1000}
    entries = [
        {"extra_info": {**facts, "contender": name, "wrong_rows": wrong}, "stats": {"min": seconds, "rounds": 5}}
        for name, seconds, wrong in (("genperf", 1e-3, 0.0), ("other", 4e-3, 0.01))
    ]
    streaming = {"op": "interpolate", "workload": "[64, 3]", "bytes": 4_000_000, "extra_bytes": None, "contender": "clone"}
    streaming |= {fact: facts[fact] for fact in ("device", "threads", "torch", "load")}
    entries.append({"extra_info": streaming, "stats": {"min": 2e-3, "rounds": 15}})
    source = tmp_path / "bench.json"
    source.write_text(json.dumps({"benchmarks": entries}))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["report.py", str(source)])
    report.main()
    printed = capsys.readouterr().out
    assert "| other | 4 | 4.0x |" in printed
    assert "1.00% |" in printed
    assert (
        "### nearest_code: A, N = 10, K = 20, D = 3\n\n| contender | ms | speed-up of genperf | Gpairs/s | GFLOP/s | extra MB |" in printed
    )
    assert "### interpolate: [64, 3]\n\n| contender | ms | speed-up of genperf | GB/s | extra MB |" in printed
    assert "| clone | 2 |  | 2.0 |  |" in printed
    assert json.loads((tmp_path / "results/Some-CPU.json").read_text())[1]["contender"] == "other"
    assert (tmp_path / "results/Some-CPU.png").stat().st_size > 1000
