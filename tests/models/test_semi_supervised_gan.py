# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from genperf import sample_offset
from genperf.models.semi_supervised_gan import SemiSupervisedGAN, SemiSupervisedGANConfig

SETTINGS = {
    "image_shape": (1, 8, 8),
    "num_classes": 3,
    "labels_per_class": 2,
    "labelled_batch": 4,
    "width": 16,
    "latent_dim": 4,
}


def small(**changes):
    torch.manual_seed(0)
    return SemiSupervisedGAN(SemiSupervisedGANConfig(**{**SETTINGS, **changes}))


def data(shape=(1, 8, 8), n=24):
    """Images of three classes, each with a bright bar at another place, and noise."""
    labels = torch.arange(n) % 3
    images = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * 0.5
    for k in range(3):
        images[labels == k, :, 2 * k : 2 * k + 2] += 0.5
    return images, labels


def prepared(**changes):
    system = small(**changes)
    system.prepare(*data(system.config.image_shape))
    return system


def train(system, steps, batch=12):
    images, labels = data(system.config.image_shape)
    optimizers = system.optimizers()
    for step in range(steps):
        system.progress = step / steps
        for player in system.players_at(step):
            system.zero_grad(set_to_none=True)
            system.training_step(images[:batch], labels[:batch], player=player)["loss"].backward()
            optimizers[player].step()
            system.step_done(player)


def test_prepare_keeps_labels_per_class():
    images, labels = data()
    kept = {}
    for seed in (0, 0, 1):
        system = small(label_seed=seed)
        same, shown = system.prepare(images, labels)
        assert same is images
        known = shown >= 0
        assert torch.equal(shown[known], labels[known])
        assert (shown[~known] == -1).all()
        assert system.labels.bincount().tolist() == [2, 2, 2]
        for image, label in zip(system.labelled_images, system.labels, strict=True):
            assert any(torch.equal(image, other) for other in images[known & (labels == label)])
        assert torch.equal(kept.setdefault(seed, known), known)
        assert "labels" not in system.state_dict()
    assert not torch.equal(kept[0], kept[1])


def test_class_without_images():
    images, labels = data()
    system = small(num_classes=4)
    system.prepare(images, labels + (labels == 2))
    assert system.labels.bincount().tolist() == [2, 2, 0, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"labels must be int64 \[24\], got None"),
        (torch.zeros(23, dtype=torch.int64), r"labels must be int64 \[24\], got torch.int64 \[23\]"),
        (torch.zeros(24), r"labels must be int64 \[24\], got torch.float32 \[24\]"),
        (torch.arange(24) % 4, "labels must be 0 ... 2, got 0 ... 3"),
        (torch.arange(24) // 23, "each class must have at least 2 images, got 1"),
    ],
)
def test_prepare_bad_arguments(labels, message):
    system = small()
    with pytest.raises(ValueError, match=message):
        system.prepare(data()[0], labels)
    assert system.labels is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12)])
def test_shapes(shape):
    system = prepared(image_shape=shape)
    images = system.sample(5)
    assert images.shape == (5, *shape)
    assert images.min() >= 0
    assert images.max() <= 1
    assert system.classify(images).shape == (5, 3)
    assert system.training
    for player in system.players:
        assert system.training_step(images, player=player)["loss"].shape == ()


def test_losses_match_plain_pytorch():
    system = prepared(labelled_batch=6).eval()  # no noise on layers, batch normalization with running statistics
    images, _ = data()
    real = images[:5] * 2 - 1

    def logits(x):
        return system.discriminator.classify(x)[0]

    torch.manual_seed(2)
    losses = system.training_step(images[:5], player="discriminator")
    torch.manual_seed(2)
    d_real, d_fake = logits(real).logsumexp(1), logits(system.generator(system._noise(5))).logsumexp(1)
    cross_entropy = F.cross_entropy(logits(system.labelled_images * 2 - 1), system.labels)
    # K + 1 classes; the last one, of generated images, has logit 0.
    p_real = torch.cat([logits(real), torch.zeros(5, 1)], 1).softmax(1)[:, :-1].sum(1)
    torch.testing.assert_close(torch.sigmoid(d_real), p_real)
    torch.testing.assert_close(losses["cross_entropy"], cross_entropy.detach())
    torch.testing.assert_close(losses["loss"], cross_entropy + F.softplus(-d_real).mean() + F.softplus(d_fake).mean())

    torch.manual_seed(2)
    losses = system.training_step(images[:5], player="generator")
    torch.manual_seed(2)
    features = [system.discriminator(x)[1].mean(0) for x in (real, system.generator(system._noise(5)))]
    torch.testing.assert_close(losses["loss"], (features[0] - features[1]).square().sum())


def test_labels_only_train_the_discriminator_only():
    system = prepared(unlabelled=False)
    assert tuple(system.players_at(0)) == ("discriminator",)
    losses = system.training_step(data()[0], player="discriminator")
    assert losses.keys() == {"loss", "cross_entropy"}
    assert torch.equal(losses["loss"].detach(), losses["cross_entropy"])


@pytest.mark.parametrize("player", SemiSupervisedGAN.players)
@pytest.mark.parametrize("changes", [{}, {"penalty": "r1", "instance_noise": 0.1, "adversarial_weight": 1.0, "label_smoothing": 0.1}])
def test_gradients_reach_the_player_only(player, changes):
    system = prepared(**changes)
    system.training_step(data()[0], player=player)["loss"].backward()
    reached = {name for name, parameter in system.named_parameters() if parameter.grad is not None}
    own = {name for name, _ in system.named_parameters() if name.startswith(f"{player}.")}
    assert reached == own


def test_every_rank_draws_the_same_labeled_batch():
    system = prepared()
    drawn = []
    for first in (0, 7):
        torch.manual_seed(5)
        with sample_offset(first):
            drawn.append(system._cross_entropy())
    assert torch.equal(*drawn)


@pytest.mark.parametrize("unlabelled", [True, False])
def test_learns_to_classify(unlabelled):
    system = prepared(unlabelled=unlabelled, width=32, lr=5e-3, input_noise=0.1, labelled_batch=6)
    images, labels = data()
    train(system, 40)
    assert (system.classify(images).argmax(1) == labels).float().mean() > 0.9


def test_state_dict_gives_the_same_results():
    system, other = prepared(ema=0.9), small(ema=0.9)
    train(system, 3)
    other.load_state_dict(system.state_dict())
    images = data()[0]
    assert torch.equal(system.classify(images), other.classify(images))
    assert not torch.equal(system.classify(images), small().classify(images))
    drawn = []
    for each in (system, other):
        torch.manual_seed(3)
        drawn.append(each.sample(4))
    assert torch.equal(*drawn)


def test_averaged_weights_classify():
    system = prepared(classifier_ema=0.5)
    images = data()[0]
    train(system, 3)
    averaged = system.classify(images)
    assert torch.equal(averaged, system.classify(images))
    system.classifier = None
    assert not torch.equal(averaged, system.classify(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"labels_per_class": 0}, "labels_per_class must be at least 1"),
        ({"labelled_batch": 0}, "labelled_batch must be at least 1"),
        ({"input_noise": -0.1}, "input_noise must be a finite number, at least 0, got -0.1"),
        ({"classifier_ema": 1.0}, r"classifier_ema must be in \[0, 1\)"),
        ({"feature_matching": 0.0}, "adversarial_weight or feature_matching must be above 0"),
        ({"minibatch_kernels": 3}, "minibatch_kernels must be 0"),
        ({"penalty": "finite-difference"}, "penalty must .* got 'finite-difference'"),
        ({"input_noise": float("nan")}, "input_noise must be .*, got nan"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_bad_input():
    system = small()
    with pytest.raises(RuntimeError, match=r"prepare\(images, labels\) must be called before the first training step"):
        system.training_step(torch.rand(2, 1, 8, 8), player="discriminator")
    with pytest.raises(ValueError, match=r"images must have shape \[B, 1, 8, 8\], got \[2, 1, 8, 9\]"):
        system.classify(torch.rand(2, 1, 8, 9))
    with pytest.raises(ValueError, match="labels must be None"):
        system.sample(2, torch.zeros(2, dtype=torch.int64))
