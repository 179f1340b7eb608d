# SPDX-License-Identifier: Apache-2.0
"""A training step, forward and backward, of FSQ, and of LFQ with its entropy loss, on float32 tokens [B, n, D]."""

import pytest
import torch

from genperf.compat import vector_quantize_pytorch as drop_in

from measure import MANY_ROUNDS, measure, skip_too_large  # isort: skip

LEVELS = [8, 5, 5, 5]
# Tokens, and bits of a code: Open-MAGVIT2's codebook is 2^18.
FSQ_SIZES = (2048, 16384, 65536)
LFQ_SIZES = ((2048, 13), (16384, 13), (65536, 13), (2048, 18), (16384, 18))
BYTES_PER_PAIR = 28  # of upstream, for each token and code


def layers(contender, name, compiled, device, **options):
    """The contender's layer, and that of genperf with the same parameters."""
    reference = getattr(drop_in, name)(**options).to(device)
    if contender == "genperf":
        return reference, reference
    upstream = getattr(pytest.importorskip("vector_quantize_pytorch"), name)(**options).to(device)
    upstream.load_state_dict(reference.state_dict())
    return compiled(upstream) if contender == "compiled" else upstream, reference


def step(layer, x, upstream):
    """One training step: indices, loss, and the gradient of x."""

    def run():
        leaf = x.detach().requires_grad_()
        quantized, indices, *loss = layer(leaf)
        (gradient,) = torch.autograd.grad([quantized, *loss], leaf, [upstream, *(torch.ones_like(value) for value in loss)])
        return indices, *loss, gradient

    return run


def verify(found, expected):
    """Check a step; tokens within a rounding of the middle between two codes may have either."""
    assert (found[0] == expected[0]).float().mean() > 0.999
    for value, reference in zip(found[1:], expected[1:], strict=True):
        assert (value - reference).abs().max() < 1e-3 * max(1, reference.abs().max())


def tokens(n, d, device):
    return torch.randn(max(1, n // 1024), min(n, 1024), d, device=device)


@pytest.mark.parametrize("contender", ["genperf", "vector-quantize-pytorch", "compiled"])
@pytest.mark.parametrize("count", FSQ_SIZES)
def test_finite_scalar_quantize(benchmark, count, contender, size, compiled, device):
    (n,) = (count,) if not benchmark.disabled else size((count,))
    x, upstream = tokens(n, len(LEVELS), device), tokens(n, len(LEVELS), device)
    layer, reference = layers(contender, "FSQ", compiled, device, levels=LEVELS)
    verify(step(layer, x, upstream)(), step(reference, x, upstream)())
    measure(
        benchmark, step(layer, x, upstream), device, moved=4 * 5 * x.numel() + 4 * n, least_rounds=MANY_ROUNDS,
        op="finite_scalar_quantize", workload=f"{LEVELS}, forward and backward", N=n, contender=contender,
    )  # fmt: skip


@pytest.mark.parametrize("contender", ["genperf", "vector-quantize-pytorch", "compiled"])
@pytest.mark.parametrize(("count", "bits"), LFQ_SIZES)
def test_lookup_free_quantize(benchmark, count, bits, contender, size, compiled, device):
    n, d = (count, bits) if not benchmark.disabled else size((count, bits))
    skip_too_large(contender, 0 if contender == "genperf" else BYTES_PER_PAIR * n * 2**d)
    x, upstream = tokens(n, d, device), tokens(n, d, device)
    layer, reference = layers(contender, "LFQ", compiled, device, codebook_size=2**d)
    verify(step(layer, x, upstream)(), step(reference, x, upstream)())
    measure(
        benchmark, step(layer, x, upstream), device, flops=6.0 * n * 2**d, moved=4 * 4 * x.numel() + 8 * n + 8 * 2**d, pairs=n * 2**d,
        op="lookup_free_quantize", workload="with entropies, forward and backward", N=n, K=2**d, D=d, contender=contender,
    )  # fmt: skip
