# SPDX-License-Identifier: Apache-2.0
"""The kernel of small inputs of lookup_free_entropy; test_lookup_free_quantize.py has the results of both kernels."""

import importlib

import pytest
import torch

import genperf

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("group_size", [None, 3, 1])
def test_small_inputs_run_one_kernel(group_size, monkeypatch, device):
    """With channels anywhere, a mask and half precision; larger inputs and transforms of torch.func run the products of PyTorch."""
    if device != "cpu":
        pytest.skip("a kernel of the CPU")
    x, mask = torch.randn(5, 6, 7, 2), torch.rand(5, 7, 2) > 0.3

    def total(x):
        sample, codebook = genperf.lookup_free_entropy(x, inv_temperature=1.5, group_size=group_size, channel_dim=1, mask=mask)
        return 2 * sample - codebook

    def profiled():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            leaf = x.clone().requires_grad_()
            found = total(leaf).detach(), *torch.autograd.grad(total(leaf), leaf), total(x.half())
        return found, {event.name for event in profile.events() if event.name.startswith("genperf::")}

    found, names = profiled()
    assert names == {"genperf::small_lookup_free_entropy", "genperf::small_lookup_free_entropy_backward"}
    torch.testing.assert_close(torch.func.grad(total)(x), found[1])
    pair = torch.func.vmap(total, 4)(torch.stack([x, 2 * x], 4))
    torch.testing.assert_close(pair, torch.stack([total(x), total(2 * x)]))
    monkeypatch.setattr(importlib.import_module("genperf.ops.lookup_free_entropy"), "MAX_SMALL", 0)
    expected, names = profiled()
    assert names == {"genperf::lookup_free_mass", "genperf::lookup_free_mass_backward"}
    torch.testing.assert_close(found, expected)
