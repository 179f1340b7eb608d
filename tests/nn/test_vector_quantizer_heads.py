# SPDX-License-Identifier: Apache-2.0
"""nn.VectorQuantizer with heads, a projection, masks, every layout and half precision, against plain PyTorch."""

import importlib
import itertools
import logging

import pytest
import torch
from torch.nn import functional as F

import genperf
from genperf.nn import VectorQuantizer

NAN = float("nan")


def plain(layer, x, mask=None):
    """Quantized, indices and loss of the layer, in plain PyTorch with a loop over heads; x is float64, [..., D]."""
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    x = torch.where(mask.unsqueeze(-1), x, 0)
    projected = x if layer.project_in is None else layer.project_in(x)
    outputs, found, errors = [], [], []
    for head, part in enumerate(projected.unflatten(-1, (layer.heads, -1)).unbind(-2)):
        codes = layer.codebook if layer.codebook.dim() == 2 else layer.codebook[head]
        if layer.metric == "cosine":
            part, codes = F.normalize(part, dim=-1), F.normalize(codes, dim=-1)
        indices = torch.cdist(part.detach()[mask], codes.detach()).argmin(-1)
        code = torch.zeros_like(part).masked_scatter(mask.unsqueeze(-1), codes[indices])
        found.append(torch.full(mask.shape, -1).masked_scatter(mask, indices))
        errors.append(
            layer.codebook_weight * (part.detach() - code)[mask].square().mean()
            + layer.commitment_weight * (part - code.detach())[mask].square().mean()
        )
        outputs.append(part + (code - part).detach())
    quantized = torch.cat(outputs, -1)
    quantized = quantized if layer.project_out is None else layer.project_out(quantized)
    quantized = torch.where(mask.unsqueeze(-1), quantized, 0)
    return quantized, found[0] if layer.heads == 1 else torch.stack(found, -1), sum(errors) / layer.heads


OPTIONS = {
    "shared codebook": {"heads": 3},
    "separate codebooks": {"heads": 3, "separate_codebooks": True},
    "one head": {"heads": 1, "separate_codebooks": True},
    "projected": {"code_dim": 2},
    "projected heads": {"code_dim": 4, "heads": 2, "separate_codebooks": True},
    "cosine": {"metric": "cosine", "heads": 2, "separate_codebooks": True},
    "cosine projected": {"metric": "cosine", "heads": 2, "code_dim": 2},
    "EMA": {"heads": 3, "separate_codebooks": True, "decay": 0.9},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_a_loop_over_heads(options, channel_dim, masked):
    layer = VectorQuantizer(7, 6, channel_dim=channel_dim, **options).double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    mask = torch.rand(3, 4, 5) < 0.6 if masked else None
    if masked:
        x[~mask] = NAN
    x, plain_x = (x.clone().movedim(-1, channel_dim).requires_grad_() for _ in range(2))
    expected = plain(layer, plain_x.movedim(channel_dim, -1), mask)
    parameters = list(layer.parameters())
    grad_output = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    (expected[0] * grad_output).sum().add(expected[2]).backward()
    expected_grads = [p.grad for p in parameters] + [plain_x.grad]
    layer.zero_grad(set_to_none=True)
    quantized, indices, loss = layer(x, mask)
    quantized = quantized.movedim(channel_dim, -1)
    (quantized * grad_output).sum().add(loss).backward()
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(quantized, expected[0])
    torch.testing.assert_close(loss, expected[2])
    for grad, wanted in zip([p.grad for p in parameters] + [x.grad], expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)
    layer.eval()
    quantized, indices, _ = layer(x, mask)
    torch.testing.assert_close(layer.decode(indices), quantized)
    if mask is None:
        assert torch.equal(layer.encode(x), indices)
    else:
        assert torch.equal(layer.encode(x, mask), indices)
        assert not layer.decode(indices).movedim(channel_dim, -1)[~mask].any()


@pytest.mark.parametrize("channel_dim", [1, 2])
def test_lengths_match_a_mask(channel_dim):
    layer = VectorQuantizer(5, 4, channel_dim=channel_dim, heads=2).eval()
    x = torch.randn(3, 6, 4).movedim(-1, channel_dim)
    lengths = torch.tensor([0, 6, 2])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    for found, expected in zip(layer(x, lengths=lengths), layer(x, mask), strict=True):
        assert torch.equal(found, expected)


IMAGES, AUDIO, VIDEO = (3, 8, 5, 7), (3, 8, 9), (2, 8, 3, 4, 5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(IMAGES),
        torch.randn(IMAGES).to(memory_format=torch.channels_last),
        torch.randn(AUDIO),
        torch.randn(AUDIO).mT.contiguous().mT,
        torch.randn(VIDEO),
        torch.randn(VIDEO).to(memory_format=torch.channels_last_3d),
    ],
    ids=["images", "channels-last images", "audio", "channels-last audio", "video", "channels-last video"],
)
def test_images_are_read_and_written_without_a_copy(x, heads, separate, monkeypatch):
    pointers = []
    layer = VectorQuantizer(5, 8, channel_dim=1, heads=heads, separate_codebooks=separate)

    module = importlib.import_module("genperf.ops.vector_quantize")  # genperf.ops.vector_quantize is the function

    def record(name, position):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: pointers.append(arguments[position].data_ptr()) or function(*arguments))

    record("search", 0)
    if heads == 1 or not separate:  # separate codebooks copy the vectors of each head for the lookup
        record("quantize", 0)
    quantized, indices, _ = layer(x)
    assert pointers
    assert pointers == [x.data_ptr()] * len(pointers)
    assert quantized.stride() == x.stride()
    expected = layer(x.movedim(1, -1).contiguous().movedim(-1, 1))
    assert torch.equal(quantized, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (2, 4, 0), (2, 4, 0, 3), (4,)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.9, "replace_dead_below": 1.0, "init": "kmeans"},
        {"heads": 2, "separate_codebooks": True},
        {"heads": 2, "code_dim": 3},
    ],
    ids=str,
)
def test_empty_batch_and_single_vector(shape, options):
    layer = VectorQuantizer(5, 4, channel_dim=1 if len(shape) > 1 else 0, **options)
    x = torch.randn(shape, requires_grad=True)
    quantized, indices, loss = layer(x)
    (quantized.sum() + loss).backward()
    heads = [2] if layer.heads == 2 else []
    assert quantized.shape == x.grad.shape == x.shape
    assert list(indices.shape) == [*shape[:-1][:1], *shape[2:], *heads]
    assert x.numel() or loss == 0
    assert layer.decode(indices).shape == x.shape
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"code_dim": 3}, {"metric": "cosine"}, {"decay": 0.9, "replace_dead_below": 0.5}], ids=str)
def test_half_precision(options, dtype):
    """Half-precision x in a float32 and in a half-precision layer, with and without autocast."""
    full = VectorQuantizer(6, 8, channel_dim=1, **options)
    half = VectorQuantizer(6, 8, channel_dim=1, **options).to(dtype)
    x = torch.randn(4, 8, 3, 3).to(dtype)
    for layer, autocast in itertools.product((full, half), (False, True)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            quantized, _, loss = layer(leaf)
        assert quantized.dtype == x.dtype
        assert loss.dtype == torch.float32
        (quantized.float().square().mean() + loss).backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"code_dim": 3}, {"metric": "cosine", "heads": 2}], ids=str)
def test_autocast_is_close_to_float32(options):
    layer = VectorQuantizer(6, 8, **options).eval()
    x = torch.randn(50, 8, requires_grad=True)
    quantized, indices, loss = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_indices, low_loss = layer(x)
    assert (low.dtype, low_loss.dtype) == (torch.float32, torch.float32)
    same = (indices == low_indices).reshape(50, -1).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(low[same], quantized[same], rtol=0.03, atol=0.03)
    torch.testing.assert_close(low_loss, loss, rtol=0.03, atol=0)
    if layer.project_in is None:
        assert torch.equal(low, quantized)


def test_reference_ops_in_the_layer(caplog):
    layer = VectorQuantizer(6, 4, decay=0.9)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(20, 4)
    outputs = layer(x)
    compiled = layer.codebook.clone()
    layer.load_state_dict(state)
    with genperf.reference_ops(), caplog.at_level(logging.DEBUG, "genperf"):
        again = layer(x)
    for op in ("vector_quantize", "code_statistics"):
        assert f"{op} runs reference" in caplog.text
    assert torch.equal(outputs[1], again[1])
    torch.testing.assert_close(compiled, layer.codebook)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be float32", {"x": torch.zeros(2, 3, 4, dtype=torch.int64)}),
        (TypeError, "x must have the dtype of the codebook, .* got torch.float64 and torch.float32", {"x": torch.zeros(2, 3, 4).double()}),
        (ValueError, r"x must have 4 channels in dimension -1, got \[2, 3, 5\]", {"x": torch.zeros(2, 3, 5)}),
        (ValueError, r"x must have 4 .* got \[2, 4, 5\]; channel_dim=1 is that dimension of x", {"x": torch.zeros(2, 4, 5)}),
        (TypeError, "mask must be bool", {"mask": torch.ones(2, 3)}),
        (ValueError, "mask must have the shape", {"mask": torch.ones(3, 2, dtype=torch.bool)}),
        (TypeError, "lengths must be a tensor, got list", {"lengths": [1, 2]}),
        (ValueError, r"lengths must hold an integer for each row of x, got \(\[3\]", {"lengths": torch.tensor([1, 2, 3])}),
        (ValueError, "lengths must hold an integer", {"lengths": torch.tensor(1)}),
        (ValueError, "lengths must hold an integer", {"lengths": torch.tensor([1.0, 2.0])}),
        (ValueError, "with lengths, x must be", {"x": torch.zeros(2, 4), "lengths": torch.tensor([1, 2])}),
        (ValueError, "only one of mask and lengths", {"lengths": torch.tensor([1, 2]), "mask": torch.ones(2, 3, dtype=torch.bool)}),
        (ValueError, "update must be one of step, accumulate, none, got 'later'", {"update": "later"}),
        (ValueError, r"code_weights must have shape \[2, 5\] or \[5\], got \[2\]", {"code_weights": torch.ones(2)}),
    ],
)
def test_invalid_forward_arguments_change_nothing(error, message, arguments):
    layer = VectorQuantizer(5, 4, decay=0.9, heads=2, separate_codebooks=True, replace_dead_below=2.0, init="kmeans")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error, match="^VectorQuantizer: " + message):
        layer(**{"x": torch.randn(2, 3, 4), **arguments})
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 3}, r"dim must be divisible by heads where code_dim is not given, got \(4, 3\)"),
        ({"code_dim": 0}, "the dimension of a code must be at least 1, got 0"),
        ({"usage_decay": 1.0}, "usage_decay must lie in"),
        ({"diversity_weight": -1.0}, "diversity_weight must not be negative"),
        ({"diversity_temperature": 0.0}, "diversity_temperature must be positive, got 0.0"),
        ({"orthogonal_weight": -1.0}, "orthogonal_weight must not be negative"),
        ({"orthogonal_max_codes": 1}, "orthogonal_max_codes must be None or at least 2, got 1"),
        ({"sample_temperature": NAN}, "sample_temperature must not be negative, got nan"),
        ({"init_iterations": -1}, "init_iterations must not be negative"),
        ({"replace_dead_below": -1.0}, "replace_dead_below must not be negative"),
        ({"update": "often"}, "update must be one of step, accumulate, none, got 'often'"),
    ],
)
def test_invalid_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match="^VectorQuantizer: .*" + message):
        VectorQuantizer(5, 4, **arguments)
