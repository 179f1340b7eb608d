# SPDX-License-Identifier: Apache-2.0
"""Sampling with KL from packed moments, forward and backward, float32: latent images and a batch of vectors."""

import pytest
import torch

import genperf

from measure import MANY_ROUNDS, measure  # isort: skip

SHAPES = ((64, 8, 64, 64), (128, 128))


def plain_lines(moments):
    mean, logvar = moments.chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    return sample, kl


CONTENDERS = {
    "genperf": lambda compiled: genperf.gaussian_sample,
    "PyTorch": lambda compiled: plain_lines,
    "torch.compile": lambda compiled: compiled(plain_lines),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian_sample(benchmark, shape, contender, size, compiled, device):
    shape = size(shape)
    moments = torch.randn(shape, device=device, requires_grad=True)
    function = CONTENDERS[contender](compiled)
    grad_sample, grad_kl = torch.randn_like(moments.chunk(2, 1)[0]), torch.rand(shape[0], device=device)

    def step():
        sample, kl = function(moments)
        return sample, kl, torch.autograd.grad((sample, kl), moments, (grad_sample, grad_kl))[0]

    verify(moments.detach(), grad_sample, grad_kl, *step())
    # Forward reads moments and writes samples; backward reads moments and the gradient of the samples and writes that of the moments.
    measure(
        benchmark, step, device, moved=8 * 4 * grad_sample.numel(), least_rounds=MANY_ROUNDS,
        op="gaussian_sample", workload=f"forward and backward, {list(shape)}", contender=contender,
    )  # fmt: skip


def verify(moments, grad_sample, grad_kl, sample, kl, gradient):
    """Check KL and gradients against float64, and that the noise in the sample is standard normal."""
    mean, logvar = moments.double().chunk(2, 1)
    noise = (sample.double() - mean) / (logvar / 2).exp()
    assert abs(noise.mean()) < 5 * noise.numel() ** -0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5
    torch.testing.assert_close(kl.double(), 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    weight = grad_kl.double().reshape(-1, *[1] * (mean.dim() - 1))
    grad_mean = grad_sample + weight * mean
    grad_logvar = 0.5 * (grad_sample * (sample - mean) + weight * torch.expm1(logvar))
    torch.testing.assert_close(gradient.double(), torch.cat([grad_mean, grad_logvar], 1), rtol=1e-4, atol=1e-4)
