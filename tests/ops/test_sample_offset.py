# SPDX-License-Identifier: Apache-2.0
"""sample_offset and reference_ops."""

import logging

import pytest
import torch

import genperf

pytestmark = pytest.mark.compiled

BATCH, SHARE = 6, 2


def gaussian(x):
    return genperf.gaussian_sample(x, dim=1)[0]


def gumbel(x):
    return genperf.gumbel_sample(x, tau=0.7, dim=1)[0]


def gumbel_last(x):
    return genperf.gumbel_sample(x, tau=0.7, dim=-1)[0]


def mixed(x):
    return genperf.interpolate(x, -2 * x)


def perturbed(x):
    # A scale that cancels the standard deviation, which differs between parts of a batch.
    return genperf.perturb(x, scale=1 / x.std())


@pytest.mark.parametrize("draw", [gaussian, gumbel, gumbel_last, mixed, perturbed])
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_draw_the_noise_of_the_whole_batch(draw, impl, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(BATCH, 4, 3, 5, device=device).to(dtype)
    weight = torch.randn_like(draw(x))

    def values_and_gradients(part, weight, first):
        torch.manual_seed(1)
        part = part.detach().requires_grad_()
        with genperf.sample_offset(first):
            sample = draw(part)
        (gradient,) = torch.autograd.grad((sample * weight).sum(), part)
        return sample, gradient

    if impl == "reference":
        with genperf.reference_ops():
            whole = values_and_gradients(x, weight, 0)
    else:
        whole = values_and_gradients(x, weight, 0)
    shares = [values_and_gradients(x[i : i + SHARE], weight[i : i + SHARE], i) for i in range(0, BATCH, SHARE)]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for expected, *parts in zip(whole, *shares, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected, rtol=tolerance, atol=tolerance)
        if impl == "native" and draw is not perturbed:  # the kernels number the rows of noise
            assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 2}, {"heads": 2, "separate_codebooks": True}, {"heads": 2, "channel_dim": 1}, {"code_dim": 4, "metric": "cosine"}],
    ids=str,
)
def test_parts_draw_the_codes_of_the_whole_batch(options, device):
    layer = genperf.nn.VectorQuantizer(16, 8, sample_temperature=2.0, **options).to(device)
    x = torch.randn(BATCH, *((8, 5) if "channel_dim" in options else (5, 8)), device=device)

    def drawn(part, first):
        torch.manual_seed(1)
        with genperf.sample_offset(first):
            return layer(part)[1]

    shares = [drawn(x[i : i + SHARE], i) for i in range(0, BATCH, SHARE)]
    assert torch.equal(torch.cat(shares), drawn(x, 0))
    assert not torch.equal(drawn(x, 1), drawn(x, 0))


def test_given_noise_and_later_draws_are_unchanged(device):
    x, noise = torch.randn(2, 3, 4, device=device)
    torch.manual_seed(0)
    expected = genperf.gaussian_sample(x, x, noise=noise)[0], torch.rand(1)
    torch.manual_seed(0)
    with genperf.sample_offset(5):
        found = genperf.gaussian_sample(x, x, noise=noise)[0]
    assert torch.equal(found, expected[0])
    assert torch.equal(torch.rand(1), expected[1])
    # A draw advances the generator equally inside and outside the context.
    states = []
    for first in (0, 7):
        torch.manual_seed(0)
        with genperf.sample_offset(first):
            genperf.gaussian_sample(x, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_offset_ends_with_its_context():
    x = torch.zeros(2, 3)
    torch.manual_seed(0)
    expected = genperf.gaussian_sample(x, x)[0]
    with pytest.raises(RuntimeError, match="inside"), genperf.sample_offset(3), genperf.sample_offset(4):
        raise RuntimeError("inside")
    torch.manual_seed(0)
    assert torch.equal(genperf.gaussian_sample(x, x)[0], expected)
    with pytest.raises(ValueError, match="sample_offset: first must not be negative, got -1"), genperf.sample_offset(-1):
        pass


def test_reference_ops_reach_layers_and_end_with_their_context(caplog):
    caplog.set_level(logging.DEBUG, logger="genperf")
    layer, moments = genperf.nn.DiagonalGaussian(), torch.randn(2, 6)
    with genperf.reference_ops():
        layer(moments)
        assert "gaussian_sample runs reference" in caplog.text
        with pytest.raises(NotImplementedError, match="impl='triton' cannot run here"):
            genperf.gaussian_sample(torch.randn(2, 6), impl="triton")
    caplog.clear()
    layer(moments)
    assert "runs native" in caplog.text
