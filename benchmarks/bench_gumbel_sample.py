# SPDX-License-Identifier: Apache-2.0
"""Gumbel-softmax with KL, hard, float32: forward alone, and forward and backward with a codebook (DALL-E's 8192 codes)."""

import pytest
import torch
import torch.nn.functional as F

import genperf

from measure import MANY_ROUNDS, measure, skip_too_large  # isort: skip

# Logits with the classes in dimension 1, and the dimensions of a code.
FORWARD = (16, 1024, 16, 16)
STEP = (2, 8192, 32, 32, 256)


def plain_lines(logits, codebook=None):
    sample = F.gumbel_softmax(logits, hard=True, dim=1)
    indices = sample.argmax(1)
    if codebook is not None:
        sample = torch.einsum("bkhw,kd->bdhw", sample, codebook)
    q = logits.softmax(1)
    kl = (q * (q * logits.shape[1] + 1e-10).log()).sum(1)
    return sample, indices, kl


def genperf_sample(logits, codebook=None):
    return genperf.gumbel_sample(logits, codebook, dim=1, hard=True)


def reference_sample(logits):
    return genperf.gumbel_sample(logits, dim=1, hard=True, impl="reference")


CONTENDERS = {
    "genperf": lambda compiled: genperf_sample,
    "PyTorch": lambda compiled: plain_lines,
    "torch.compile": lambda compiled: compiled(plain_lines),
}


def exact_kl(logits):
    return genperf.gumbel_sample(logits, dim=1, impl="reference")[2]


def verify(logits, sample, indices, kl):
    """Check that the sample is that of the indices, the KL, and that the mean log-likelihood of the indices is the expected one."""
    # The straight-through sum of plain PyTorch rounds its one-hot vectors.
    torch.testing.assert_close(sample.movedim(1, -1), F.one_hot(indices, logits.shape[1]).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(kl, exact_kl(logits), rtol=1e-3, atol=1e-4)
    likelihood = logits.log_softmax(1).gather(1, indices.unsqueeze(1))
    expected = (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert abs(likelihood.mean() - expected) < 5 * likelihood.std() / indices.numel() ** 0.5


@pytest.mark.parametrize("contender", CONTENDERS)
def test_gumbel_sample(benchmark, contender, size, compiled, device):
    shape = size(FORWARD)
    logits = torch.randn(shape, device=device)
    function = CONTENDERS[contender](compiled)

    sample, indices, kl = function(logits)
    verify(logits, sample, indices, kl)
    measure(
        benchmark, lambda: function(logits), device, moved=2 * 4 * logits.numel() + 12 * indices.numel(), least_rounds=MANY_ROUNDS,
        op="gumbel_sample", workload=f"hard, forward, {list(shape)}", contender=contender,
    )  # fmt: skip


@pytest.mark.parametrize("contender", CONTENDERS)
def test_gumbel_sample_with_a_codebook(benchmark, contender, size, compiled, device):
    *shape, width = size(STEP)
    logits = torch.randn(shape, device=device, requires_grad=True)
    codebook = torch.randn(shape[1], width, device=device, requires_grad=True)
    skip_too_large(contender, 0 if contender == "genperf" else 7 * 4 * logits.numel())
    function = CONTENDERS[contender](compiled)
    upstream = torch.randn(shape[0], width, *shape[2:], device=device)
    grad_kl = torch.rand(shape[0], *shape[2:], device=device)

    def step():
        sample, indices, kl = function(logits, codebook)
        return sample, indices, kl, *torch.autograd.grad((sample, kl), (logits, codebook), (upstream, grad_kl))

    sample, indices, kl, grad_logits, grad_codebook = step()
    torch.testing.assert_close(sample.movedim(1, -1), codebook[indices], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl, exact_kl(logits), rtol=1e-3, atol=1e-4)
    gathered = torch.zeros_like(codebook).index_add_(0, indices.flatten(), upstream.movedim(1, -1).reshape(-1, width))
    torch.testing.assert_close(grad_codebook, gathered, rtol=1e-3, atol=1e-2)
    # A softmax does not change when a constant is added to all logits of a position.
    assert grad_logits.sum(1).abs().max() < 1e-3 * max(1.0, grad_logits.abs().max().item())
    del sample, indices, kl, grad_logits, grad_codebook, gathered

    positions = grad_kl.numel()
    measure(
        benchmark, step, device, least_rounds=MANY_ROUNDS,
        # Forward reads logits and codes and writes samples; backward reads logits and the upstream gradient and writes two gradients.
        moved=4 * (3 * logits.numel() + 4 * positions * width + codebook.numel()) + 12 * positions,
        flops=2.0 * positions * codebook.numel(),
        op="gumbel_sample", workload=f"hard, {width}-dimensional codes, forward and backward, {shape}", contender=contender,
    )  # fmt: skip
