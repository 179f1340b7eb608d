# SPDX-License-Identifier: Apache-2.0
"""nn.IndexBackpropQuantizer beside its lines of plain PyTorch, and its memory."""

import pytest
import torch
from torch.nn import functional as F

from genperf.nn import IndexBackpropQuantizer

K, D = 13, 6


def layer_and_images(dtype=torch.float64, **options):
    layer = IndexBackpropQuantizer(K, D, channel_dim=1, **options).to(dtype)
    with torch.no_grad():
        layer.codebook.normal_()
    return layer, torch.randn(3, D, 4, 5, dtype=dtype).requires_grad_()


def reference(layer, x):
    x = x.movedim(1, -1)
    codebook = layer.codebook
    logits = x @ codebook.T
    soft = logits.softmax(-1)
    indices = logits.argmax(-1)
    quantized = (F.one_hot(indices, K) - soft.detach() + soft) @ codebook
    codes = codebook[indices]
    loss = F.mse_loss(quantized, x) + F.mse_loss(codes.detach(), x) + layer.beta * F.mse_loss(codes, x.detach())
    p = (logits / layer.entropy_temperature).log_softmax(-1).flatten(0, -2)
    mean = p.exp().mean(0)
    entropy = -(p.exp() * p).sum(-1).mean() + (mean * mean.log()).sum()
    return quantized.movedim(-1, 1), indices, loss + layer.entropy_weight * entropy


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_values_and_gradients_are_those_of_plain_pytorch(entropy_weight):
    layer, x = layer_and_images(entropy_weight=entropy_weight, entropy_temperature=0.5, beta=0.4)
    weight = torch.randn_like(x)
    results = []
    for quantize in (layer, lambda x: reference(layer, x)):
        quantized, indices, loss = quantize(x)
        gradients = torch.autograd.grad((quantized * weight).sum() + 3 * loss, [x, layer.codebook])
        results.append((quantized, indices, loss, *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert (results[0][-1] != 0).all()  # every code has a gradient


def test_quantized_vectors_are_codes():
    layer, x = layer_and_images(torch.float32)
    quantized, indices, loss = layer(x)
    assert torch.equal(quantized, layer.decode(indices))
    assert torch.equal(layer.encode(x), indices)
    assert loss.dtype == torch.float32
    assert layer.eval()(x)[2] == 0
    for wrong in (-2, layer.num_codes):
        with pytest.raises(
            IndexError, match=rf"IndexBackpropQuantizer.decode: indices must lie between -1 and {layer.num_codes - 1}, got "
        ):
            layer.decode(torch.tensor([0, wrong]))


def test_masked_vectors_have_no_effect():
    layer, x = layer_and_images()
    mask = torch.rand(3, 4, 5) < 0.6
    other = torch.where(mask.unsqueeze(1), x, torch.nan).detach().requires_grad_()
    quantized, indices, loss = layer(other, mask)
    rows = x.detach().movedim(1, -1)[mask].requires_grad_()
    expected, expected_indices, expected_loss = IndexBackpropQuantizer.forward(_last(layer), rows)
    torch.testing.assert_close(quantized.movedim(1, -1)[mask], expected)
    assert torch.equal(indices[mask], expected_indices)
    assert (indices[~mask] == -1).all()
    assert (quantized.movedim(1, -1)[~mask] == 0).all()
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(other.grad.movedim(1, -1)[mask], rows.grad)
    assert (other.grad.movedim(1, -1)[~mask] == 0).all()


def _last(layer):
    copy = IndexBackpropQuantizer(K, D).to(layer.codebook.dtype)
    copy.load_state_dict(layer.state_dict())
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_with_a_float32_codebook(dtype):
    layer, x = layer_and_images(torch.float32)
    quantized, indices, loss = layer(x.to(dtype))
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    (quantized.float().sum() + loss).backward()
    assert layer.codebook.grad.isfinite().all()
    assert (layer(x)[1] == indices).float().mean() > 0.8


def test_no_tensor_has_a_row_of_all_codes_for_each_vector():
    layer = IndexBackpropQuantizer(1 << 18, 4)
    x = torch.randn(256, 4, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantized, _, loss = layer(x)
        (quantized.sum() + loss).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 256 * (1 << 18) * 4 / 4  # logits in float32 take 268 MB
    assert (layer.codebook.grad != 0).any(1).float().mean() > 0.99


def test_a_step_brings_codes_to_vectors():
    layer, x = layer_and_images(torch.float32, entropy_weight=0.0)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss = layer(x.detach())[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"entropy_weight": -1.0}, "entropy_weight must not be negative"),
        ({"entropy_temperature": 0.0}, "entropy_temperature must be positive"),
    ],
)
def test_invalid_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=f"IndexBackpropQuantizer: {sentence}"):
        IndexBackpropQuantizer(**{"num_codes": 4, "dim": 2, **arguments})


def test_invalid_channels():
    with pytest.raises(ValueError, match="IndexBackpropQuantizer: x must have 6 channels"):
        IndexBackpropQuantizer(K, D)(torch.randn(2, 5))
