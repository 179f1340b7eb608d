# SPDX-License-Identifier: Apache-2.0
"""Losses and options of GANs against plain PyTorch, and the specifics of each GAN."""

import pytest
import torch
from test_gans import batch, small, train
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from genperf import interpolate
from genperf.models._moving_average import update_average
from genperf.models.conditional_gan import ConditionalGAN
from genperf.models.dcgan import DCGAN
from genperf.models.gan import GAN
from genperf.models.system import standard_normal
from genperf.models.wgan import WGAN
from genperf.models.wgan_gp import WGANGP
from genperf.nn.batch_norm import BatchNorm
from genperf.nn.minibatch_discrimination import MinibatchDiscrimination
from genperf.nn.virtual_batch_norm import VirtualBatchNorm


def noise(seed, *shapes):
    """The noise that a GAN draws with this seed, batch by batch."""
    torch.manual_seed(seed)
    return [standard_normal(*shape, device=torch.device("cpu")) for shape in shapes]


def test_discriminator_loss_matches_plain_pytorch():
    system = small(GAN, instance_noise=0.3, label_smoothing=0.1)
    system.progress = 0.25
    images, _ = batch(system)
    first, z, second = noise(3, images.shape, (6, 5), images.shape)
    torch.manual_seed(3)
    losses = system.training_step(images, player="discriminator")

    std = 0.3 * 0.75
    real, _ = system.discriminator(images * 2 - 1 + std * first)
    fake, _ = system.discriminator(system.generator(z).detach() + std * second)
    expected = F.binary_cross_entropy(real.sigmoid(), torch.full((6,), 0.9)) + F.binary_cross_entropy(fake.sigmoid(), torch.zeros(6))
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["real_score"], real.detach().mean())
    torch.testing.assert_close(losses["fake_score"], fake.detach().mean())


def test_generator_loss_matches_plain_pytorch():
    system = small(GAN, feature_matching=0.5)
    images, _ = batch(system)
    (z,) = noise(3, (6, 5))
    torch.manual_seed(3)
    losses = system.training_step(images, player="generator")

    fake, fake_features = system.discriminator(system.generator(z))
    _, real_features = system.discriminator(images * 2 - 1)
    adversarial = -fake.sigmoid().log().mean()
    matching = 0.5 * (real_features.mean(0) - fake_features.mean(0)).square().sum()
    torch.testing.assert_close(losses["adversarial"], adversarial.detach())
    torch.testing.assert_close(losses["feature_matching"], matching.detach())
    expected = torch.autograd.grad(adversarial + matching, list(system.generator.parameters()))
    losses["loss"].backward()
    torch.testing.assert_close([p.grad for p in system.generator.parameters()], list(expected))


def test_wgan_gp_loss_matches_plain_pytorch():
    system = small(WGANGP)
    images, _ = batch(system)
    real = images * 2 - 1
    (z,) = noise(3, (6, 5))
    fake = system.generator(z).detach()
    points = interpolate(real, fake).requires_grad_()
    (gradients,) = torch.autograd.grad(system.discriminator(points)[0].sum(), points, create_graph=True)
    penalty = 10 * (gradients.flatten(1).norm(dim=1) - 1).square().mean()
    adversarial = system.discriminator(fake)[0].mean() - system.discriminator(real)[0].mean()
    torch.manual_seed(3)
    losses = system.training_step(images, player="discriminator")
    torch.testing.assert_close(losses["loss"], adversarial + penalty)
    torch.testing.assert_close(losses["penalty"], penalty.detach())


def test_historical_averaging_matches_plain_pytorch():
    system = small(GAN, historical_averaging=2.0)
    images, labels = batch(system)
    past = {player: [] for player in system.players}
    optimizers = system.optimizers()
    for _ in range(3):
        for player in system.players:
            parameters = torch.nn.utils.parameters_to_vector(getattr(system, player).parameters()).detach()
            losses = system.training_step(images, labels, player=player)
            expected = (parameters - torch.stack(past[player]).mean(0)).square().sum() if past[player] else torch.zeros(())
            torch.testing.assert_close(losses["historical_averaging"], 2 * expected)
            system.zero_grad()
            losses["loss"].backward()
            optimizers[player].step()
            system.step_done(player)
            past[player].append(torch.nn.utils.parameters_to_vector(getattr(system, player).parameters()).detach().clone())


def test_instance_noise_decreases_to_zero():
    system = small(GAN, instance_noise=0.5)
    images, _ = batch(system)
    system.progress = 1.0
    assert torch.equal(system._noisy(images), images)
    system.progress = 0.5
    many = images.repeat(40, 1, 1, 1)
    assert (system._noisy(many) - many).std().item() == pytest.approx(0.25, rel=0.03)


def test_samples_come_from_averaged_weights():
    system = small(DCGAN, ema=0.5)
    images, labels = batch(system)
    assert all(not p.requires_grad for p in system.average.parameters())
    average, optimizers = None, system.optimizers()
    for step in range(4):
        for player in system.players:
            system.zero_grad()
            system.training_step(images, labels, player=player)["loss"].backward()
            optimizers[player].step()
            system.step_done(player)
        decay = min(0.5, (1 + step) / (10 + step))
        now = torch.nn.utils.parameters_to_vector(system.generator.parameters()).detach()
        average = now.clone() if average is None else decay * average + (1 - decay) * now
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(system.average.parameters()), average)
    for actual, expected in zip(system.average.module.buffers(), system.generator.buffers(), strict=True):
        assert torch.equal(actual, expected)
    (z,) = noise(4, (3, 5))
    torch.manual_seed(4)
    samples = system.sample(3)
    system.average.eval()
    torch.testing.assert_close(samples, (system.average(z) + 1) / 2)
    assert not torch.allclose(samples, (system.generator.eval()(z) + 1) / 2)


def test_averaged_weights_match_torch_bitwise():
    def plain(average, value, count):
        return average.lerp(value, (1 - ((1 + count) / (10 + count)).clamp(max=0.3)).to(value.dtype))

    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    actual, expected = AveragedModel(network), AveragedModel(network, avg_fn=plain)
    for _ in range(5):
        with torch.no_grad():
            for value in (*network.parameters(), *network[1].buffers()):
                value.add_(1 if value.dtype == torch.int64 else torch.randn_like(value))
        update_average(actual, network, 0.3)
        expected.update_parameters(network)
        assert actual.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in actual.state_dict().items())


def test_critic_steps():
    system = small(WGANGP, critic_steps=3)
    assert [system.players_at(step) for step in range(4)] == [
        ("discriminator",),
        ("discriminator",),
        ("discriminator", "generator"),
        ("discriminator",),
    ]


@pytest.mark.parametrize(("norm", "penalty"), [("batch", None), ("batch", "r1"), ("virtual", None), ("none", None)])
def test_normalization(norm, penalty):
    system = small(DCGAN, norm=norm, penalty=penalty)
    found = {player: {type(module) for module in getattr(system, player).modules()} for player in system.players}
    assert (BatchNorm in found["generator"]) == (norm == "batch")
    assert (VirtualBatchNorm in found["generator"]) == (norm == "virtual")
    assert (BatchNorm in found["discriminator"]) == (norm in ("batch", "virtual") and penalty is None)
    assert VirtualBatchNorm not in found["discriminator"]


def test_virtual_batch_norm_makes_samples_independent():
    system = small(DCGAN, norm="virtual").train()
    (z,) = noise(4, (6, 5))
    torch.testing.assert_close(system.generator(z)[:2], system.generator(z[:2]))
    batch_norm = small(DCGAN).train()
    assert not torch.allclose(batch_norm.generator(z)[:2], batch_norm.generator(z[:2]), atol=1e-3)
    first = system.generator.body[0].weight
    (through_reference,) = torch.autograd.grad(system.generator(z)[0].sum(), first)
    assert through_reference.any()


def test_minibatch_discrimination_detects_collapse():
    system = small(DCGAN, minibatch_kernels=4, norm="none")
    layer = next(module for module in system.discriminator.modules() if isinstance(module, MinibatchDiscrimination))
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[:, -4:]))
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    system.discriminator(images[:1].expand(6, -1, -1, -1))
    system.discriminator(images)
    torch.testing.assert_close(seen[0], torch.full((6, 4), 5.0))
    assert (seen[1] < 5).all()


def test_dcgan_initialization():
    system = DCGAN(DCGAN.Config(image_shape=(1, 16, 16), width=32))
    for module in system.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, BatchNorm):
            assert 0.9 < module.weight.min() <= module.weight.max() < 1.1


def test_wgan_clips_the_critic_only():
    system = small(WGAN, lr=0.1)
    images, labels = batch(system)
    before = [p.detach().abs().max() for p in system.generator.parameters()]
    train(system, 2, images, labels)
    assert max(p.abs().max() for p in system.discriminator.parameters()) <= 0.01
    assert max(p.detach().abs().max() for p in system.generator.parameters()) > max(before)
    assert isinstance(system.optimizers()["generator"], torch.optim.RMSprop)
    with pytest.raises(ValueError, match=r"^WGAN: clip must be above 0, got 0\.0"):
        small(WGAN, clip=0.0)


def test_two_learning_rates():
    optimizers = small(DCGAN, lr=1e-4, lr_discriminator=4e-4, beta1=0.3, beta2=0.8).optimizers()
    rates = {player: optimizer.param_groups[0]["lr"] for player, optimizer in optimizers.items()}
    assert rates == {"generator": 1e-4, "discriminator": 4e-4}
    assert optimizers["discriminator"].param_groups[0]["betas"] == (0.3, 0.8)


def test_labels_condition_both_players():
    system = small(ConditionalGAN)
    (z,) = noise(4, (3, 5))
    one, other = (system.condition(torch.full((3,), label)) for label in (0, 2))
    system.eval()
    assert not torch.allclose(system.generator(z, one), system.generator(z, other), atol=1e-4)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    logits, features = system.discriminator(images, one)
    assert not torch.allclose(logits, system.discriminator(images, other)[0], atol=1e-6)
    projected = (features * system.discriminator.projection.weight[:, 0]).sum(1)
    torch.testing.assert_close(logits, system.discriminator.score(features).squeeze(1) + projected)


def test_samples_without_labels_cycle_through_classes():
    system = small(ConditionalGAN).eval()
    torch.manual_seed(4)
    drawn = system.sample(7)
    torch.manual_seed(4)
    assert torch.equal(drawn, system.sample(7, torch.tensor([0, 1, 2, 0, 1, 2, 0])))


def test_conditional_gan_learns_the_labels():
    system = small(ConditionalGAN, lr=5e-3, num_classes=2)
    labels = torch.arange(8) % 2
    images = labels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) * 0.8 + 0.1
    train(system, 40, images, labels)
    dark, bright = system.sample(32).mean((1, 2, 3)).unflatten(0, (-1, 2)).unbind(1)
    assert dark.max() < bright.min()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 3]), ValueError, r"labels must be \[B\] with values 0 \.\.\. 2, got 0 \.\.\. 3\."),
        (torch.tensor([-1, 1]), ValueError, r"got -1 \.\.\. 1\."),
        (torch.tensor([[0, 1]]).T, ValueError, r"got shape \[2, 1\]\."),
        (torch.tensor([0.0, 1.0]), TypeError, "labels must be int64, got torch.float32"),
        (torch.tensor([0, 1, 2]), ValueError, "there must be a label for each of 2 images, got 3 labels"),
    ],
)
def test_bad_labels(labels, error, message):
    system = small(ConditionalGAN)
    with pytest.raises(error, match=message):
        system.sample(2, labels)


def test_conditional_training_needs_labels():
    system = small(ConditionalGAN)
    images, labels = batch(system)
    with pytest.raises(ValueError, match=r"^ConditionalGAN: labels must be int64 \[B\], got None"):
        system.training_step(images, player="generator")
    with pytest.raises(ValueError, match=r"^ConditionalGAN: there must be a label for each of 6 images, got 5 labels"):
        system.training_step(images, labels[:5], player="generator")


def test_conditional_gan_needs_a_class():
    with pytest.raises(ValueError, match=r"^ConditionalGAN: num_classes must be at least 1, got 0\."):
        small(ConditionalGAN, num_classes=0)
