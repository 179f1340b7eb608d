# SPDX-License-Identifier: Apache-2.0
"""Large results of CPU kernels are in huge pages, where the system has them."""

from pathlib import Path

import pytest
import torch

import genperf
from genperf import _library

pytestmark = [
    pytest.mark.skipif(_library.cpu_failure is not None, reason=str(_library.cpu_failure)),
    pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages"),
]


def is_in_huge_pages(t):
    """Whether the memory in the middle of t is advised to be huge pages."""
    address, flags = t.data_ptr() + t.nbytes // 2, ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            flags = line
    assert flags
    return "hg" in flags.split()


def results(op, x):
    """The large results of an op and of its backward."""
    if op == "code_statistics":
        return genperf.code_statistics(x[:4], torch.arange(4), len(x))[1:]
    if op == "vector_quantize":
        out = genperf.vector_quantize(x, torch.randn(4, x.shape[1]))[0]
    elif op == "residual_vector_quantize":
        out = genperf.residual_vector_quantize(x, torch.randn(2, 4, x.shape[1]))[0]
    elif op == "finite_scalar_quantize":
        out = genperf.finite_scalar_quantize(x, levels=[3] * x.shape[1])[0]
    elif op == "lookup_free_quantize":
        out = genperf.lookup_free_quantize(x, spherical=True)[0]  # else its gradient is the one that it gets
    elif op == "gaussian_sample":
        out = genperf.gaussian_sample(x, torch.zeros(x.shape))[0]
    elif op == "interpolate":
        out = genperf.interpolate(x, x.detach())
    else:
        out = getattr(genperf, op)(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
    if out.dim() == 0:
        return torch.autograd.grad(out, x)
    return out, *torch.autograd.grad(out, x, torch.ones_like(out))


@pytest.mark.parametrize(
    "op",
    [
        "vector_quantize", "residual_vector_quantize", "finite_scalar_quantize", "lookup_free_quantize", "code_statistics",
        "gaussian_sample", "gumbel_sample", "interpolate", "gradient_norm_penalty",
    ],
)  # fmt: skip
def test_large_results_are_in_huge_pages(op):
    x = torch.randn(1 << 17, 8, requires_grad=True)  # 4 MiB
    for result in results(op, x):
        assert is_in_huge_pages(result)
