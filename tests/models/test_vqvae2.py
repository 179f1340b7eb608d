# SPDX-License-Identifier: Apache-2.0
import torch
from torch.nn import functional as F

from genperf.models.vqvae import VQVAE
from genperf.models.vqvae2 import VQVAE2, HierarchicalCodes, VQVAE2Config

# Tests for both VQ-VAEs are in test_vqvae.py.


def small(**changes):
    torch.manual_seed(0)
    return VQVAE2(VQVAE2Config(image_shape=(1, 16, 16), **{"hidden": 8, "dim": 4, "num_codes": 16, "prior_width": 8, **changes}))


def test_gradients_reach_both_levels():
    model = small().eval()
    model.initialize(torch.rand(4, 1, 16, 16))
    top, bottom = torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 8, 8, dtype=torch.int64)
    plain = model.decode(HierarchicalCodes(top, bottom))
    for codes in ((top + 1, bottom), (top, bottom + 1)):
        assert not torch.equal(model.decode(codes), plain)
    images = torch.rand(2, 1, 16, 16)
    bottom_codes = model.encode(images).bottom
    with torch.no_grad():
        model.top_quantizer.codebook.neg_()
    assert not torch.equal(model.encode(images).bottom, bottom_codes)


def test_decoder_matches_the_paper():
    """The decoder gets the upsampled top and the bottom level; the quantizer losses of both levels are summed."""
    model = small()
    images = torch.rand(4, 1, 16, 16)
    model.initialize(images)
    model.eval()
    output = model(images)
    fine = model.encoder(images)
    top_latents = model.top_encoder(fine)
    top = model.top_quantizer.decode(output.codes.top)
    bottom_latents = model.bottom_encoder(torch.cat([fine, model.top_decoder(top)], 1))
    bottom = model.bottom_quantizer.decode(output.codes.bottom)
    torch.testing.assert_close(output.reconstruction, model.decoder(torch.cat([model.upsample(top), bottom], 1)))
    commitment = 0.25 * (F.mse_loss(top_latents, top) + F.mse_loss(bottom_latents, bottom))
    torch.testing.assert_close(output.quantizer_loss, commitment)


def test_bottom_is_sampled_given_the_top(monkeypatch):
    """The condition of the bottom prior must be the top level that is decoded."""
    model = small()
    model.initialize(torch.rand(4, 1, 16, 16))
    decoded = []
    monkeypatch.setattr(model, "decode", decoded.append)
    seen = []
    draw = model.bottom_prior.sample
    monkeypatch.setattr(model.bottom_prior, "sample", lambda *args, **options: seen.append(args) or draw(*args, **options))
    model.sample(3, temperature=0.7)
    (top, bottom), (n, height, width, condition) = decoded[0], seen[0]
    assert (n, height, width, bottom.shape) == (3, 8, 8, (3, 8, 8))
    expected = model.top_quantizer.codebook[top].movedim(-1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(condition, expected)
    assert condition.std() > 0


def test_finer_codes_reconstruct_better():
    """Squares of 2x2 pixels, finer than a code for 4x4 pixels."""
    torch.manual_seed(0)
    images = torch.rand(16, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    errors = {}
    for system in (VQVAE, VQVAE2):
        torch.manual_seed(0)
        model = system(system.Config(image_shape=(1, 16, 16), hidden=16, dim=8, num_codes=32, prior_width=0, lr=1e-2))
        optimizer = model.optimizers()["model"]
        for _ in range(50):
            losses = model.training_step(images)
            model.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()
        errors[system] = losses["reconstruction"].item()
    assert errors[VQVAE2] < 0.8 * errors[VQVAE]
