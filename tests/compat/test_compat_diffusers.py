# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch

import genperf
from genperf.compat.diffusers import DiagonalGaussianDistribution


def plain(parameters):
    """Mean, log variance, standard deviation and variance as in diffusers, in float64."""
    mean, logvar = parameters.double().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    return mean, logvar, torch.exp(0.5 * logvar), torch.exp(logvar)


def per_sample(terms):
    return 0.5 * terms.flatten(1).sum(1)


def moments(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).mul(3).to(dtype)


SHAPES = [(2, 8, 3, 4), (3, 6), (2, 8, 5), (2, 4, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_formulas(shape, dtype, device):
    parameters, others = (moments(*shape, dtype=dtype, device=device) for _ in range(2))
    mean, logvar, std, var = plain(parameters)
    their_mean, their_logvar, _, their_var = plain(others)
    posterior, other = DiagonalGaussianDistribution(parameters), DiagonalGaussianDistribution(others)
    sums = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(posterior.kl(), per_sample(mean**2 + var - 1 - logvar), **sums)
    against = (mean - their_mean) ** 2 / their_var + var / their_var - 1 - logvar + their_logvar
    torch.testing.assert_close(posterior.kl(other), per_sample(against), **sums)
    x = moments(*mean.shape, dtype=dtype, device=device)
    log_likelihood = torch.distributions.Normal(mean, std).log_prob(x.double())
    torch.testing.assert_close(posterior.nll(x), -log_likelihood.flatten(1).sum(1), **sums)
    assert posterior.kl().dtype == posterior.nll(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert posterior.kl().shape == posterior.kl(other).shape == posterior.nll(x).shape == shape[:1]

    noise = torch.randn_like(posterior.mean)
    sample = posterior.sample(noise=noise)
    torch.testing.assert_close(sample, (mean + std * noise.double()).to(dtype))
    assert sample.dtype == dtype
    assert posterior.mode() is posterior.mean
    # These four last, since values that were read are kept.
    for name, expected in zip(("mean", "logvar", "std", "var"), (mean, logvar, std, var), strict=True):
        torch.testing.assert_close(getattr(posterior, name), expected.to(dtype), msg=name)
    assert posterior.parameters is parameters
    assert posterior.deterministic is False


def test_kl_of_video_latents_is_per_sample(device):
    """A sum over dimensions 1, 2 and 3 leaves [B, W]."""
    parameters = moments(2, 16, 5, 8, 8, device=device)
    mean, logvar, _, var = plain(parameters)
    kl = DiagonalGaussianDistribution(parameters).kl()
    summed_by_diffusers = 0.5 * (mean**2 + var - 1 - logvar).sum([1, 2, 3])
    assert summed_by_diffusers.shape == (2, 8)
    torch.testing.assert_close(kl, summed_by_diffusers.sum(1).float())


def test_kl_of_large_bfloat16_latents_is_accurate(device):
    parameters = torch.randn(8, 8, 64, 64, device=device).bfloat16()
    kl = DiagonalGaussianDistribution(parameters).kl()
    assert len(kl.unique()) == 8
    mean, logvar, _, var = plain(parameters)
    torch.testing.assert_close(kl, per_sample(mean**2 + var - 1 - logvar).float())


def test_nll_over_given_dimensions(device):
    parameters, x = moments(2, 6, 4, 5, device=device), moments(2, 3, 4, 5, device=device)
    posterior = DiagonalGaussianDistribution(parameters)
    mean, logvar, _, var = plain(parameters)
    terms = 0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 / var)
    for dims in ([1], [2, 3], (1, 2, 3)):
        torch.testing.assert_close(posterior.nll(x, dims=dims), terms.sum(tuple(dims)).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(posterior.nll(x), posterior.nll(x, dims=[1, 2, 3]))


@pytest.mark.parametrize("later", [False, True])
def test_deterministic(later, device):
    parameters = moments(2, 6, 4, 5, dtype=torch.bfloat16, device=device)
    posterior = DiagonalGaussianDistribution(parameters, deterministic=not later)
    if later:
        assert posterior.std.any()
        posterior.deterministic = True
    assert posterior.deterministic is True
    assert torch.equal(posterior.sample(), posterior.mean)
    assert not posterior.std.any()
    assert not posterior.var.any()
    assert torch.equal(posterior.sample(), posterior.mean)
    for zero in (posterior.kl(), posterior.kl(DiagonalGaussianDistribution(parameters)), posterior.nll(posterior.mean)):
        assert torch.equal(zero, torch.zeros(2, device=device))
    assert DiagonalGaussianDistribution(parameters).kl(posterior).isposinf().all()
    posterior.deterministic = False
    assert not torch.equal(posterior.sample(), posterior.mean)


def test_assigned_attributes_are_used(device):
    """As in a video pipeline: normalize the latents, then assign all four attributes."""
    parameters, noise = moments(2, 6, 3, 4, 5, device=device), torch.randn(2, 3, 3, 4, 5, device=device)
    shift, scale = torch.randn(2, 3, 1, 1, 1, device=device).exp()
    posterior = DiagonalGaussianDistribution(parameters)
    posterior.mean = (posterior.mean - shift) * scale
    posterior.logvar = torch.clamp(posterior.logvar + 2 * scale.log(), -20, 10)
    posterior.std = torch.exp(0.5 * posterior.logvar)
    posterior.var = torch.exp(posterior.logvar)

    mean, logvar = plain(parameters)[:2]
    mean, logvar = (mean - shift) * scale, torch.clamp(logvar + 2 * scale.log(), -20, 10)
    torch.testing.assert_close(posterior.sample(noise=noise), (mean + torch.exp(0.5 * logvar) * noise).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.kl(), per_sample(mean**2 + logvar.exp() - 1 - logvar).float(), rtol=1e-5, atol=1e-4)
    untouched = DiagonalGaussianDistribution(parameters)
    their_mean, their_logvar, _, their_var = plain(parameters)
    expected = (their_mean - mean) ** 2 / logvar.exp() + their_var / logvar.exp() - 1 - their_logvar + logvar
    torch.testing.assert_close(untouched.kl(posterior), per_sample(expected).float(), rtol=1e-4, atol=1e-4)
    assert posterior.mode() is posterior.mean


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("in_place", [False, True])
def test_one_assigned_attribute_changes_samples(name, in_place, device):
    parameters, noise = moments(2, 6, 4, device=device), torch.randn(2, 3, 4, device=device)
    posterior = DiagonalGaussianDistribution(parameters.clone())
    value = getattr(posterior, name)
    if in_place:
        value.mul_(2)
    else:
        setattr(posterior, name, 2 * value)
    mean, _, std, _ = plain(parameters)
    mean, std = (2 * mean, std) if name == "mean" else (mean, 2 * std)
    torch.testing.assert_close(posterior.sample(noise=noise), (mean + std * noise).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_attributes_does_not_change_the_noise(dtype, device):
    parameters = moments(2, 6, 4, 5, dtype=dtype, device=device)
    fresh, read = (DiagonalGaussianDistribution(parameters) for _ in range(2))
    assert all(getattr(read, name).isfinite().all() for name in ("mean", "logvar", "std", "var"))
    torch.manual_seed(0)
    expected = fresh.sample()
    torch.manual_seed(0)
    error = (read.sample() - expected).abs()
    rounding = 2 * torch.finfo(dtype).eps  # of the standard deviation, which was read in the dtype of the parameters
    assert (error <= rounding * (read.mean.abs() + 6 * read.std)).all()


@pytest.mark.parametrize("read", [False, True])
def test_gradients(read, device):
    parameters, noise = moments(2, 6, 4, dtype=torch.float64, device=device), torch.randn(2, 3, 4, dtype=torch.float64, device=device)
    actual, expected = (parameters.clone().requires_grad_() for _ in range(2))
    posterior = DiagonalGaussianDistribution(actual)
    if read:
        with torch.no_grad():  # attributes read without grad, such as for logging, must keep their gradient
            assert posterior.std.isfinite().all()
            assert posterior.var.isfinite().all()
    (posterior.sample(noise=noise).square().sum() + posterior.kl().sum()).backward()
    mean, logvar, std, var = plain(expected)
    ((mean + std * noise).square().sum() + per_sample(mean**2 + var - 1 - logvar).sum()).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


def test_sampling_is_fused_and_kl_uses_no_random_numbers(device):
    parameters = moments(2, 6, 4, 5, device=device)
    posterior = DiagonalGaussianDistribution(parameters)
    torch.manual_seed(0)
    posterior.kl()
    posterior.kl(DiagonalGaussianDistribution(moments(1, 6, 4, 5, device=device).expand(2, 6, 4, 5)))
    torch.manual_seed(0)
    posterior.kl()
    sample = posterior.sample()
    torch.manual_seed(0)
    assert torch.equal(sample, genperf.gaussian_sample(parameters)[0])


def test_seed_and_generator_determine_the_noise(device):
    posterior = DiagonalGaussianDistribution(moments(2, 6, 4, 5, device=device))
    first, second, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("torch_noise", [False, True])
@pytest.mark.parametrize("rewritten", [False, True])
def test_list_of_generators_has_one_per_sample(rewritten, torch_noise, device):
    parameters = moments(3, 6, 4, 5, device=device)

    def sample(part, seeds):
        posterior = DiagonalGaussianDistribution(part)
        posterior.torch_noise = torch_noise
        if rewritten:
            posterior.mean, posterior.std = posterior.mean + 1, posterior.std * 2
        return posterior.sample([torch.Generator().manual_seed(seed) for seed in seeds])

    together = sample(parameters, [3, 4, 5])
    alone = torch.cat([sample(parameters[i : i + 1], [3 + i]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2"):
        sample(parameters, [1, 2])
    assert sample(parameters, [1]).shape == together.shape


def test_torch_noise_matches_torch_randn(device):
    parameters = moments(2, 6, 4, 5, device=device)
    posterior = DiagonalGaussianDistribution(parameters)
    posterior.torch_noise = True
    assert DiagonalGaussianDistribution.torch_noise is False
    mean, _, std, _ = plain(parameters)
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5)).to(device)
    expected = (mean + std * noise).float()
    torch.testing.assert_close(posterior.sample(torch.Generator().manual_seed(5)), expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    drawn = posterior.sample()
    torch.manual_seed(5)
    expected = (mean + std * torch.randn(2, 3, 4, 5, device=device)).float()
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


def test_compiles_in_one_graph(device):
    def step(parameters):
        posterior = DiagonalGaussianDistribution(parameters)
        sample = posterior.sample()
        kl, nll = posterior.kl(), posterior.nll(sample)
        posterior.std = posterior.std * 0.5
        return sample, kl, nll, posterior.sample(), posterior.mode()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")  # same random numbers as eager
    parameters = moments(2, 6, 4, 5, device=device)
    results = []
    for call in (step, compiled):
        torch.manual_seed(0)
        results.append(call(parameters))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_copies(device):
    posterior = DiagonalGaussianDistribution(moments(2, 6, 4, device=device))
    copied = copy.deepcopy(posterior)
    copied.std = copied.std * 0
    assert torch.equal(copied.sample(), copied.mean)
    assert not torch.equal(posterior.sample(), posterior.mean)


def test_odd_channels():
    with pytest.raises(ValueError, match=r"even number of channels in dimension 1, got shape \[2, 3, 4\]"):
        DiagonalGaussianDistribution(torch.zeros(2, 3, 4))
