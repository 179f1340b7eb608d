# SPDX-License-Identifier: Apache-2.0
"""The table of what a call costs beyond its kernels: the kernels that it records, and what a line says."""

import sys
from pathlib import Path

import pytest
import torch

import genperf

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import goals
import small_calls


def test_costs_of_one_op():
    threads = torch.get_num_threads()
    forward, both = small_calls.costs(lambda name: name == "gradient_norm_penalty", rounds=1)
    assert (forward.goal, both.goal) == (small_calls.FORWARD_GOAL, small_calls.BACKWARD_GOAL)
    assert (forward.passes, both.passes) == ("forward", "forward and backward")
    assert all(time > 0 for cost in (forward, both) for time in (cost.call, cost.kernels))
    assert torch.get_num_threads() == threads


def test_every_case_runs_its_kernels():
    for case in small_calls.cases():
        call = small_calls.step_of(case) if case.inputs else case.call
        with small_calls._Recorder() as recorder:
            call()
        called = [op.__name__.split(".")[0] for op, _, _ in recorder.calls]
        assert called, case.name
        backward = case.inputs and case.name != "lookup_free_quantize"  # whose gradient needs no kernel
        assert any(name.endswith(("_backward", "_backward_codebook")) for name in called) == bool(backward), case.name


def test_a_wrong_result_is_found(monkeypatch):
    case = next(case for case in small_calls.cases() if case.name == "nearest_code")
    small_calls.verify(case.call)
    monkeypatch.setattr(torch.ops.genperf, "nearest_code", lambda x, codebook, mask, cosine: torch.full((64, 1), -7))
    with pytest.raises(AssertionError):
        small_calls.verify(case.call)


@pytest.mark.parametrize(("call", "verdict"), [(19.0, "reached"), (21.0, "missed")])
def test_lines(call, verdict):
    cost = small_calls.Cost("op", "forward", call, 5.0, 15.0)
    assert small_calls.row(cost)[""] == verdict
    line = goals.line("", (call / 1e6, 5e-6), "its kernels alone", goals.Goal("us more", 15))
    assert (line["ratio"], line["goal"], line[""]) == (f"{call - 5:.1f} us more", "<= 15 us more", verdict)


def test_ops_that_are_timed_exist():
    assert all(hasattr(genperf, case.name) for case in small_calls.cases() if case.is_op)
