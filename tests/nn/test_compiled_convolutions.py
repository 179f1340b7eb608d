"""torch.compile of convolution, op or layer, convolution: Inductor chooses memory layouts around convolutions."""

import copy

import pytest
import torch
from torch import nn

import genperf
from genperf.compat import diffusers, taming
from genperf.compat import vector_quantize_pytorch as vqp
from genperf.nn import (
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
)

CHANNELS = 8
SIZES = [(2, 3, 6, 10), (3, 3, 9, 6)]


class Op(nn.Module):
    """An op of an image and a codebook as a layer that returns an image and a loss."""

    def __init__(self, function, *codebook):
        super().__init__()
        self.function = function
        self.codebook = nn.Parameter(torch.randn(codebook)) if codebook else None

    def forward(self, x):
        return self.function(x) if self.codebook is None else self.function(x, self.codebook)


class Layer(nn.Module):
    """A layer, and how its outputs give an image and a loss."""

    def __init__(self, layer, pick):
        super().__init__()
        self.layer = layer
        self.pick = pick

    def forward(self, x):
        return self.pick(self.layer(x))


class BetweenConvolutions(nn.Module):
    """Each of several parts between convolutions of its own."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.first = nn.ModuleDict({name: nn.Conv2d(3, CHANNELS, 3, padding=1) for name in parts})
        self.second = nn.ModuleDict({name: nn.Conv2d(CHANNELS, 3, 3, padding=1) for name in parts})

    def forward(self, x):
        outputs = {}
        for name, part in self.parts.items():
            image, loss = part(self.first[name](x))
            outputs[name] = self.second[name](image), loss
        return outputs


def ops():
    rotated = {"gradient": "rotation"}
    return {
        "vector_quantize": Op(lambda x, c: genperf.vector_quantize(x, c, channel_dim=1)[::2], 16, CHANNELS),
        "vector_quantize_rotation": Op(lambda x, c: genperf.vector_quantize(x, c, channel_dim=1, **rotated)[::2], 16, CHANNELS),
        "residual": Op(lambda x, c: total_loss(genperf.residual_vector_quantize(x, c, channel_dim=1)), 2, 16, CHANNELS),
        "finite_scalar": Op(lambda x: (genperf.finite_scalar_quantize(x, [5] * CHANNELS, channel_dim=1)[0], x.sum())),
        "lookup_free": Op(lambda x: (genperf.lookup_free_quantize(x, spherical=True, channel_dim=1)[0], lookup_free_loss(x))),
        "gumbel": Op(lambda x, c: mean_kl(genperf.gumbel_sample(x, c, noise=torch.ones_like(x), dim=1)[::2]), CHANNELS, CHANNELS),
        "gaussian": Op(lambda x: mean_kl(genperf.gaussian_sample(x, 0.1 * x, noise=torch.ones_like(x)))),
        "interpolate": Op(lambda x: (genperf.interpolate(x, 2 * x, weight=torch.full((len(x),), 0.3)), x.sum())),
        "code_entropy": Op(lambda x, c: (x, sum(genperf.code_entropy(x, c, channel_dim=1))), 16, CHANNELS),
        "code_cross_entropy": Op(lambda x, c: (x, cross_entropy(x, c)), 16, CHANNELS),
    }


def layers():
    def finite_scalar_image(out):
        return out[0], out[0].sum()

    return {
        "VectorQuantizer": Layer(VectorQuantizer(16, CHANNELS, channel_dim=1), lambda out: (out[0], out[2])),
        "projection": Layer(VectorQuantizer(16, CHANNELS, code_dim=4, heads=2, channel_dim=1), lambda out: (out[0], out[2])),
        "EMA": Layer(VectorQuantizer(16, CHANNELS, decay=0.9, channel_dim=1), lambda out: (out[0], out[2])),
        "residual": Layer(ResidualVectorQuantizer(2, 16, CHANNELS, groups=2, channel_dim=1), total_loss),
        "FSQ": Layer(FiniteScalarQuantizer([5, 4, 3], dim=CHANNELS, channel_dim=1), finite_scalar_image),
        "LFQ": Layer(LookupFreeQuantizer(4, dim=CHANNELS, channel_dim=1), lambda out: (out[0], out[2])),
        "compat_FSQ": Layer(vqp.FSQ([5, 4, 3], dim=CHANNELS), finite_scalar_image),
        "compat_LFQ": Layer(vqp.LFQ(codebook_size=16, dim=CHANNELS), lambda out: (out[0], out[2])),
        "taming": Layer(taming.VectorQuantizer2(16, CHANNELS, 0.25), lambda out: out[:2]),
        "diffusers": Layer(diffusers.VectorQuantizer(16, CHANNELS, 0.25), lambda out: out[:2]),
    }


def total_loss(outputs):
    return outputs[0], outputs[2].sum()


def mean_kl(outputs):
    return outputs[0], outputs[1].mean()


def lookup_free_loss(x):
    sample, codebook = genperf.lookup_free_entropy(x, inv_temperature=1.0, channel_dim=1)
    return sample - codebook


def cross_entropy(x, codebook):
    indices = torch.zeros(len(x), *x.shape[2:], dtype=torch.int64, device=x.device)
    return genperf.code_cross_entropy(x, codebook, indices, channel_dim=1).mean()


def gradients(model, run, x):
    x = x.clone().requires_grad_()
    outputs = run(x)
    model.zero_grad()
    sum(image.square().mean() + loss for image, loss in outputs.values()).backward()
    return outputs, {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


# Sizes are symbols from the first call on; numbers that are options stay numbers, as in a model that is compiled by default.
@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.parametrize(
    ("parts", "impl", "sizes"),
    [(ops, "native", SIZES), (ops, "reference", SIZES), (layers, "native", SIZES), (layers, "reference", SIZES[1:])],
)
def test_between_convolutions(parts, impl, sizes, device, monkeypatch):
    if impl == "reference":
        monkeypatch.setattr("genperf.ops._dispatch._only_reference", True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = BetweenConvolutions(parts()).to(device)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for size in sizes:
        x = torch.randn(size, device=device)
        expected, expected_gradients = gradients(eager, eager, x)
        found, found_gradients = gradients(model, compiled, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-4, atol=1e-5)
