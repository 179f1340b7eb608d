# SPDX-License-Identifier: Apache-2.0
"""The image quantizers of taming-transformers and diffusers against their formulas, and against diffusers where it is installed."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genperf.compat import diffusers, taming

LAYERS = (taming.VectorQuantizer2, diffusers.VectorQuantizer)


def formula(layer, z):
    """z_q, loss and flat indices, as both packages compute them."""
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    codes = layer.embedding.weight
    indices = (flat[:, None] - codes).square().sum(-1).argmin(1)
    z_q = codes[indices].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    towards_codes, towards_z = F.mse_loss(z_q.detach(), z), F.mse_loss(z_q, z.detach())
    loss = towards_codes + layer.beta * towards_z if layer.legacy else layer.beta * towards_codes + towards_z
    return z + (z_q - z).detach(), loss, indices


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("make", LAYERS)
def test_values_and_gradients(make, legacy):
    torch.manual_seed(0)
    layer = make(12, 5, 0.25, legacy=legacy)
    plain = copy.deepcopy(layer)
    z, weight = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    results = []
    for module, forward in ((layer, layer), (plain, lambda z: formula(plain, z))):
        leaf = z.clone().requires_grad_()
        z_q, loss, rest = forward(leaf)
        ((z_q * weight).sum() + 3 * loss).backward()
        results.append((z_q, loss, rest[2] if isinstance(rest, tuple) else rest, leaf.grad, module.embedding.weight.grad))
    torch.testing.assert_close(*results)
    assert results[0][2].shape == (24,)


@pytest.mark.parametrize("make", LAYERS)
def test_remapped_indices(make, tmp_path):
    torch.manual_seed(0)
    used = np.array([7, 2, 9, 2])
    np.save(tmp_path / "used.npy", used)
    z = torch.randn(2, 5, 3, 4)
    everything = make(12, 5, 0.25)
    indices = everything(z)[2][2].view(2, 12)
    for unknown, expected in (("extra", 4), (3, 3)):
        layer = make(12, 5, 0.25, remap=str(tmp_path / "used.npy"), unknown_index=unknown)
        layer.embedding.load_state_dict(everything.embedding.state_dict())
        found = layer(z)[2][2]
        assert found.shape == (24, 1)
        assert layer.re_embed == 4 + (unknown == "extra")
        first = {7: 0, 2: 1, 9: 2}
        assert found.flatten().tolist() == [first.get(i, expected) for i in indices.flatten().tolist()]
    random = make(12, 5, 0.25, remap=torch.from_numpy(used))
    drawn = random.remap_to_used(torch.arange(12).view(1, -1).expand(50, -1))
    assert (drawn[:, 7] == 0).all()
    assert drawn[:, 0].unique().tolist() == [0, 1, 2, 3]
    sane = make(12, 5, 0.25, remap=used, unknown_index="extra", sane_index_shape=True)
    assert sane(z)[2][2].shape == (2, 3, 4)
    known = torch.tensor([[0, 1, 2, 4]])
    assert sane.unmap_to_all(known).tolist() == [[7, 2, 9, 7]]
    entry = sane.get_codebook_entry(known, (1, 2, 2, 5))
    assert torch.equal(entry[0, :, 1, 0], sane.embedding.weight[9])


@pytest.mark.parametrize("make", LAYERS)
def test_codebook_entries(make):
    layer = make(6, 3, 0.25)
    indices = torch.randint(6, (2, 2, 4))
    entries = layer.get_codebook_entry(indices.flatten(), (2, 2, 4, 3))
    assert torch.equal(entries.permute(0, 2, 3, 1), layer.embedding.weight[indices])
    assert torch.equal(layer.get_codebook_entry(indices, None), layer.embedding.weight[indices])
    z_q, _, (_, _, found) = layer(entries.detach())
    assert torch.equal(found, indices.flatten())
    assert torch.equal(z_q, entries)


def test_taming_vector_quantizer():
    torch.manual_seed(0)
    layer, second = taming.VectorQuantizer(12, 5, 0.25), taming.VectorQuantizer2(12, 5, 0.25)
    second.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["embedding.weight"]
    z = torch.randn(2, 5, 3, 4)
    (z_q, loss, (perplexity, encodings, indices)), expected = layer(z), second(z)
    assert torch.equal(z_q, expected[0])
    assert torch.equal(loss, expected[1])
    assert torch.equal(indices, expected[2][2].unsqueeze(1))
    assert encodings is None
    frequency = F.one_hot(indices.flatten(), 12).float().mean(0)
    torch.testing.assert_close(perplexity, torch.exp(-(frequency * torch.log(frequency + 1e-10)).sum()))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"VectorQuantizer: z must be \[B, 5, H, W\], got \[2, 4, 3, 3\]"):
        diffusers.VectorQuantizer(12, 5, 0.25)(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="VectorQuantizer2: temp"):
        taming.VectorQuantizer2(12, 5, 0.25)(torch.randn(2, 5, 3, 3), temp=0.5)
    with pytest.raises(ValueError, match="VectorQuantizer2: remap must hold a list of indices"):
        taming.VectorQuantizer2(12, 5, 0.25, remap=np.ones((2, 2)))
    with pytest.raises(ValueError, match="VectorQuantizer2: unknown_index must be"):
        taming.VectorQuantizer2(12, 5, 0.25, remap=np.arange(3), unknown_index="none")


@pytest.mark.parametrize("make", LAYERS)
def test_compiles_in_one_graph(make):
    layer = make(12, 5, 0.25, remap=np.arange(4), unknown_index="extra")
    z = torch.randn(2, 5, 3, 4)
    z_q, loss, (_, _, indices) = torch.compile(layer, fullgraph=True, backend="aot_eager")(z)
    expected = layer(z)
    torch.testing.assert_close((z_q, loss, indices), (*expected[:2], expected[2][2]))


@pytest.mark.parametrize("legacy", [True, False])
def test_matches_diffusers(legacy, tmp_path):
    upstream_class = pytest.importorskip("diffusers.models.autoencoders.vae").VectorQuantizer
    torch.manual_seed(0)
    np.save(tmp_path / "used.npy", np.arange(0, 64, 2))
    for options in ({}, {"sane_index_shape": True}, {"remap": str(tmp_path / "used.npy"), "unknown_index": "extra"}):
        upstream = upstream_class(64, 8, 0.25, legacy=legacy, **options)
        actual = diffusers.VectorQuantizer(64, 8, 0.25, legacy=legacy, **options)
        actual.load_state_dict(upstream.state_dict())
        optimizers = [torch.optim.Adam(module.parameters(), 1e-2) for module in (upstream, actual)]
        for _ in range(20):
            z, weight = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
            found = []
            for module, optimizer in zip((upstream, actual), optimizers, strict=True):
                leaf = z.clone().requires_grad_()
                z_q, loss, (_, _, indices) = module(leaf)
                optimizer.zero_grad()
                ((z_q * weight).sum() + loss).backward()
                optimizer.step()
                found.append((z_q, loss, indices, leaf.grad, module.embedding.weight.detach().clone()))
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
