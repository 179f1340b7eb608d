# SPDX-License-Identifier: Apache-2.0
"""nn.FiniteScalarQuantizer and nn.LookupFreeQuantizer, the quantizers with implicit codebooks."""

import pytest
import torch
from torch.nn.utils import prune

import genperf
from genperf.nn import FiniteScalarQuantizer, LookupFreeQuantizer

LAYERS = {
    "FSQ": lambda **options: FiniteScalarQuantizer([8, 5, 5], **options),
    "symmetric FSQ": lambda **options: FiniteScalarQuantizer([4, 5, 2], symmetric=True, **options),
    "LFQ": lambda **options: LookupFreeQuantizer(5, **options),
    "BSQ": lambda **options: LookupFreeQuantizer(4, spherical=True, scale=1.5, group_size=2, **options),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def gradients(layer, x, mask=None):
    x = x.detach().requires_grad_()
    quantized, indices, *loss = layer(x, mask)
    weight = torch.linspace(-1, 1, quantized.numel(), device=x.device).reshape(quantized.shape)
    return quantized, indices, loss, torch.autograd.grad((quantized * weight).sum() + sum(loss), [x, *layer.parameters()])


@layers
@pytest.mark.parametrize("codebooks", [1, 3])
def test_decode_matches_forward(make, codebooks, device):
    for dim, channel_dim, shape in [(7, -1, (2, 11, 7)), (7, 1, (2, 7, 4, 5)), (7, 0, (7, 13)), (None, 1, None)]:
        layer = make(dim=dim, num_codebooks=codebooks, channel_dim=channel_dim).to(device)
        x = torch.randn(shape or (2, layer.dim, 4, 5), device=device)
        quantized, indices, *_ = layer(x)
        assert quantized.shape == x.shape
        expected = list(x.shape)
        expected.pop(channel_dim)
        assert list(indices.shape) == expected + ([codebooks] if codebooks > 1 else [])
        assert torch.equal(layer.encode(x), indices)
        torch.testing.assert_close(layer.decode(indices), quantized)


@layers
def test_channels_first_matches_channels_last(make, device):
    """Values and gradients, for images and permuted views."""
    last = make(dim=6, num_codebooks=2).to(device)
    first = make(dim=6, num_codebooks=2, channel_dim=1).to(device)
    first.load_state_dict(last.state_dict())
    x = torch.randn(3, 4, 5, 6, device=device)
    image = x.movedim(-1, 1)
    for laid_out in (image, image.contiguous()):
        quantized, indices, loss, (grad_x, *_) = gradients(first, laid_out)
        plain, plain_indices, plain_loss, _ = gradients(last, x)
        torch.testing.assert_close(quantized.movedim(1, -1), plain)
        assert torch.equal(indices, plain_indices)
        torch.testing.assert_close(loss, plain_loss)
        upstream = torch.linspace(-1, 1, x.numel(), device=device).reshape(laid_out.shape).movedim(1, -1)
        leaf = x.detach().requires_grad_()
        outputs = last(leaf)
        torch.testing.assert_close(grad_x.movedim(1, -1), torch.autograd.grad((outputs[0] * upstream).sum() + sum(outputs[2:]), leaf)[0])


@layers
def test_masked_vectors_have_no_effect(make, device):
    layer = make(dim=6, num_codebooks=2).to(device)
    x, mask = torch.randn(40, 6, device=device), torch.arange(40, device=device) % 3 > 0
    x[~mask] = torch.nan
    quantized, indices, loss, (grad_x, *grads) = gradients(layer, x, mask)
    assert (quantized[~mask] == 0).all()
    assert (indices[~mask] == -1).all()
    assert (layer.decode(indices)[~mask] == 0).all()
    assert (grad_x[~mask] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    kept = layer(x[mask])
    torch.testing.assert_close(quantized[mask], kept[0])
    assert torch.equal(indices[mask], kept[1])
    torch.testing.assert_close(loss, list(kept[2:]))
    nothing = gradients(layer, x, torch.zeros_like(mask))
    assert all(value == 0 for value in nothing[2])
    assert (nothing[3][0] == 0).all()


@layers
def test_half_precision_under_autocast(make, device):
    layer = make(dim=6).to(device)
    x = torch.randn(2, 50, 6, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        quantized, indices, *loss = layer(x)
        (quantized.float().square().mean() + sum(loss)).backward()
    assert quantized.dtype == torch.bfloat16
    assert indices.dtype == torch.int64
    assert all(value.dtype == torch.float32 for value in loss)
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    plain = layer(x)
    assert (plain[1] == indices).float().mean() > 0.8


def test_float16_vectors_of_any_norm(device):
    """Norms of zero and above the largest float16, also of masked vectors under autocast."""
    layer = LookupFreeQuantizer(16, spherical=True).to(device)
    x = torch.tensor([0.0, 2e4], device=device).half().unsqueeze(1).expand(2, 16)
    quantized, indices, loss = layer(x)
    assert quantized.dtype == torch.float16
    assert (quantized.abs() == 0.25).all()
    assert indices.tolist() == [0, 2**16 - 1]
    assert loss.isfinite()
    assert all(value.isfinite() for value in genperf.lookup_free_entropy(x, spherical=True))
    layer = LookupFreeQuantizer(4, 6, spherical=True, bias=False).to(device)
    x, mask = torch.randn(50, 6, device=device), torch.arange(50, device=device) > 3
    x[-3:] = 0
    with torch.autocast(torch.device(device).type, dtype=torch.float16):
        quantized, _, loss = layer(x, mask)
        (quantized.float().square().mean() + loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@layers
def test_bad_inputs(make):
    x = torch.randn(2, 15)
    with pytest.raises(ValueError, match="Quantizer: channel_dim must be a dimension of x, got channel_dim=2"):
        make(dim=15, channel_dim=2)(x)
    with pytest.raises(TypeError, match=r"Quantizer: mask must be bool, got torch.float32"):
        make(dim=15)(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"Quantizer: mask must have the shape of x without its channel dimension, \[2\], got \[1\]"):
        make(dim=15)(x, torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize("name", ["FSQ", "BSQ"])
def test_compiles_in_one_graph(name, device):
    layer = LAYERS[name](dim=6, channel_dim=1).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 6, 4, 5, device=device), torch.rand(2, 4, 5, device=device) > 0.3
    torch.testing.assert_close(gradients(compiled, x, mask), gradients(layer, x, mask))


def test_loss_of_lookup_free_layer(device):
    layer = LookupFreeQuantizer(5, entropy_weight=0.3, diversity=2.0, commitment_weight=0.7, inv_temperature=2.0, scale=0.5).to(device)
    x = torch.randn(60, 5, device=device)
    quantized, indices, loss = layer(x)
    sample, codebook = genperf.lookup_free_entropy(x, scale=0.5, inv_temperature=2.0)
    expected = 0.3 * (sample - 2 * codebook) + 0.7 * torch.nn.functional.mse_loss(x, quantized)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(quantized, torch.where(x > 0, 0.5, -0.5))
    layer.eval()
    assert layer(x)[2] == 0
    assert torch.equal(layer(x)[1], indices)


def test_entropy_loss_increases_codebook_usage(device):
    """Vectors start with the same code; training on the loss alone spreads them over most codes."""
    layer = LookupFreeQuantizer(4, 4 + 1, inv_temperature=5.0, entropy_weight=1.0).to(device)
    x = torch.randn(256, 5, device=device) + 3
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    before = len(layer(x)[1].unique())
    for _ in range(60):
        optimizer.zero_grad()
        layer(x)[2].backward()
        optimizer.step()
    assert len(layer(x)[1].unique()) > max(before, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteScalarQuantizer([8, 1]), "FiniteScalarQuantizer: levels must be 1 to 64 integers"),
        (lambda: FiniteScalarQuantizer([8, 5], num_codebooks=0), "FiniteScalarQuantizer: num_codebooks must be at least 1, got 0"),
        (lambda: FiniteScalarQuantizer([8, 5], 0), "FiniteScalarQuantizer: dim must be at least 1, got 0"),
        (lambda: LookupFreeQuantizer(64), "LookupFreeQuantizer: the number of channels, .* must be 1 to 63, got 64"),
        (lambda: LookupFreeQuantizer(32), "LookupFreeQuantizer: group_size, .* must divide the 32 bits and be at most 24, got 32"),
        (lambda: LookupFreeQuantizer(8, scale=0.0), "LookupFreeQuantizer: scale must be positive, got 0.0"),
        (lambda: LookupFreeQuantizer(8, entropy_weight=-1.0), "LookupFreeQuantizer: entropy_weight must not be negative, got -1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Doubled(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@layers
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_projections_are_called(make, channel_dim, device):
    """Hooks, weight_norm, pruning and wrapped modules take effect, wherever the channels are."""
    layer = make(dim=6, channel_dim=channel_dim).to(device)
    x = torch.randn(3, 6, 6, device=device)
    expected, calls = layer(x), []
    for projection in (layer.project_in, layer.project_out):
        projection.register_forward_hook(lambda module, inputs, output: calls.append(module))
    torch.testing.assert_close(layer(x)[0], expected[0])
    assert calls == [layer.project_in, layer.project_out]
    torch.nn.utils.parametrizations.weight_norm(layer.project_in)
    prune.random_unstructured(layer.project_out, "weight", 0.5)
    for _ in range(2):
        layer(x)[0].sum().backward()
    layer = make(dim=6, channel_dim=channel_dim).to(device)
    undoubled = layer(x)[0]
    layer.project_out = Doubled(layer.project_out)
    torch.testing.assert_close(layer(x)[0], 2 * undoubled)
    layer.decode(layer.encode(x))


@layers
def test_index_past_the_codebook(make):
    layer = make(dim=6)
    with pytest.raises(IndexError, match="indices must be at most"):
        layer.decode(torch.tensor([0, 10**6]))


@layers
def test_empty_batch(make, device):
    layer = make(dim=6, num_codebooks=2).to(device)
    quantized, indices, loss, grads = gradients(layer, torch.randn(0, 5, 6, device=device))
    assert quantized.shape == (0, 5, 6)
    assert indices.shape == (0, 5, 2)
    assert all(value.isfinite().all() for value in (*loss, *grads))
