# SPDX-License-Identifier: Apache-2.0
"""A training step of the quantizer, forward, backward and EMA, on channels-first float32 images."""

import math

import pytest
import torch
import torch.nn.functional as F

import genperf
from genperf.nn import VectorQuantizer

from measure import measure, skip_too_large  # isort: skip
from workloads import WORKLOADS  # isort: skip


def image_of(n, d, device):
    """n vectors as a batch of images [B, D, H, W]."""
    pixels = math.gcd(n, 1024)
    return torch.randn(n // pixels, d, pixels, 1, device=device)


def layer_of(codebook):
    layer = VectorQuantizer(*codebook.shape, decay=0.99, channel_dim=1).to(codebook.device)
    layer.load_state_dict(layer.state_dict() | {"codebook": codebook, "sums": codebook})
    return layer


def step(x, forward):
    """One training step: outputs of the quantizer and the gradient of x."""

    def run():
        leaf = x.detach().requires_grad_()
        quantized, indices, loss = forward(leaf)
        (loss.sum() + quantized.sum()).backward()
        return indices, leaf.grad

    return run


def plain_lines(x, state):
    """A training step as commonly written in PyTorch, which updates the moving averages of `state`."""
    channels_last = x.permute(0, 2, 3, 1).contiguous()
    flat = channels_last.view(-1, state.dim)
    indices = torch.cdist(flat.detach(), state.codebook).argmin(1)
    quantized = F.embedding(indices, state.codebook).view(channels_last.shape)
    loss = state.commitment_weight * F.mse_loss(channels_last, quantized)
    with torch.no_grad():
        one_hot = F.one_hot(indices, state.num_codes).to(flat.dtype)
        state.counts.lerp_(one_hot.sum(0), 1 - state.decay)
        # Inductor drops the alpha of an add_ of a product on processors without AMX.
        state.sums.lerp_(one_hot.T @ flat, 1 - state.decay)
        total = state.counts.sum()
        smoothed = (state.counts + state.eps) / (total + state.num_codes * state.eps) * total
        state.codebook = state.sums / smoothed[:, None]
    quantized = channels_last + (quantized - channels_last).detach()
    return quantized.permute(0, 3, 1, 2).contiguous(), indices.view(channels_last.shape[:-1]), loss


# Each contender makes a layer that starts from the given codebook, and its forward pass.


def genperf_layer(codebook, compiled):
    layer = layer_of(codebook)
    return layer, layer


def plain_layer(codebook, compiled):
    layer = layer_of(codebook)
    return layer, lambda leaf: plain_lines(leaf, layer)


def compiled_layer(codebook, compiled):
    layer, lines = layer_of(codebook), compiled(plain_lines)
    return layer, lambda leaf: lines(leaf, layer)


def vector_quantize_pytorch_layer(codebook, compiled):
    package = pytest.importorskip("vector_quantize_pytorch")
    k, d = codebook.shape
    layer = package.VectorQuantize(d, k, decay=0.99, commitment_weight=0.25, rotation_trick=False, accept_image_fmap=True)
    layer.to(codebook.device)
    layer._codebook.embed.copy_(codebook.unsqueeze(0))
    layer._codebook.embed_avg.copy_(codebook.unsqueeze(0))
    return layer, layer


CONTENDERS = {
    "genperf": (genperf_layer, 0),
    "PyTorch": (plain_layer, 24),
    "torch.compile": (compiled_layer, 24),
    "vector-quantize-pytorch": (vector_quantize_pytorch_layer, 32),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_vector_quantize(benchmark, workload, contender, size, compiled, device):
    name, n, k, d = size(workload)
    make, bytes_per_pair = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * k)
    x, codebook = image_of(n, d, device), torch.randn(k, d, device=device)

    expected, _, _ = genperf.vector_quantize(x, codebook, channel_dim=1)
    layer, forward = make(codebook, compiled)
    indices, gradient = step(x, forward)()
    wrong = (codebook[indices].movedim(-1, 1) != expected).any(1).float().mean().item()
    assert wrong < 0.1, f"{contender} disagrees in {wrong:.0%} of the vectors: not the same step"
    exact = 1 + 2 * 0.25 / x.numel() * (x - expected)
    assert (gradient - exact).abs().mean() < 1e-5
    if isinstance(layer, VectorQuantizer) and wrong == 0:
        expected_layer = layer_of(codebook)
        expected_layer(x)
        torch.testing.assert_close(layer.codebook, expected_layer.codebook, rtol=1e-4, atol=1e-5)

    measure(
        benchmark, step(x, make(codebook, compiled)[1]), device, flops=2.0 * n * k * d, moved=4 * (4 * n + 3 * k) * d + 8 * n, pairs=n * k,
        op="vector_quantize", workload=name, N=n, K=k, D=d, contender=contender, wrong_rows=wrong,
    )  # fmt: skip
