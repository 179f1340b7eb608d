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
    assert forward.function is None
    assert both.function is not None
    assert both.function > 0
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


def test_an_empty_function_has_the_inputs_and_outputs_of_its_op():
    for case in small_calls.cases():
        if not (case.is_op and case.inputs):
            continue
        empty = small_calls.empty_case(case)
        found, expected = (one if isinstance(one, tuple) else (one,) for one in (empty.call(), case.call()))
        assert [(t.shape, t.dtype, t.requires_grad) for t in found] == [(t.shape, t.dtype, t.requires_grad) for t in expected], case.name
        outputs, gradients = small_calls.step_of(empty)()
        assert [t.shape for t in gradients] == [t.shape for t in case.inputs], case.name
        assert len({t.grad_fn for t in outputs}) == 1, case.name


def test_parts_of_a_call():
    for row in small_calls.part_rows(rounds=1):
        assert float(row["us"]) > 0
        assert bool(row["in place of"]) == bool(row["its us"])
