"""A training step of the quantizer, forward, backward and moving averages, on channels-first float32 images."""

import math

import pytest
import torch

import genperf
from genperf.cli.timing import plain_pytorch_quantizer
from genperf.nn import VectorQuantizer

from measure import measure, skip_too_large  # isort: skip
from workloads import WORKLOADS  # isort: skip


def image_of(n, d, device):
    """n vectors as a batch of images [B, D, H, W]."""
    pixels = math.gcd(n, 1024)
    return torch.randn(n // pixels, d, pixels, 1, device=device)


def layer_of(codebook):
    layer = VectorQuantizer(*codebook.shape, decay=0.99, channel_dim=1).to(codebook.device)
    layer.codebook.copy_(codebook)
    return layer


def step(x, forward):
    """One training step: outputs of the quantizer and the gradient of x."""

    def run():
        leaf = x.detach().requires_grad_()
        quantized, indices, loss = forward(leaf)
        (loss.sum() + quantized.sum()).backward()
        return indices, leaf.grad

    return run


def genperf_step(x, codebook):
    return step(x, layer_of(codebook))


def plain_step(x, codebook):
    layer = layer_of(codebook)
    return step(x, lambda leaf: plain_pytorch_quantizer(leaf, layer))


def compiled_step(x, codebook):
    layer = layer_of(codebook)
    quantizer = torch.compile(plain_pytorch_quantizer)
    return step(x, lambda leaf: quantizer(leaf, layer))


def vector_quantize_pytorch_step(x, codebook):
    package = pytest.importorskip("vector_quantize_pytorch")
    k, d = codebook.shape
    layer = package.VectorQuantize(d, k, decay=0.99, commitment_weight=0.25, rotation_trick=False, accept_image_fmap=True).to(x.device)
    layer._codebook.embed.copy_(codebook.unsqueeze(0))
    layer._codebook.embed_avg.copy_(codebook.unsqueeze(0))
    return step(x, layer)


CONTENDERS = {
    "genperf": (genperf_step, 0),
    "PyTorch": (plain_step, 24),
    "torch.compile": (compiled_step, 24),
    "vector-quantize-pytorch": (vector_quantize_pytorch_step, 32),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_vector_quantize(benchmark, workload, contender, size, device):
    name, n, k, d = size(workload)
    make, bytes_per_pair = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * k)
    x, codebook = image_of(n, d, device), torch.randn(k, d, device=device)

    expected, _, _ = genperf.vector_quantize(x, codebook, channel_dim=1)
    indices, gradient = make(x, codebook)()
    wrong = (codebook[indices].movedim(-1, 1) != expected).any(1).float().mean().item()
    assert wrong < 0.1, f"{contender} disagrees in {wrong:.0%} of the vectors: not the same step"
    exact = 1 + 2 * 0.25 / x.numel() * (x - expected)
    assert (gradient - exact).abs().mean() < 1e-5

    measure(
        benchmark, make(x, codebook), device, flops=2.0 * n * k * d, moved=4 * (4 * n + 3 * k) * d + 8 * n, pairs=n * k,
        op="vector_quantize", workload=name, N=n, K=k, D=d, contender=contender, wrong_rows=wrong,
    )  # fmt: skip
