# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from genperf.models.lapgan import LAPGAN, LAPGANConfig


def small(**changes):
    torch.manual_seed(0)
    return LAPGAN(LAPGANConfig(**{"image_shape": (1, 8, 8), "levels": 1, "width": 8, "hidden": 8, "latent_dim": 4, **changes}))


def gradients(system, player, images):
    system.zero_grad(set_to_none=True)
    system.training_step(images, player=player)["loss"].backward()
    return {name for name, parameter in system.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("shape", "levels"), [((1, 8, 8), 2), ((3, 12, 8), 1), ((1, 14, 10), 2)])
def test_shapes(shape, levels):
    system = small(image_shape=shape, levels=levels)
    images = system.sample(3)
    assert images.shape == (3, *shape)
    assert images.min() >= 0
    assert images.max() <= 1
    for player in system.players:
        losses = system.training_step(torch.rand(2, *shape), player=player)
        assert losses.keys() == {"loss", *(f"level{k}" for k in range(levels + 1))}
        torch.testing.assert_close(losses["loss"].detach(), sum(losses[f"level{k}"] for k in range(levels + 1)))


def test_pyramid_reconstructs_images():
    images = torch.rand(2, 3, 28, 28)
    pyramid = small(image_shape=(3, 28, 28), levels=2).pyramid
    bands = pyramid.decompose(images)
    assert [band.shape[-1] for band in bands] == [28, 14, 7]
    assert (pyramid.reconstruct(bands) - images).abs().max() <= 1e-6


def test_samples_are_reconstructed_from_bands():
    system = small(levels=2)
    system.train()
    torch.manual_seed(1)
    sample = system.sample(3)
    assert system.training
    torch.manual_seed(1)
    system.eval()
    images = system.games[2].sample(3)
    for game, size in ((system.games[1], 4), (system.games[0], 8)):
        low = system.pyramid.up(images, (size, size))
        images = low + game.sampler(torch.no_grad()(game._noise)(3), low).detach()
    torch.testing.assert_close(sample, images.clamp(0, 1))


def test_losses_match_plain_pytorch():
    system = small(ema=0.0)
    images = torch.rand(4, 1, 8, 8)
    system.eval()  # batch normalization with running statistics
    band_game, coarse_game = system.games
    coarse = system.pyramid.down(images)
    low = system.pyramid.up(coarse)
    for player in system.players:
        torch.manual_seed(2)
        losses = system.training_step(images, player=player)
        torch.manual_seed(2)
        fake = low + band_game.generator(band_game._noise(4), low)
        logits = [_score(band_game.discriminator, image, low) for image in (images, fake)]
        fake = coarse_game.generator(coarse_game._noise(4))
        coarse_logits = [coarse_game.discriminator(image)[0] for image in (coarse * 2 - 1, fake)]
        for level, (real, generated) in (("level0", logits), ("level1", coarse_logits)):
            expected = (
                F.softplus(-real).mean() + F.softplus(generated).mean() if player == "discriminator" else F.softplus(-generated).mean()
            )
            torch.testing.assert_close(losses[level], expected.detach())


def _score(discriminator, image, low):
    """As in the paper: the image and its low-pass image, concatenated."""
    return discriminator.score(discriminator.body(torch.cat([image, low], 1) * 2 - 1)).squeeze(1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"penalty": "r1", "feature_matching": 1.0, "instance_noise": 0.1}, {"minibatch_kernels": 3, "historical_averaging": 0.1}],
)
def test_gradients_reach_the_player_at_every_level(changes):
    system = small(levels=2, **changes)
    for player in system.players:
        optimizer = system.optimizers()[player]
        own = {name for name, parameter in system.named_parameters() if f".{player}." in name}
        assert gradients(system, player, torch.rand(3, 1, 8, 8)) == own
        learned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert learned == {id(parameter) for name, parameter in system.named_parameters() if name in own}
        optimizer.step()
        system.step_done(player)


def test_learning_rates_and_order_of_players():
    system = small(critic_steps=2, lr=1e-3, lr_discriminator=4e-3)
    assert [tuple(system.players_at(step)) for step in range(2)] == [("discriminator",), ("discriminator", "generator")]
    rates = {player: {group["lr"] for group in optimizer.param_groups} for player, optimizer in system.optimizers().items()}
    assert rates == {"discriminator": {4e-3}, "generator": {1e-3}}


def test_schedules_depend_on_progress():
    system = small(instance_noise=1.0)
    system.progress = 0.25
    system.training_step(torch.rand(2, 1, 8, 8), player="discriminator")
    assert {game.progress for game in system.games} == {0.25}


def test_state_dict_gives_the_same_samples():
    system, other = small(ema=0.9), small(ema=0.9)
    optimizers = system.optimizers()
    for player in system.players:
        gradients(system, player, torch.rand(4, 1, 8, 8))
        optimizers[player].step()
        system.step_done(player)
    other.load_state_dict(system.state_dict())
    drawn = []
    for each in (system, other, small()):
        torch.manual_seed(3)
        drawn.append(each.sample(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_learns_the_bands():
    """Trained on images of one vertical edge, samples get closer to them."""
    images = torch.zeros(16, 1, 8, 8)
    images[..., 3:] = 1
    system = small(lr=4e-3, ema=0.0)
    optimizers = system.optimizers()
    distance = []
    for _ in range(60):
        for player in system.players:
            system.zero_grad(set_to_none=True)
            system.training_step(images, player=player)["loss"].backward()
            optimizers[player].step()
            system.step_done(player)
        distance.append((system.sample(8) - images[:8]).square().mean().item())
    assert sum(distance[-10:]) / 10 < 0.6 * distance[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 3}, "sides of at least 16 for 3 levels"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"width": 0}, "^LAPGAN: width must be at least 1"),
        ({"ema": 2.0}, "^LAPGAN: ema must be in"),
        ({"kernel": "sinc"}, "kernel must be one of"),
        ({"image_shape": (0, 8, 8)}, "at least 1 channel"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_bad_input():
    system = small()
    with pytest.raises(ValueError, match=r"LAPGAN: images must have shape \[B, 1, 8, 8\], got \[2, 1, 8, 9\]"):
        system.training_step(torch.rand(2, 1, 8, 9), player="generator")
    with pytest.raises(ValueError, match="LAPGAN: player must be one of discriminator, generator, got 'critic'"):
        system.training_step(torch.rand(2, 1, 8, 8), player="critic")
    with pytest.raises(ValueError, match="LAPGAN: labels must be None"):
        system.sample(2, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="LAPGAN: n must be at least 1, got 0"):
        system.sample(0)
