# SPDX-License-Identifier: Apache-2.0
"""Functions that view contiguous inputs themselves: results equal those of inputs that are viewed outside, and can be modified in place."""

import pytest
import torch
from torch.autograd import forward_ad

import genperf
from genperf.ops._dispatch import choose_impl
from genperf.ops.gaussian_sample import unavailable


def codes(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


OPS = {
    "gaussian_sample": lambda x: genperf.gaussian_sample(x),
    "gaussian_sample, two tensors": lambda x: genperf.gaussian_sample(*x.chunk(2, 1)),
    "gumbel_sample": lambda x: genperf.gumbel_sample(x, dim=1)[::2],
    "gumbel_sample, codebook": lambda x: genperf.gumbel_sample(x, codes(6, 3), dim=1)[::2],
    "gumbel_sample, hard": lambda x: genperf.gumbel_sample(x, codes(6, 3), hard=True, dim=1)[::2],
    "interpolate": lambda x: (genperf.interpolate(x, x.detach() + 1),),
    "gradient_norm_penalty": lambda x: (genperf.gradient_norm_penalty(x),),
    "finite_scalar_quantize": lambda x: genperf.finite_scalar_quantize(x, [8, 5, 5, 5, 4, 3], channel_dim=1)[:1],
    "lookup_free_quantize": lambda x: genperf.lookup_free_quantize(x, channel_dim=1)[:1],
    "lookup_free_quantize, spherical": lambda x: genperf.lookup_free_quantize(x, spherical=True, channel_dim=1)[:1],
    "vector_quantize": lambda x: genperf.vector_quantize(x, codes(5, 6), channel_dim=1)[::2],
    "vector_quantize, rotation": lambda x: genperf.vector_quantize(x, codes(5, 6), gradient="rotation", channel_dim=1)[::2],
    "residual_vector_quantize": lambda x: genperf.residual_vector_quantize(x, codes(2, 5, 6), channel_dim=1)[::2],
}


def outputs_and_gradients(op, x, in_place=False):
    torch.manual_seed(0)
    outputs = op(x)
    if in_place:
        outputs[0].mul_(3)
    weights = [torch.linspace(1, 2, t.numel()).reshape(t.shape) for t in outputs]
    loss = sum((weight * t).sum() for weight, t in zip(weights, outputs, strict=True))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x, allow_unused=True) if gradient.requires_grad else (None,)
    return *outputs, gradient, second


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 2, 3)])
def test_a_contiguous_input_gives_what_a_strided_one_gives(name, shape):
    x = torch.randn(shape, requires_grad=True)
    strided = torch.empty(*shape, 2)[..., 0].copy_(x.detach()).requires_grad_()
    for found, expected in zip(outputs_and_gradients(OPS[name], x), outputs_and_gradients(OPS[name], strided), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OPS)
def test_an_output_can_be_modified_in_place(name):
    def tripled(x):
        first, *rest = OPS[name](x)
        return first * 3, *rest

    x = torch.randn(3, 6, requires_grad=True)
    for found, expected in zip(outputs_and_gradients(OPS[name], x, in_place=True), outputs_and_gradients(tripled, x), strict=True):
        if found is not None:
            torch.testing.assert_close(found, expected)


LAYERS = ({}, {"decay": 0.9}, {"decay": 0.9, "separate_codebooks": True}, {"decay": 0.9, "replace_dead_below": 1.0, "update": "accumulate"})
LAYERS = (*LAYERS, {"orthogonal_weight": 0.1}, {"sample_temperature": 1.0}, {"num_codes": 1})


@pytest.mark.parametrize("options", LAYERS)
def test_the_layer_trains_as_with_views_outside_of_the_function(options, monkeypatch):
    layers, inputs, outputs = [], [], []
    for within in (True, False):
        torch.manual_seed(0)
        layers.append(genperf.nn.VectorQuantizer(**{"num_codes": 8, "dim": 4, **options}))
        inputs.append(torch.randn(5, 3, 4, requires_grad=True))
        if not within:
            monkeypatch.setattr(layers[-1], "_can_view_within", lambda x: False)
        for _ in range(2):
            outputs.append(layers[-1](inputs[-1], torch.arange(15).reshape(5, 3) % 4 > 0))
            (outputs[-1][0].sin().sum() + outputs[-1][2]).backward()
    for found, expected in zip(outputs[:2], outputs[2:], strict=True):
        for t, other in zip(found, expected, strict=True):
            assert torch.equal(t, other)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    tensors = [{**layer.state_dict(), **{f"{name}.grad": p.grad for name, p in layer.named_parameters()}} for layer in layers]
    for name, t in tensors[0].items():
        assert torch.equal(t, tensors[1][name]), name


def test_a_forward_mode_tangent_is_not_lost():
    layer = genperf.nn.VectorQuantizer(8, 4)
    x, tangent = torch.randn(2, 5, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        layer(forward_ad.make_dual(x, tangent))


def test_a_choice_does_not_change_that_of_the_next_call():
    moments, noise = torch.randn(2, 4), torch.randn(2, 2, requires_grad=True)
    before = dict(unavailable(moments.device, moments.dtype))
    sample, _ = genperf.gaussian_sample(moments, noise=noise)
    assert sample.requires_grad
    assert unavailable(moments.device, moments.dtype) == before


def test_a_missing_library_is_seen_after_a_call(monkeypatch):
    from genperf import _library

    device = torch.device("cpu")
    monkeypatch.setattr(_library, "cpu_failure", None)
    assert choose_impl("gaussian_sample", None, unavailable(device, torch.float32)) == "native"
    monkeypatch.setattr(_library, "cpu_failure", "not built.")
    assert choose_impl("gaussian_sample", None, unavailable(device, torch.float32)) == "reference"
