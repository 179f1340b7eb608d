# SPDX-License-Identifier: Apache-2.0
"""Ceilings of the machine, to judge the other rows by: the bandwidth of a copy, the rate of matrix products."""

import pytest
import torch

from measure import measure  # isort: skip

COPIED = (64, 1024, 1024)  # 256 MiB, beyond any cache
SIDE = {"cpu": 2048, "cuda": 8192}


def test_copy(benchmark, size, device):
    source = torch.rand(size(COPIED), device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    assert torch.equal(target, source)
    measure(
        benchmark, lambda: target.copy_(source), device, moved=2 * 4 * source.numel(),
        op="ceiling", workload=f"copy of {source.nbytes / 1e6:.0f} MB", contender="torch",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matrix_product(benchmark, dtype, size, device):
    (side,) = size((SIDE[device],))
    a, b = torch.rand(2, side, side, device=device).to(dtype)
    product = torch.mm(a, b)
    # Each element is about side / 4, far above the rounding of its sum.
    torch.testing.assert_close(product[:2].double(), a[:2].double() @ b.double(), rtol=1e-2, atol=0)
    measure(
        benchmark, lambda: torch.mm(a, b, out=product), device, flops=2.0 * side**3,
        op="ceiling", workload=f"{str(dtype).removeprefix('torch.')} matrix product", contender="torch", N=side,
    )  # fmt: skip
