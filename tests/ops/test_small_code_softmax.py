# SPDX-License-Identifier: Apache-2.0
"""The kernel of small inputs of code_entropy and code_cross_entropy; test_code_softmax.py has the results of both kernels."""

import pytest
import torch

import genperf
from genperf.ops import _code_softmax

pytestmark = pytest.mark.compiled


def test_small_inputs_run_one_kernel(monkeypatch, device):
    """In every layout whose x is contiguous; the transforms of torch.func give the same, from chunks, in every layout of the batch."""
    if device != "cpu":
        pytest.skip("a kernel of the CPU")
    x, codebook, indices = torch.randn(2, 3, 5, 4, 2), torch.randn(2, 7, 4), torch.randint(-1, 7, (2, 3, 5, 2))
    mask = torch.rand(2, 3, 5, 2) > 0.3

    def results(x, codebook):
        options = {"channel_dim": 3, "temperature": 0.7}
        return (
            *genperf.code_entropy(x, codebook, mask=mask, **options),
            genperf.code_cross_entropy(x, codebook, indices, mask=mask, **options),
            genperf.code_cross_entropy(x, codebook, indices, logits="dot", **options),
        )

    def total(x, codebook):
        return sum(value.sum() for value in results(x, codebook))

    def all_results():
        leaves = [t.clone().requires_grad_() for t in (x, codebook)]
        return *results(x, codebook), *torch.autograd.grad(total(*leaves), leaves), *results(x.half(), codebook.half())

    def profiled():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = all_results()
        return found, {event.name for event in profile.events() if event.name.startswith("genperf::")}

    found, names = profiled()
    assert names == {"genperf::small_code_softmax", "genperf::small_code_softmax_backward"}
    torch.testing.assert_close(torch.func.grad(total, (0, 1))(x, codebook), found[4:6])
    pair = torch.func.vmap(total, (4, None))(torch.stack([x, 2 * x], 4), codebook)
    torch.testing.assert_close(pair, torch.stack([total(x, codebook), total(2 * x, codebook)]))
    monkeypatch.setattr(_code_softmax, "MAX_SMALL", 0)
    expected, names = profiled()
    assert names == {f"genperf::code_softmax{end}" for end in ("", "_backward", "_rows", "_rows_backward")}
    torch.testing.assert_close(found, expected)
