# SPDX-License-Identifier: Apache-2.0
"""Minibatch discrimination, forward and backward, float32: the layer of Salimans et al. (2016) and a larger one."""

import pytest
import torch

import genperf

from measure import MANY_ROUNDS, measure, skip_too_large  # isort: skip

SHAPES = ((128, 50, 5), (256, 100, 16))


def plain_lines(features):
    distance = (features.unsqueeze(0) - features.unsqueeze(1)).abs().sum(3)
    return torch.exp(-distance).sum(1) - 1


CONTENDERS = {
    "genperf": lambda compiled: genperf.minibatch_similarity,
    "PyTorch": lambda compiled: plain_lines,
    "torch.compile": lambda compiled: compiled(plain_lines),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_minibatch_similarity(benchmark, shape, contender, size, compiled, device):
    shape = n, kernels, width = size(shape)
    skip_too_large(contender, 0 if contender == "genperf" else 3 * 4 * n * n * kernels * width)
    features = (torch.randn(shape, device=device) / width).requires_grad_()
    upstream = torch.randn(n, kernels, device=device)
    function = CONTENDERS[contender](compiled)

    def step():
        similarity = function(features)
        return similarity, torch.autograd.grad(similarity, features, upstream)[0]

    few = features.detach()[:, :3].double().requires_grad_()
    exact = genperf.minibatch_similarity(few, "reference")
    similarity, gradient = step()
    torch.testing.assert_close(similarity[:, :3].double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient[:, :3].double(), torch.autograd.grad(exact, few, upstream[:, :3].double())[0], rtol=1e-3, atol=1e-3)
    # For each element of each pair, forward computes a difference, its magnitude and a sum; backward these again and a sign.
    measure(
        benchmark, step, device, moved=4 * (3 * features.numel() + 2 * upstream.numel()), flops=8.0 * n * features.numel(),
        least_rounds=MANY_ROUNDS, op="minibatch_similarity", workload=f"forward and backward, {list(shape)}", contender=contender,
    )  # fmt: skip
