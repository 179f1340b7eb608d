# SPDX-License-Identifier: Apache-2.0
"""The WGAN-GP penalty of given gradients, forward and backward, float32."""

import pytest
import torch

import genperf

from measure import MANY_ROUNDS, measure  # isort: skip

SHAPE = (64, 3, 64, 64)


def plain_lines(gradients):
    return (gradients.flatten(1).norm(2, dim=1) - 1).square().mean()


CONTENDERS = {
    "genperf": lambda compiled: genperf.gradient_norm_penalty,
    "PyTorch": lambda compiled: plain_lines,
    "torch.compile": lambda compiled: compiled(plain_lines),
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_gradient_norm_penalty(benchmark, contender, size, compiled, device):
    shape = size(SHAPE)
    gradients = (0.01 * torch.randn(shape, device=device)).requires_grad_()
    function = CONTENDERS[contender](compiled)

    def step():
        penalty = function(gradients)
        return penalty, torch.autograd.grad(penalty, gradients)[0]

    wide = gradients.detach().double().requires_grad_()
    exact = genperf.gradient_norm_penalty(wide, impl="reference")
    penalty, slope = step()
    torch.testing.assert_close(penalty.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(exact, wide)[0], rtol=1e-4, atol=1e-8)
    # Forward and backward read the gradients; backward writes the gradient of the penalty.
    measure(
        benchmark, step, device, moved=3 * 4 * gradients.numel(), least_rounds=MANY_ROUNDS,
        op="gradient_norm_penalty", workload=f"forward and backward, {list(shape)}", contender=contender,
    )  # fmt: skip
