# SPDX-License-Identifier: Apache-2.0
"""A training step of residual VQ with 8 quantizers, forward, backward and EMA, on float32 tokens [B, T, D]."""

import pytest
import torch
import torch.nn.functional as F

import genperf
from genperf.nn import ResidualVectorQuantizer

from measure import measure, skip_too_large  # isort: skip
from workloads import WORKLOADS  # isort: skip

NUM_QUANTIZERS = 8
AUDIO = [workload for workload in WORKLOADS if workload.name in ("EnCodec-level", "DAC-level")]


def layer_of(codebooks):
    layer = ResidualVectorQuantizer(*codebooks.shape, decay=0.99, commitment_weight=1.0).to(codebooks.device)
    layer.load_state_dict(layer.state_dict() | {"codebook": codebooks, "sums": codebooks})
    return layer


def step(x, forward):
    """One training step: the indices, and the gradient of x."""

    def run():
        leaf = x.detach().requires_grad_()
        quantized, indices, losses = forward(leaf)
        (losses.sum() + quantized.sum()).backward()
        return indices, leaf.grad

    return run


def plain_lines(x, state):
    """A training step as commonly written in PyTorch, which updates the moving averages of `state`."""
    residual, total, indices, losses = x.flatten(0, 1), 0, [], []
    for stage, codebook in enumerate(state.codebook.unbind(0)):
        index = torch.cdist(residual.detach(), codebook).argmin(1)
        code = F.embedding(index, codebook)
        losses.append(F.mse_loss(residual, code))
        with torch.no_grad():
            one_hot = F.one_hot(index, state.num_codes).to(x.dtype)
            counts = state.counts[stage].mul_(state.decay).add_(one_hot.sum(0), alpha=1 - state.decay)
            sums = state.sums[stage].mul_(state.decay).add_(one_hot.T @ residual, alpha=1 - state.decay)
            smoothed = (counts + state.eps) / (counts.sum() + state.num_codes * state.eps) * counts.sum()
            state.codebook[stage] = sums / smoothed[:, None]
        residual, total = residual - code, total + code
        indices.append(index)
    total = x + (total.view(x.shape) - x).detach()
    return total, torch.stack(indices, -1).view(*x.shape[:-1], -1), torch.stack(losses)


# Each contender makes a forward pass that starts from the given codebooks.


def genperf_layer(codebooks):
    return layer_of(codebooks)


def plain_layer(codebooks):
    layer = layer_of(codebooks)
    return lambda leaf: plain_lines(leaf, layer)


def vector_quantize_pytorch_layer(codebooks):
    package = pytest.importorskip("vector_quantize_pytorch")
    num_quantizers, k, d = codebooks.shape
    layer = package.ResidualVQ(dim=d, num_quantizers=num_quantizers, codebook_size=k, decay=0.99, rotation_trick=False).to(codebooks.device)
    for one, codebook in zip(layer.layers, codebooks, strict=True):
        one._codebook.embed.copy_(codebook.unsqueeze(0))
        one._codebook.embed_avg.copy_(codebook.unsqueeze(0))
    return layer


CONTENDERS = {
    "genperf": (genperf_layer, 0),
    "PyTorch": (plain_layer, 24),
    "vector-quantize-pytorch": (vector_quantize_pytorch_layer, 25),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", AUDIO, ids=str)
def test_residual_vector_quantize(benchmark, workload, contender, size, device):
    name, n, k, d = size(workload)
    make, bytes_per_pair = CONTENDERS[contender]
    skip_too_large(contender, bytes_per_pair * n * k)
    x = torch.randn(8, n // 8, d, device=device)
    # The residual of such a stage is smaller by about this factor.
    codebooks = torch.randn(NUM_QUANTIZERS, k, d, device=device) * 0.8 ** torch.arange(NUM_QUANTIZERS, device=device).view(-1, 1, 1)

    _, expected, _ = genperf.residual_vector_quantize(x, codebooks)
    indices, gradient = step(x, make(codebooks))()
    wrong = (indices != expected).any(-1).float().mean().item()
    assert wrong < 0.1, f"{contender} disagrees in {wrong:.0%} of the vectors: not the same step"
    assert gradient.isfinite().all()

    # Several batches, since the codebooks would fit a single one ever better.
    batches = [torch.randn_like(x) for _ in range(8)]
    steps = [step(batch, forward) for forward in [make(codebooks)] for batch in batches]
    measure(
        benchmark, lambda: steps.insert(0, steps.pop()) or steps[0](), device, flops=2.0 * NUM_QUANTIZERS * n * k * d,
        moved=4 * (4 * n + 3 * NUM_QUANTIZERS * k) * d + 8 * NUM_QUANTIZERS * n, pairs=NUM_QUANTIZERS * n * k,
        op="residual_vector_quantize", workload=name, N=n, K=k, D=d, quantizers=NUM_QUANTIZERS, contender=contender, wrong_rows=wrong,
    )  # fmt: skip
