# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import genperf
from genperf.nn import DiagonalGaussian


def plain(moments, noise, dim=1, free_bits=0.0):
    mean, logvar = moments.chunk(2, dim)
    logvar = logvar.clamp(-30, 20)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return mean + torch.exp(0.5 * logvar) * noise, (kl.clamp(min=free_bits) if free_bits else kl).flatten(1).sum(1)


@pytest.mark.parametrize(("shape", "dim"), [((3, 8), 1), ((2, 6, 5, 4), 1), ((2, 5, 8), -1), ((2, 4, 3, 2, 5), 1)])
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_training_mode_samples(shape, dim, free_bits, device):
    moments = torch.randn(shape, dtype=torch.float64, device=device)
    noise = torch.randn_like(moments.chunk(2, dim)[0])
    sample, kl = DiagonalGaussian(dim=dim, free_bits=free_bits)(moments, noise=noise)
    expected_sample, expected_kl = plain(moments, noise, dim, free_bits)
    torch.testing.assert_close(sample, expected_sample)
    torch.testing.assert_close(kl, expected_kl)
    assert kl.shape == shape[:1]


@pytest.mark.parametrize(
    ("deterministic", "training", "takes_mean"),
    [(None, True, False), (None, False, True), (True, True, True), (False, False, False)],
)
def test_deterministic_modes(deterministic, training, takes_mean, device):
    layer = DiagonalGaussian(deterministic=deterministic).train(training)
    moments = torch.randn(4, 6, 3, device=device)
    before = torch.random.get_rng_state()
    sample, kl = layer(moments)
    assert layer.is_deterministic == torch.equal(sample, moments[:, :3]) == takes_mean
    if takes_mean and device == "cpu":
        assert torch.equal(torch.random.get_rng_state(), before), "the mean must not use random numbers"
    torch.testing.assert_close(kl, plain(moments, 0)[1])


def test_gradients_of_the_mean(device):
    moments = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    sample, kl = DiagonalGaussian().eval()(moments)
    expected_sample, expected_kl = plain(moments, 0)
    (actual,) = torch.autograd.grad(sample.square().sum() + kl.sum(), moments)
    (expected,) = torch.autograd.grad(expected_sample.square().sum() + expected_kl.sum(), moments)
    torch.testing.assert_close(actual, expected)


def test_half_precision_keeps_the_noise_in_a_float32_sample(device):
    mean, logvar = torch.full((2, 50), 4.0, device=device), torch.full((2, 50), -13.8, device=device)  # std = 0.001
    moments = torch.cat([mean, logvar], 1).bfloat16()
    lost, _ = DiagonalGaussian()(moments)
    kept, kl = DiagonalGaussian(dtype=torch.float32)(moments)
    assert lost.dtype == torch.bfloat16
    assert (lost == 4).float().mean() > 0.9
    assert kept.dtype == kl.dtype == torch.float32
    assert (kept != 4).float().mean() > 0.9


def test_two_tensors_and_a_prior(device):
    mean, logvar, *prior = torch.randn(4, 3, 7, dtype=torch.float64, device=device)
    layer = DiagonalGaussian().eval()
    sample, kl = layer(mean, logvar, prior=tuple(prior))
    assert torch.equal(sample, mean)
    distributions = [torch.distributions.Normal(m, torch.exp(0.5 * v)) for m, v in ((mean, logvar), prior)]
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*distributions).sum(1))
    torch.testing.assert_close(layer(torch.cat([mean, logvar], 1), prior=torch.cat(prior, 1))[1], kl)


def test_seed_and_generator_determine_the_noise(device):
    layer, moments = DiagonalGaussian(), torch.randn(2, 8, 3, device=device)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(layer(moments)[0])
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    drawn = [layer(moments, generator=torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_noise(use_reentrant, device):
    layer, moments = DiagonalGaussian(), torch.randn(2, 8, 3, device=device)
    gradients = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        x = moments.clone().requires_grad_()
        sample, kl = run(x)
        (sample.square().sum() + kl.sum()).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training, device):
    layer = DiagonalGaussian(free_bits=0.1).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # same random numbers as eager
    for shape in ((3, 8, 5), (4, 8, 7)):
        moments, results = torch.randn(shape, device=device), []
        for call in (layer, compiled):
            torch.manual_seed(7)
            x = moments.clone().requires_grad_()
            sample, kl = call(x)
            results.append((sample, kl, *torch.autograd.grad(sample.square().sum() + kl.sum(), x)))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)


def test_empty_state_dict():
    assert not DiagonalGaussian().state_dict()


def test_bad_arguments(device):
    with pytest.raises(ValueError, match=r"DiagonalGaussian: free_bits must not be negative, got -1"):
        DiagonalGaussian(free_bits=-1)
    with pytest.raises(TypeError, match=r"deterministic must be None, True or False, got 'eval'"):
        DiagonalGaussian(deterministic="eval")
    for training in (True, False):
        layer = DiagonalGaussian(dim=3).train(training)
        with pytest.raises(ValueError, match="dim must be a dimension of mean"):
            layer(torch.randn(2, 4, device=device))
        with pytest.raises(ValueError, match="even size along dim"):
            layer.__class__().train(training)(torch.randn(2, 3, device=device))


def test_matches_the_op(device):
    torch.manual_seed(0)
    moments = torch.randn(2, 4, 5, device=device)
    torch.manual_seed(1)
    actual = DiagonalGaussian()(moments)
    torch.manual_seed(1)
    for found, expected in zip(actual, genperf.gaussian_sample(moments), strict=True):
        assert torch.equal(found, expected)
