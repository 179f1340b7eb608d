# SPDX-License-Identifier: Apache-2.0
"""torch.compile of convolution, op or layer, convolution: Inductor chooses memory layouts around convolutions.

For each image size Inductor compiles a graph of its own, of any batch size: a convolution specializes its height and width, in plain
PyTorch too. Most of the time is spent in the C++ compiler, so all parts share a graph and each graph runs with two batch sizes. It starts
from symbolic sizes, as it does in training at the second image size.
"""

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
IMAGES = [(6, 10), (9, 6)]


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


class Decoder(nn.Module):
    """A layer as one of an image that returns the codes of indices computed from it."""

    def __init__(self, layer, decode):
        super().__init__()
        self.layer = layer
        self.decode = decode

    def forward(self, x):
        return self.decode(self.layer, bits_of(x)), x.mean()


class BetweenConvolutions(nn.Module):
    """Each of several parts between convolutions of its own."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.first = nn.ModuleDict({name: nn.Conv2d(3, CHANNELS, 3, padding=1) for name in parts})
        self.second = nn.ModuleDict({name: nn.Conv2d(CHANNELS, 3, 3, padding=1) for name in parts})

    def forward(self, x):
        images = {name: first(x) for name, first in self.first.items()}
        outputs = {name: part(images[name]) for name, part in self.parts.items()}
        return {name: (self.second[name](image), loss) for name, (image, loss) in outputs.items()}


def ops():
    return {
        "vector_quantize": Op(lambda x, c: genperf.vector_quantize(x, c, channel_dim=1)[::2], 16, CHANNELS),
        "vector_quantize_rotation": Op(rotated, 16, CHANNELS),  # of given codes: the search is that of the line above
        "residual": Op(lambda x, c: total_loss(genperf.residual_vector_quantize(x, c, channel_dim=1)), 2, 16, CHANNELS),
        "finite_scalar": Op(lambda x: (genperf.finite_scalar_quantize(x, [5] * CHANNELS, channel_dim=1)[0], 0)),
        "lookup_free": Op(lambda x: (genperf.lookup_free_quantize(x, spherical=True, channel_dim=1)[0], lookup_free_loss(x))),
        "gumbel": Op(lambda x, c: mean_kl(genperf.gumbel_sample(x, c, noise=torch.ones_like(x), dim=1)[::2]), CHANNELS, CHANNELS),
        "gaussian": Op(lambda x: mean_kl(genperf.gaussian_sample(x, 0.1 * x, noise=torch.ones_like(x)))),
        "interpolate": Op(lambda x: (genperf.interpolate(x, 2 * x, weight=torch.full((len(x),), 0.3)), 0)),
        "code_softmax": Op(lambda x, c: (x, sum(genperf.code_entropy(x, c, channel_dim=1)) + cross_entropy(x, c)), 16, CHANNELS),
    }


def layers():
    return {
        "projection": Layer(VectorQuantizer(16, CHANNELS, code_dim=4, heads=2, channel_dim=1), lambda out: (out[0], out[2])),
        "EMA": Layer(VectorQuantizer(16, CHANNELS, decay=0.9, channel_dim=1), lambda out: (out[0], out[2])),
        "residual": Layer(ResidualVectorQuantizer(2, 16, CHANNELS, groups=2, channel_dim=1), total_loss),
        "FSQ": Layer(FiniteScalarQuantizer([5] * CHANNELS, channel_dim=1), lambda out: (out[0], 0)),
        "LFQ": Layer(LookupFreeQuantizer(4, dim=CHANNELS, channel_dim=1), lambda out: (out[0], out[2])),
        "compat_VQ": Layer(vqp.VectorQuantize(CHANNELS, 16, accept_image_fmap=True), lambda out: (out[0], out[2])),
        "compat_residual": Layer(vqp.ResidualVQ(dim=CHANNELS, num_quantizers=2, codebook_size=16, accept_image_fmap=True), total_loss),
        "compat_FSQ": Layer(vqp.FSQ([5, 4, 3], dim=CHANNELS), lambda out: (out[0], 0)),
        "compat_LFQ": Layer(vqp.LFQ(codebook_size=2**CHANNELS), lambda out: (out[0], out[2])),
        "compat_SimVQ": Layer(vqp.SimVQ(CHANNELS, 16, channel_first=True), lambda out: (out[0], out[2])),
        "taming": Layer(taming.VectorQuantizer2(16, CHANNELS, 0.25), lambda out: out[:2]),
        "diffusers": Layer(diffusers.VectorQuantizer(16, CHANNELS, 0.25), lambda out: out[:2]),
    }


def decoders():
    """Layers that look up an image of codes, whose gradient reaches the codebook or the projection; the image of indices is dense."""
    learnable = {"ema_update": False, "learnable_codebook": True}
    return {
        "VectorQuantizer": Decoder(VectorQuantizer(16, CHANNELS, channel_dim=1), lambda layer, i: layer.decode(i)),
        "compat_VQ": Decoder(
            vqp.VectorQuantize(CHANNELS, 16, accept_image_fmap=True, **learnable), lambda layer, i: layer.get_output_from_indices(i)
        ),
        "compat_FSQ": Decoder(vqp.FSQ([4, 4], dim=CHANNELS), lambda layer, i: layer.indices_to_codes(i)),
        "compat_LFQ": Decoder(vqp.LFQ(codebook_size=16, dim=CHANNELS), lambda layer, i: layer.indices_to_codes(i)),
        "compat_SimVQ": Decoder(vqp.SimVQ(CHANNELS, 16, channel_first=True), lambda layer, i: layer.indices_to_codes(i)),
    }


def layers_and_decoders():
    return {**layers(), **{f"{name}_decoder": part for name, part in decoders().items()}}


def demanding_layers():
    """Layers that do more around their op than to call it, which for the reference takes long to compile."""
    return {name: part for name, part in layers().items() if name in ("projection", "residual", "LFQ", "compat_VQ")}


def rotated(x, codebook):
    return genperf.vector_quantize(x, codebook, indices=bits_of(x), gradient="rotation", channel_dim=1)[::2]


def bits_of(x):
    """Indices 0 and 1 of the positions of an image."""
    return (x.detach().sum(1) > 0).long()


def total_loss(outputs):
    return outputs[0], outputs[2].sum()


def mean_kl(outputs):
    return outputs[0], outputs[1].mean()


def lookup_free_loss(x):
    sample, codebook = genperf.lookup_free_entropy(x, inv_temperature=1.0, channel_dim=1)
    return sample - codebook


def cross_entropy(x, codebook):
    return genperf.code_cross_entropy(x, codebook, bits_of(x), channel_dim=1).mean()


def gradients(model, run, x):
    x = x.clone().requires_grad_()
    outputs = run(x)
    model.zero_grad()
    sum(image.square().mean() + loss for image, loss in outputs.values()).backward()
    return outputs, {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("parts", "impl"), [(ops, "native"), (ops, "reference"), (layers_and_decoders, "native"), (demanding_layers, "reference")]
)
def test_between_convolutions(parts, impl, device, monkeypatch):
    if impl == "reference":
        monkeypatch.setattr("genperf.ops._dispatch._only_reference", True)
    torch.manual_seed(0)
    image = IMAGES[impl == "reference"]
    compare(parts(), [(2, 3, *image), (3, 3, *image)], device, dynamic=True, recompiles=False)


def test_at_a_second_image_size(device):
    torch.manual_seed(0)
    parts = {"op": ops()["vector_quantize"], "layer": layers()["FSQ"]}
    compare(parts, [(2, 3, *image) for image in IMAGES], device, dynamic=None, recompiles=True)


# In the order of the model the loops between two calls of a library are one C++ file, which compiles faster without vectors. With
# symbolic floats, which ops/test_compiled_floats.py has, the model is traced twice.
@torch._inductor.config.patch({"reorder_for_peak_memory": False, "cpp.simdlen": 1})
@torch._dynamo.config.patch(specialize_float=True)
def compare(parts, sizes, device, dynamic, recompiles):
    torch._dynamo.reset()
    eager = BetweenConvolutions(parts).to(device)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True)
    for i, size in enumerate(sizes):
        x = torch.randn(size, device=device)
        expected, expected_gradients = gradients(eager, eager, x)
        with torch._dynamo.config.patch(error_on_recompile=i > 0 and not recompiles):
            found, found_gradients = gradients(model, compiled, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-4, atol=1e-5)
