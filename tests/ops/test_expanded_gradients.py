# SPDX-License-Identifier: Apache-2.0
"""Upstream gradients of sums and means are expanded tensors. The kernels read them in place."""

import pytest
import torch

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled

SHAPE = (2, 6, 5, 13)  # full vectors and a rest, for every width of vectors


def gumbel_sample(x):
    return genperf.gumbel_sample(x, dim=1, generator=torch.Generator(x.device).manual_seed(3))[::2]


def gumbel_sample_of_rows(x):
    return genperf.gumbel_sample(x.flatten(1), generator=torch.Generator(x.device).manual_seed(3))[::2]


def gaussian_sample(x):
    return genperf.gaussian_sample(x, generator=torch.Generator(x.device).manual_seed(3))


def interpolate(x):
    return (genperf.interpolate(x, x.detach() + 1, weight=torch.linspace(0, 1, len(x), device=x.device)),)


def vector_quantize(x):
    return genperf.vector_quantize(x, x.detach()[:, :, 0, :4].transpose(1, 2).flatten(0, 1), channel_dim=1)[::2]


def vector_quantize_rotated(x):
    codebook = x.detach()[:, :, 0, :4].transpose(1, 2).flatten(0, 1) + 1
    return genperf.vector_quantize(x, codebook, channel_dim=1, gradient="rotation")[::2]


def vector_quantize_rows(x):
    return genperf.vector_quantize(x, x.detach()[0, 0] + 1)[::2]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "op",
    [gumbel_sample, gumbel_sample_of_rows, gaussian_sample, interpolate, vector_quantize, vector_quantize_rotated, vector_quantize_rows],
)
def test_an_expanded_gradient_equals_a_contiguous_one(op, dtype, device):
    x = torch.randn(SHAPE, device=device, dtype=dtype, requires_grad=True)
    outputs = op(x)
    for size in (1, SHAPE[0]):  # of a sum, and of sums for each sample
        upstream = [torch.randn(min(size, len(y)) if y.dim() else (), device=device).to(y.dtype) for y in outputs]
        expanded = [g.view(-1, *[1] * (y.dim() - 1)).expand(y.shape) if y.dim() else g for g, y in zip(upstream, outputs, strict=True)]
        contiguous = [g.contiguous() for g in expanded]
        found, expected = (torch.autograd.grad(outputs, x, g, retain_graph=True)[0] for g in (expanded, contiguous))
        assert torch.equal(found, expected)
        assert found.any()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_norms_of_expanded_gradients(dtype, device):
    expanded = torch.randn(3, 1, 1, device=device).to(dtype).expand(3, 6, 35)
    found, expected = expanded.detach().requires_grad_(), expanded.contiguous().requires_grad_()
    losses = [genperf.gradient_norm_penalty(t) for t in (found, expected)]
    values = [loss if isinstance(loss, torch.Tensor) else loss[0] for loss in losses]
    assert torch.equal(*values)
    assert torch.equal(torch.autograd.grad(values[0], found)[0], torch.autograd.grad(values[1], expected)[0])
