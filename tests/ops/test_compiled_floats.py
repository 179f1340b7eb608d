# SPDX-License-Identifier: Apache-2.0
"""torch.compile of ops whose Python floats are symbols: with dynamic shapes, and where a float changes between calls."""

import inspect

import pytest
import torch
from torch import Tensor

import genperf

CHANNELS = 8
OPS = {
    "vector_quantize": lambda x, c, **w: genperf.vector_quantize(x, c, channel_dim=1, **w)[::2],
    "residual_vector_quantize": lambda x, c, **w: genperf.residual_vector_quantize(x, c.view(2, -1, CHANNELS), channel_dim=1, **w)[::2],
    "code_entropy": lambda x, c, **w: genperf.code_entropy(x, c, channel_dim=1, **w),
    "code_cross_entropy": lambda x, c, **w: [genperf.code_cross_entropy(x, c, first_code(x), channel_dim=1, **w)],
    "sample_code": lambda x, c, **w: [x * (genperf.sample_code(x.detach(), c.detach(), channel_dim=1, **w) >= 0).unsqueeze(1)],
    "lookup_free_quantize": lambda x, c, **w: genperf.lookup_free_quantize(x, channel_dim=1, **w)[:1],
    "lookup_free_decode": lambda x, c, **w: [x * genperf.lookup_free_decode(first_code(x), CHANNELS, channel_dim=1, **w)],
    "lookup_free_entropy": lambda x, c, **w: genperf.lookup_free_entropy(x, channel_dim=1, **w),
    "gaussian_sample": lambda x, c, **w: genperf.gaussian_sample(x, 0.1 * x, noise=torch.ones_like(x), **w),
    "gumbel_sample": lambda x, c, **w: genperf.gumbel_sample(x, c, dim=1, noise=torch.ones_like(x), **w)[::2],
    "perturb": lambda x, c, **w: [genperf.perturb(x, weight=torch.ones(len(x), device=x.device), **w)],
    "gradient_norm_penalty": lambda x, c, **w: [genperf.gradient_norm_penalty(x, **w)],
}


def first_code(x: Tensor) -> Tensor:
    return torch.zeros(len(x), *x.shape[2:], dtype=torch.int64, device=x.device)


def floats_of(op: str) -> list[str]:
    parameters = inspect.signature(getattr(genperf, op)).parameters.values()
    return [p.name for p in parameters if p.annotation in (float, float | Tensor)]


FLOATS = {op: floats_of(op) for op in OPS}


def each_op_twice(x: Tensor, codebook: Tensor, given: dict[str, list[float]]) -> list[Tensor]:
    """The ops with their default floats and with given ones, which two calls read."""
    outputs = []
    for name, floats in given.items():
        for options in ({}, dict(zip(FLOATS[name], floats, strict=True))):
            for image in (x, 2 * x):
                outputs += OPS[name](image, codebook, **options)
    return outputs


def test_every_op_with_a_float_is_here():
    functions = (name for name in genperf.ops.__all__ if inspect.isfunction(getattr(genperf, name)))
    assert {name for name in functions if floats_of(name)} == set(OPS)


# A float is a symbol with dynamic shapes, and after it has changed.
@pytest.mark.parametrize(("dynamic", "ops", "values"), [(True, OPS, (0.5,)), (None, ["vector_quantize"], (0.5, 0.625))])
def test_a_float_is_read_by_two_ops(dynamic, ops, values, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 3, 5, device=device, requires_grad=True)
    codebook = torch.randn(CHANNELS, CHANNELS, device=device, requires_grad=True)
    compiled = torch.compile(each_op_twice, dynamic=dynamic, fullgraph=True, backend="eager")
    for value in values:
        given = {name: [value + 0.25 * i for i in range(len(FLOATS[name]))] for name in ops}
        results = []
        for function in (each_op_twice, compiled):
            outputs = function(x, codebook, given)
            total = sum(out.square().sum() for out in outputs)
            results.append([*outputs, *torch.autograd.grad(total, (x, codebook))])
        torch.testing.assert_close(results[1], results[0])
