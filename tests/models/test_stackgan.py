# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from genperf.models.stackgan import Condition, StackGAN, StackGANConfig


def small(**changes):
    torch.manual_seed(0)
    settings = {"image_shape": (1, 8, 8), "num_classes": 3, "width": 8, "latent_dim": 4, "augmented_dim": 5, **changes}
    return StackGAN(StackGANConfig(**settings))


LABELS = torch.tensor([0, 2, 1, 1])


def step(system, optimizers, images, labels, player):
    system.zero_grad(set_to_none=True)
    losses = system.training_step(images, labels, player=player)
    losses["loss"].backward()
    optimizers[player].step()
    system.step_done(player)
    return losses


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 16), (1, 28, 28)])
def test_shapes(shape):
    system = small(image_shape=shape)
    images = system.sample(4)
    assert images.shape == (4, *shape)
    assert images.min() >= 0
    assert images.max() <= 1
    for player in system.players:
        assert system.training_step(torch.rand(4, *shape), LABELS, player=player)["loss"].shape == ()


@pytest.mark.parametrize("player", StackGAN.players)
@pytest.mark.parametrize("changes", [{}, {"penalty": "r1", "feature_matching": 1.0, "historical_averaging": 0.1, "minibatch_kernels": 3}])
def test_gradients_reach_the_player_only(player, changes):
    system = small(**changes)
    step(system, system.optimizers(), torch.rand(4, 1, 8, 8), LABELS, player)
    reached = {name for name, parameter in system.named_parameters() if parameter.grad is not None}
    place = f"stages.{int(player[-1]) - 1}.{player[:-1]}."
    assert reached == {name for name, _ in system.named_parameters() if name.startswith(place)}


@pytest.mark.parametrize("number", [1, 2])
def test_losses_match_plain_pytorch(number):
    system = small(kl_weight=0.5).eval()  # batch normalization with running statistics
    images = torch.rand(4, 1, 8, 8)
    stage = system.stages[number - 1]
    real = (F.avg_pool2d(images, 2) if number == 1 else images) * 2 - 1
    own = F.one_hot(LABELS, 3) * 3**0.5

    def fake():
        low = system.stages[0].sample(4, _condition(own)) if number == 2 else None
        return stage.generator.draw(stage._noise(4), _condition(own, low))

    torch.manual_seed(1)
    losses = system.training_step(images, LABELS, player=f"discriminator{number}")
    torch.manual_seed(1)
    wrong = F.one_hot((LABELS + torch.randint(1, 3, ())) % 3, 3) * 3**0.5
    generated = _score(stage, fake()[0], own)
    mismatched = _score(stage, real, wrong)
    expected = F.softplus(-_score(stage, real, own)).mean() + (F.softplus(mismatched).mean() + F.softplus(generated).mean()) / 2
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["wrong_score"], mismatched.mean().detach())

    torch.manual_seed(1)
    losses = system.training_step(images, LABELS, player=f"generator{number}")
    torch.manual_seed(1)
    generated, kl = fake()
    torch.testing.assert_close(losses["loss"], F.softplus(-_score(stage, generated, own)).mean() + 0.5 * kl.mean())
    torch.testing.assert_close(losses["kl"], 0.5 * kl.mean().detach())


def _condition(embedding, low=None):
    return Condition(embedding, None, low)


def _score(stage, images, embedding):
    return stage.discriminator(images, embedding)[0]


def test_mismatched_label_is_another_class():
    system = small()
    for _ in range(20):
        wrong = system._mismatched(LABELS).argmax(1)
        assert (wrong != LABELS).all()


def test_given_embeddings():
    system = small(condition_dim=6)
    embeddings = torch.randn(4, 6)
    assert torch.equal(system._mismatched(embeddings), embeddings[[1, 2, 3, 0]])
    for player in system.players:
        system.training_step(torch.rand(4, 1, 8, 8), embeddings, player=player)
    assert system.sample(4, embeddings).shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"labels must be embeddings \[B, 6\], got None"):
        system.sample(4)
    with pytest.raises(TypeError, match=r"labels must be embeddings \[B, 6\], got torch.int64"):
        system.sample(4, LABELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_embeddings_may_have_another_dtype(dtype):
    system = small(condition_dim=6)
    embeddings = torch.randn(4, 6).to(dtype)
    for player in system.players:
        assert system.training_step(torch.rand(4, 1, 8, 8), embeddings, player=player)["loss"].dtype == torch.float32
    assert system.sample(4, embeddings).dtype == torch.float32
    assert small().double().embed(LABELS).dtype == torch.float64


def test_one_embedding_has_no_mismatch():
    with pytest.raises(ValueError, match=r"^StackGAN: a batch with embeddings must have at least 2 images, .* got 1"):
        small(condition_dim=6).training_step(torch.rand(1, 1, 8, 8), torch.randn(1, 6), player="discriminator1")


def test_scaled_one_hot_embeddings_are_labels():
    system = small()
    drawn = []
    for labels in (LABELS, F.one_hot(LABELS, 3) * 3**0.5, None, torch.tensor([0, 1, 2, 0])):
        torch.manual_seed(1)
        drawn.append(system.sample(4, labels))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])


def test_stages_train_in_sequence():
    system = small(stage1_share=0.25, instance_noise=1.0)
    images = torch.rand(4, 1, 8, 8)
    optimizers = system.optimizers()
    for progress, players, stage_progress in ((0.0, 1, 0.0), (0.2, 1, 0.8), (0.25, 2, 0.0), (0.625, 2, 0.5)):
        system.progress = progress
        assert system.players_at(0) == [f"discriminator{players}", f"generator{players}"]
        before = {name: value.clone() for name, value in system.stages[0].state_dict().items()}
        for player in system.players_at(0):
            step(system, optimizers, images, LABELS, player)
        assert system.stages[players - 1].progress == pytest.approx(stage_progress)
        changed = any(not torch.equal(value, before[name]) for name, value in system.stages[0].state_dict().items())
        assert changed == (players == 1)
        assert system.training


def test_state_dict_gives_the_same_samples():
    system, other = small(ema=0.9), small(ema=0.9)
    optimizers = system.optimizers()
    for player in system.players:
        step(system, optimizers, torch.rand(4, 1, 8, 8), LABELS, player)
    other.load_state_dict(system.state_dict())
    drawn = []
    for each in (system, other, small()):
        torch.manual_seed(3)
        drawn.append(each.sample(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_samples_match_their_class():
    """Trained on dark and bright images, samples are dark or bright according to their labels."""
    labels = torch.arange(16) % 2
    images = (0.1 + 0.8 * labels.float())[:, None, None, None].expand(16, 1, 8, 8).contiguous()
    system = small(num_classes=2, lr=4e-3, ema=0.9, kl_weight=0.0)
    optimizers = system.optimizers()
    for k in range(100):
        system.progress = k / 100
        for player in system.players_at(k):
            step(system, optimizers, images, labels, player)
    means = system.sample(32).mean((1, 2, 3))
    assert (means[1::2].mean() - means[0::2].mean()).item() > 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (1, 10, 8)}, "divisible by 4"),
        ({"image_shape": (1, 4, 8)}, "sides must be at least 8, got 4 x 8"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"condition_dim": 0}, "condition_dim must be at least 1"),
        ({"augmented_dim": 0}, "augmented_dim must be at least 1"),
        ({"kl_weight": -1.0}, "kl_weight must be a finite number, at least 0"),
        ({"width": 0}, "^StackGAN: width must be at least 1"),
        ({"stage1_share": 1.5}, r"stage1_share must be in \[0, 1\]"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, r"int64 labels \[B\] or embeddings \[B, 3\], got None"),
        (torch.tensor([0, 1, 2, 3]), ValueError, r"values 0 ... 2, got 0 ... 3"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, r"got shape \[4, 1\]"),
        (torch.zeros(4, 2), ValueError, r"got shape \[4, 2\]"),
        (torch.zeros(4, dtype=torch.int32), TypeError, "got torch.int32"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        small().training_step(torch.rand(4, 1, 8, 8), labels, player="generator1")


def test_bad_input():
    system = small()
    with pytest.raises(ValueError, match=r"StackGAN: images must have shape \[B, 1, 8, 8\], got \[2, 1, 8, 9\]"):
        system.training_step(torch.rand(2, 1, 8, 9), LABELS[:2], player="generator1")
    with pytest.raises(ValueError, match=r"player must be one of discriminator1, generator1, .*, got 'generator'"):
        system.training_step(torch.rand(4, 1, 8, 8), LABELS, player="generator")
    with pytest.raises(ValueError, match="labels must have length n, got 4 for n = 3"):
        system.sample(3, LABELS)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        system.sample(0)
