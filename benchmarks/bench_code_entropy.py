# SPDX-License-Identifier: Apache-2.0
"""Losses and samples over all codes, float32: forward and backward of entropies and cross-entropy, and indices drawn from the softmax.

The losses are first checked against float64 on some of the vectors, and the mean log-likelihood of sampled codes against its expectation.
"""

import pytest
import torch
import torch.nn.functional as F

import genperf

from measure import measure, skip_too_large  # isort: skip
from workloads import Workload  # isort: skip

# The inverse temperature and the epsilon of vector-quantize-pytorch.
SHARPNESS = 100
EPSILON = 1e-5

LOSSES = (
    Workload("ViT-VQGAN", 8192, 8192, 32),
    Workload("VQ-VAE", 16384, 512, 64),
    Workload("TA-TiTok", 26624, 8192, 64),
    Workload("RQ-VAE-level", 4096, 16384, 256),
    Workload("Open-MAGVIT2-262k", 2048, 262144, 18),
)


def distances(x, codebook):
    """As vector-quantize-pytorch computes them."""
    return (x.square().sum(1)[:, None] + codebook.square().sum(1) + x @ codebook.T * -2).clamp(min=1e-8).sqrt()


def plain_entropies(x, codebook):
    log_p = (-distances(x, codebook) * SHARPNESS).log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(mean * mean.clamp(min=EPSILON).log()).sum()


def plain_cross_entropy(x, codebook, indices):
    return F.cross_entropy(-distances(x, codebook), indices)


def plain_sample(x, codebook):
    logits = -distances(x, codebook)
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def genperf_entropies(x, codebook):
    return genperf.code_entropy(x, codebook, temperature=1 / SHARPNESS, epsilon=EPSILON)


# Functions for entropies, cross-entropy and samples, and the bytes held for each vector and code.
CONTENDERS = {
    "genperf": (genperf_entropies, genperf.code_cross_entropy, genperf.sample_code, 0),
    "PyTorch": (plain_entropies, plain_cross_entropy, plain_sample, 28),
    "torch.compile": (plain_entropies, plain_cross_entropy, plain_sample, 16),
}


def contender_function(contender, which, compiled):
    function = CONTENDERS[contender][which]
    return compiled(function) if contender == "torch.compile" else function


def inputs(workload, device):
    _, n, k, d = workload
    tensors = torch.randn(n, d, device=device), torch.randn(k, d, device=device)
    return tuple(t.requires_grad_() for t in tensors)


def facts(workload, contender, products):
    _, n, k, d = workload
    return {"flops": 2.0 * products * n * k * d, "pairs": n * k, "op": "code_entropy", "N": n, "K": k, "D": d, "contender": contender}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", LOSSES, ids=str)
def test_code_entropy(benchmark, workload, contender, size, compiled, device):
    workload = size(workload)
    skip_too_large(contender, CONTENDERS[contender][3] * workload.n * workload.k)
    x, codebook = inputs(workload, device)
    function = contender_function(contender, 0, compiled)

    few = x[:16]
    exact = plain_entropies(few.double(), codebook.double())
    for found, expected in zip(CONTENDERS[contender][0](few, codebook), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)

    def step():
        sample, batch = function(x, codebook)
        return torch.autograd.grad(sample - batch, (x, codebook))

    measure(benchmark, step, device, workload=f"entropies, forward and backward, {workload.name}", **facts(workload, contender, 4))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", LOSSES[:2], ids=str)
def test_code_cross_entropy(benchmark, workload, contender, size, compiled, device):
    workload = size(workload)
    skip_too_large(contender, CONTENDERS[contender][3] * workload.n * workload.k)
    x, codebook = inputs(workload, device)
    indices = torch.randint(workload.k, (workload.n,), device=device)
    function = contender_function(contender, 1, compiled)

    exact = plain_cross_entropy(x[:16].double(), codebook.double(), indices[:16])
    torch.testing.assert_close(CONTENDERS[contender][1](x[:16], codebook, indices[:16]).double(), exact, rtol=1e-4, atol=1e-4)

    def step():
        return torch.autograd.grad(function(x, codebook, indices), (x, codebook))

    measure(benchmark, step, device, workload=f"cross-entropy, forward and backward, {workload.name}", **facts(workload, contender, 4))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", LOSSES[:2], ids=str)
@torch.no_grad()
def test_sample_code(benchmark, workload, contender, size, compiled, device):
    workload = size(workload)
    skip_too_large(contender, 12 * workload.n * workload.k if contender != "genperf" else 0)
    x, codebook = inputs(workload, device)
    function = contender_function(contender, 2, compiled)

    few = x[:256]
    log_p = (-distances(few, codebook)).log_softmax(-1)
    likelihood = log_p.gather(1, function(few, codebook).unsqueeze(1))
    expected = (log_p.exp() * log_p).sum(-1).mean()
    assert abs(likelihood.mean() - expected) < 5 * likelihood.std() / len(few) ** 0.5

    measure(benchmark, lambda: function(x, codebook), device, workload=f"samples, {workload.name}", **facts(workload, contender, 1))
