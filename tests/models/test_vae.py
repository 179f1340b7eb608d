# SPDX-License-Identifier: Apache-2.0
import math
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

import genperf
from genperf._choices import Likelihood
from genperf.models.discrete_vae import DiscreteVAE
from genperf.models.vae import SIGMA_START, VAE
from genperf.nn.batch_norm import BatchNorm

SYSTEMS = (VAE, DiscreteVAE)


def small(system, **changes):
    torch.manual_seed(0)
    own = {"num_codes": 16, "prior_width": 8, "prior_every": 1} if system is DiscreteVAE else {}
    return system(system.Config(**{"image_shape": (1, 8, 8), "hidden": 8, "dim": 4, **own, **changes}))


def seeded(function, *args, **kwargs):
    torch.manual_seed(3)
    return function(*args, **kwargs)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12)])
def test_shapes_and_modes(system, shape):
    model = small(system, image_shape=shape).train()
    images = torch.rand(2, *shape)
    codes = model.encode(images)
    assert codes.shape == ((2, 4) if system is VAE else (2, shape[1] // 4, shape[2] // 4))
    decoded = model.decode(codes)
    assert torch.equal(model.reconstruct(images), decoded)
    for made in (decoded, model.sample(2)):
        assert made.shape == images.shape
        assert made.min() >= 0
        assert made.max() <= 1
        assert not made.requires_grad
    assert model.training


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_reach_the_player_only(system):
    model = small(system)
    images = torch.rand(4, 1, 8, 8)
    optimizers = model.optimizers()
    assert tuple(model.players_at(0)) == tuple(optimizers)
    everything = set(model.parameters())
    for player, optimizer in optimizers.items():
        model.zero_grad(set_to_none=True)
        model.training_step(images, player=player)["loss"].backward()
        own = {p for group in optimizer.param_groups for p in group["params"]}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
        assert all(p.grad is None for p in set(model.parameters()) - own)
        everything -= own
    assert not everything


@pytest.mark.parametrize("system", SYSTEMS)
def test_learning(system):
    model = small(system, lr=1e-2)
    images = torch.rand(8, 1, 2, 2).round().repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizers = model.optimizers()
    before = F.mse_loss(model.reconstruct(images), images)
    losses = {player: [] for player in model.players}
    for step in range(100):
        model.progress = step / 100
        for player in model.players_at(step):
            loss = model.training_step(images, player=player)["loss"]
            model.zero_grad(set_to_none=True)
            loss.backward()
            optimizers[player].step()
            model.step_done(player)
            losses[player].append(loss.item())
    assert F.mse_loss(model.reconstruct(images), images) < 0.6 * before
    assert losses["model"][-1] < losses["model"][0]
    if system is DiscreteVAE:
        assert losses["prior"][-1] < 0.85 * math.log(16)


@pytest.mark.parametrize("system", SYSTEMS)
def test_state_dict_gives_equal_samples(system):
    model, other = small(system), system(small(system).config)
    for p in model.parameters():
        p.data.add_(0.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(seeded(other.sample, 3), seeded(model.sample, 3))


@pytest.mark.parametrize("system", SYSTEMS)
def test_split_batch_trains_like_the_batch(system):
    model = small(system)
    for module in model.modules():
        module.train(not isinstance(module, BatchNorm))  # whose statistics are global only under torch.distributed
    images = torch.rand(6, 1, 8, 8)
    results = []
    for size in (6, 3):
        model.zero_grad()
        for first in range(0, 6, size):
            with genperf.sample_offset(first):
                (seeded(model.training_step, images[first : first + size])["loss"] * size / 6).backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", get_args(Likelihood))
@pytest.mark.parametrize("sigma", [None, 0.1])
def test_vae_loss_matches_plain_pytorch(likelihood, sigma):
    model = small(VAE, likelihood=likelihood, sigma=sigma, beta=3.0, shift=0)
    images = torch.rand(4, 1, 8, 8)
    losses = seeded(model.training_step, images)
    sample, kl = seeded(genperf.gaussian_sample, model.encoder(images), impl="reference")
    outputs = model.decoder(sample)
    if likelihood == "bernoulli":
        means = outputs.sigmoid()
        log_density = images * means.log() + (1 - images) * (1 - means).log()
    else:
        log_density = torch.distributions.Normal(outputs, SIGMA_START if sigma is None else sigma).log_prob(images)
    reconstruction = -log_density.sum((1, 2, 3))
    torch.testing.assert_close(losses["reconstruction"], reconstruction.mean())
    torch.testing.assert_close(losses["kl"], kl.mean().detach())
    torch.testing.assert_close(losses["loss"].detach(), losses["reconstruction"] + 3 * losses["kl"])
    torch.testing.assert_close(seeded(model.negative_elbo, images), (reconstruction + kl).detach())


def test_learned_or_fixed_sigma():
    model = small(VAE, likelihood="gaussian", shift=0)
    images = torch.rand(4, 1, 8, 8)
    seeded(model.training_step, images)["loss"].backward()
    sample, _ = seeded(genperf.gaussian_sample, model.encoder(images))
    squares = (images - model.decoder(sample)).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(model.log_sigma.grad, 64 - squares.detach() / SIGMA_START**2)
    assert "log_sigma" not in small(VAE, likelihood="gaussian", sigma=0.1).state_dict()


def test_elbo_is_averaged_over_samples():
    model = small(VAE)
    images = torch.rand(3, 1, 8, 8)
    torch.manual_seed(3)
    single = torch.stack([model.negative_elbo(images) for _ in range(5)])
    torch.testing.assert_close(seeded(model.negative_elbo, images, samples=5), single.mean(0))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        model.negative_elbo(images, samples=0)


def test_shift_is_the_same_for_the_batch():
    images = torch.rand(3, 2, 8, 12)
    model = small(VAE, image_shape=(2, 8, 12), shift=2)
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    moves = set()
    for _ in range(40):
        model.training_step(images)
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(seen[-1][:, :, 2 + down : 6 + down, 2 + right : 10 + right], images[:, :, 2:6, 2:10])
        ]
        assert seen[-1].shape == images.shape
        assert len(found) == 1
        moves.update(found)
    assert {down for down, _ in moves} == {right for _, right in moves} == set(range(-2, 3))


def test_vae_latent_grid():
    model = small(VAE)
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(model.latent_grid(3, images)[4:5], model.decode(model.encode(images).mean(0, keepdim=True)))


@pytest.mark.parametrize("hard", [False, True])
def test_discrete_loss_matches_plain_pytorch(hard):
    model = small(DiscreteVAE, hard=hard, kl_weight=0.5, tau_start=2.0, tau_end=0.5)
    model.progress = 0.5
    assert model.tau == pytest.approx(1.0)
    images = torch.rand(4, 1, 8, 8)
    losses = seeded(model.training_step, images)
    sample, _, kl = seeded(
        genperf.gumbel_sample, model._logits(images), model.quantizer.codebook, tau=1.0, hard=hard, dim=1, impl="reference"
    )
    torch.testing.assert_close(losses["reconstruction"], F.mse_loss(model.decoder(sample), images).detach())
    torch.testing.assert_close(losses["kl"], kl.mean().detach())
    torch.testing.assert_close(losses["loss"].detach(), losses["reconstruction"] + 0.5 * losses["kl"])


def test_reconstruction_depends_on_indices_only():
    model = small(DiscreteVAE)
    images = torch.rand(3, 1, 8, 8)
    indices = model.encode(images)
    assert indices.dtype == torch.int64
    codes = F.one_hot(model.eval()._logits(images).argmax(1), 16).float() @ model.quantizer.codebook
    torch.testing.assert_close(model.decode(indices), model.decoder(codes.movedim(-1, 1)).clamp(0, 1))


def test_prior_trains_on_encodings():
    model = small(DiscreteVAE)
    images = torch.rand(4, 1, 8, 8)
    loss = model.training_step(images, player="prior")["loss"]
    torch.testing.assert_close(loss, model.prior.loss(model.encode(images)))


def test_prior_every():
    model = small(DiscreteVAE, prior_every=3)
    assert [step for step in range(8) if "prior" in model.players_at(step)] == [0, 3, 6]
    assert all("model" in model.players_at(step) for step in range(8))


def test_without_a_prior():
    model = small(DiscreteVAE, prior_width=0)
    assert model.players_at(0) == model.players == ("model",)
    assert model.optimizers().keys() == {"model"}
    with pytest.raises(RuntimeError, match="prior_width=0"):
        model.sample(2)
    with pytest.raises(ValueError, match=r"^DiscreteVAE: player must be one of model, got 'prior'"):
        model.training_step(torch.rand(2, 1, 8, 8), player="prior")


@pytest.mark.parametrize("system", SYSTEMS)
def test_bad_calls(system):
    model, name = small(system), system.__name__
    with pytest.raises(ValueError, match=f"^{name}: player must be one of {', '.join(model.players)}, got 'generator'"):
        model.training_step(torch.rand(2, 1, 8, 8), player="generator")
    with pytest.raises(ValueError, match=f"^{name}: n must be at least 1, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match=f"^{name}: labels must be None"):
        model.sample(2, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        (VAE, {"image_shape": (1, 10, 8)}, "VAE: images must have at least 1 channel and sides divisible by 4"),
        (VAE, {"hidden": 3}, "VAE: hidden must be"),
        (VAE, {"dim": 0}, "VAE: dim must be at least 1"),
        (VAE, {"likelihood": "poisson"}, "likelihood must be one of bernoulli, gaussian, got 'poisson'"),
        (VAE, {"sigma": 0.0}, "sigma must be None or"),
        (VAE, {"beta": -1.0}, "beta must be a finite number"),
        (VAE, {"shift": -1}, "shift must not be negative"),
        (DiscreteVAE, {"image_shape": (0, 8, 8)}, "DiscreteVAE: images must have at least 1 channel"),
        (DiscreteVAE, {"num_codes": 0}, "DiscreteVAE: num_codes must be at least 1"),
        (DiscreteVAE, {"tau_end": 0.0}, "tau_end must be a finite number above 0"),
        (DiscreteVAE, {"tau_start": math.inf}, "tau_start must be a finite number above 0"),
        (DiscreteVAE, {"prior_every": 0}, "prior_every must be at least 1"),
        (DiscreteVAE, {"kl_weight": math.nan}, "kl_weight must be a finite number"),
    ],
)
def test_bad_config(system, changes, message):
    with pytest.raises(ValueError, match=message):
        small(system, **changes)


@pytest.mark.parametrize(
    ("system", "method"),
    [(VAE, "negative_elbo"), *((s, m) for s in SYSTEMS for m in ("training_step", "encode", "reconstruct"))],
)
def test_bad_images(system, method):
    with pytest.raises(ValueError, match=r"images must have shape \[B, 1, 8, 8\], got \[2, 1, 8, 12\]"):
        getattr(small(system), method)(torch.rand(2, 1, 8, 12))
