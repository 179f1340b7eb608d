# SPDX-License-Identifier: Apache-2.0
"""Tests for all GANs."""

import pytest
import torch

from genperf import reference_ops
from genperf.models.conditional_gan import ConditionalGAN
from genperf.models.dcgan import DCGAN
from genperf.models.gan import GAN
from genperf.models.wgan import WGAN
from genperf.models.wgan_gp import WGANGP

GANS = (GAN, DCGAN, WGAN, WGANGP, ConditionalGAN)
CONVOLUTIONAL = (DCGAN, WGAN, WGANGP, ConditionalGAN)

# Each option with the field of the configuration that enables it.
TRICKS = {
    "label_smoothing": 0.1,
    "instance_noise": 0.2,
    "feature_matching": 0.5,
    "historical_averaging": 0.5,
    "minibatch_kernels": 3,
    "ema": 0.9,
    "norm": "virtual",
    "critic_steps": 2,
    "penalty": "r1",
}


def small(system, **changes):
    torch.manual_seed(0)
    config = {"image_shape": (1, 8, 8), "latent_dim": 5, "width": 8, "critic_steps": 1, "ema": 0.0, **changes}
    if system is ConditionalGAN:
        config.setdefault("num_classes", 3)
    return system(system.Config(**config))


def batch(system, n=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *system.config.image_shape, generator=generator), torch.arange(n) % 3


def train(system, steps, images, labels):
    optimizers = system.optimizers()
    history = []
    for step in range(steps):
        system.progress = step / steps
        for player in system.players_at(step):
            losses = system.training_step(images, labels, player=player)
            system.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizers[player].step()
            system.step_done(player)
            history.append((player, {name: value.item() for name, value in losses.items()}))
    return history


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 8, 12)])
@pytest.mark.parametrize("kind", GANS)
def test_shapes(kind, image_shape):
    system = small(kind, image_shape=image_shape)
    images, labels = batch(system)
    condition = system.condition(labels)
    fake = system.generator(torch.randn(6, 5), condition)
    assert fake.shape == images.shape
    assert fake.abs().max() <= 1
    logits, features = system.discriminator(images * 2 - 1, condition)
    assert logits.shape == (6,)
    assert features.shape[0] == 6
    assert features.dim() == 2
    samples = system.sample(4)
    assert samples.shape == (4, *image_shape)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert not samples.requires_grad


@pytest.mark.parametrize("player", ["discriminator", "generator"])
@pytest.mark.parametrize("kind", GANS)
def test_gradients_reach_the_player_only(kind, player):
    system = small(kind)
    images, labels = batch(system)
    losses = system.training_step(images, labels, player=player)
    losses["loss"].backward()
    for name, parameter in system.named_parameters():
        assert (parameter.grad is not None) == name.startswith(player), name
        assert parameter.requires_grad
    assert all(not value.requires_grad for name, value in losses.items() if name != "loss")
    parts = {"adversarial", "penalty"} & losses.keys()
    torch.testing.assert_close(losses["loss"].detach(), sum(losses[name] for name in parts))


@pytest.mark.parametrize("player", ["discriminator", "generator"])
@pytest.mark.parametrize("kind", GANS)
def test_reference_ops_agree(kind, player):
    results = []
    for reference in (False, True):
        system = small(kind, instance_noise=0.1, minibatch_kernels=2)
        images, labels = batch(system)
        torch.manual_seed(5)
        if reference:
            with reference_ops():
                loss = system.training_step(images, labels, player=player)["loss"]
                loss.backward()
        else:
            loss = system.training_step(images, labels, player=player)["loss"]
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in getattr(system, player).parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


WITHOUT = {(GAN, "norm"), (WGAN, "label_smoothing"), (WGANGP, "label_smoothing")}


@pytest.mark.parametrize(("kind", "trick"), [(kind, trick) for kind in GANS for trick in TRICKS if (kind, trick) not in WITHOUT])
def test_every_option_trains_and_resumes(kind, trick):
    changes = {trick: TRICKS[trick]}
    system = small(kind, **changes)
    images, labels = batch(system)
    # The bias of a critic's last layer has no gradient, since it cancels between real and generated images.
    before = {name: p.clone() for name, p in system.named_parameters() if p.requires_grad and p.dim() > 1}
    history = train(system, 2, images, labels)
    assert all(torch.tensor(value).isfinite() for _, losses in history for value in losses.values())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in system.named_parameters() if name in before)

    other = small(kind, **changes)
    other.load_state_dict(system.state_dict())
    other.progress = system.progress
    drawn, losses = [], []
    for model in (system, other):
        torch.manual_seed(7)
        drawn.append(model.sample(5))
        losses.append(model.training_step(images, labels, player="generator"))
    assert torch.equal(*drawn)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


@pytest.mark.parametrize("kind", GANS)
def test_sampling_does_not_change_mode_and_statistics(kind):
    system = small(kind)
    state = {name: value.clone() for name, value in system.state_dict().items()}
    for training in (True, False):
        system.train(training)
        system.sample(3)
        assert all(module.training == training for module in system.modules())
    assert all(torch.equal(value, state[name]) for name, value in system.state_dict().items())
    torch.manual_seed(2)
    once = system.sample(3)
    torch.manual_seed(2)
    assert torch.equal(system.sample(3), once)
    torch.manual_seed(2)
    # Samples one at a time, which do not depend on batch statistics.
    torch.testing.assert_close(system.sample(2), once[:2])


@pytest.mark.parametrize("kind", GANS)
def test_generator_learns_the_brightness_of_the_images(kind):
    """All images are equally bright, unlike the initial samples."""
    changes = {WGAN: {"clip": 0.1}, WGANGP: {"beta1": 0.0}}
    system = small(kind, lr=1e-2, **changes.get(kind, {}))
    images, labels = torch.full((8, 1, 8, 8), 0.9), torch.arange(8) % 3
    before = (system.sample(64) - 0.9).abs().mean()
    train(system, 25, images, labels)
    after = (system.sample(64) - 0.9).abs().mean()
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0."),
        ({"width": 0}, "width must be at least 1, got 0."),
        ({"critic_steps": 0}, "critic_steps must be at least 1, got 0."),
        ({"loss": "minimax"}, "loss must be one of .*wasserstein, got 'minimax'."),
        ({"penalty": "r3"}, "penalty must be one of .*wgan-gp, .*, got 'r3'."),
        ({"instance_noise": -0.1}, "instance_noise must be a finite number, at least 0, got -0.1."),
        ({"penalty_weight": float("nan")}, "penalty_weight must be a finite number, at least 0, got nan."),
        ({"latent_dim": float("nan")}, "latent_dim must be at least 1, got nan."),
        ({"image_shape": (0, 8, 8)}, "images must have at least 1 channel and sides"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0."),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0."),
    ],
)
@pytest.mark.parametrize("kind", GANS)
def test_bad_config(kind, changes, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
        small(kind, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (1, 8, 10)}, r"images must have at least 1 channel and sides divisible by 4, got \[1, 8, 10\]"),
        ({"norm": "layer"}, "norm must be one of batch, virtual, none, got 'layer'."),
    ],
)
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_bad_convolutional_config(kind, changes, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
        small(kind, **changes)


@pytest.mark.parametrize("kind", [WGAN, WGANGP])
def test_label_smoothing_needs_targets(kind):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: label_smoothing must be 0 for loss 'wasserstein', got 0.1\.$"):
        small(kind, label_smoothing=0.1)


@pytest.mark.parametrize("kind", GANS)
def test_bad_calls(kind):
    system, name = small(kind), kind.__name__
    images, labels = batch(system)
    with pytest.raises(ValueError, match=rf"^{name}: images must have shape \[B, 1, 8, 8\], got \[6, 1, 7, 8\]"):
        system.training_step(images[:, :, 1:], labels, player="generator")
    with pytest.raises(TypeError, match=rf"^{name}: images must be floats in \[0, 1\], got torch.uint8"):
        system.training_step(images.to(torch.uint8), labels, player="discriminator")
    with pytest.raises(ValueError, match=f"^{name}: player must be one of discriminator, generator, got 'model'"):
        system.training_step(images, labels, player="model")
    with pytest.raises(ValueError, match=f"^{name}: n must be at least 1, got 0"):
        system.sample(0)
    if kind is not ConditionalGAN:
        with pytest.raises(ValueError, match=f"^{name}: labels must be None, since samples are unconditional"):
            system.sample(6, labels)
