# SPDX-License-Identifier: Apache-2.0
import math
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

import genperf
from genperf._choices import Corruption
from genperf.models.anomaly_detector import AnomalyDetector
from genperf.models.autoencoder import Autoencoder, latent_plane
from genperf.models.denoising_autoencoder import DenoisingAutoencoder
from genperf.models.system import standard_normal

SYSTEMS = (Autoencoder, DenoisingAutoencoder, AnomalyDetector)


def small(system, **changes):
    torch.manual_seed(0)
    return system(system.Config(**{"image_shape": (1, 8, 8), "hidden": 8, "dim": 4, **changes}))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12)])
def test_shapes_and_modes(system, shape):
    model = small(system, image_shape=shape).train()
    images = torch.rand(2, *shape)
    codes = model.encode(images)
    assert codes.shape == (2, 4)
    decoded = model.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert not decoded.requires_grad
    assert torch.equal(model.reconstruct(images), decoded)
    assert model.training


@pytest.mark.parametrize("system", SYSTEMS)
def test_loss_and_gradients(system):
    model = small(system)
    images = torch.rand(4, 1, 8, 8)
    torch.manual_seed(3)
    losses = model.training_step(images)
    torch.manual_seed(3)
    seen = images if system is Autoencoder else model.corrupt(images)
    torch.testing.assert_close(losses["loss"], (model.decoder(model.encode(seen)) - images).square().mean())
    losses["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("system", SYSTEMS)
def test_learning(system):
    model = small(system, lr=1e-2)
    images = torch.rand(8, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = model.optimizers()["model"]
    losses = []
    for _ in range(60):
        losses.append(model.training_step(images)["loss"])
        model.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("noise", get_args(Corruption))
def test_noise_of_a_split_batch(noise):
    model = small(DenoisingAutoencoder, noise=noise)
    images = torch.rand(4, 1, 8, 8)
    torch.manual_seed(3)
    whole = model.corrupt(images)
    shares = []
    for first in (0, 2):
        torch.manual_seed(3)
        with genperf.sample_offset(first):
            shares.append(model.corrupt(images[first : first + 2]))
    torch.testing.assert_close(torch.cat(shares), whole)
    assert not torch.equal(model.corrupt(images), whole)


def test_corrupt_matches_its_formula():
    images = torch.rand(2, 1, 8, 8)
    torch.manual_seed(3)
    noise = standard_normal(2, 1, 8, 8, device="cpu")
    torch.manual_seed(3)
    assert torch.equal(small_corrupt("gaussian", 0.3, images), (images + 0.3 * noise).clamp(0, 1))


@pytest.mark.parametrize(("noise", "dark", "light"), [("masking", 0.3, 0.0), ("salt-and-pepper", 0.15, 0.15)])
def test_fraction_of_changed_pixels(noise, dark, light):
    images = torch.full((200, 3, 8, 8), 0.5)
    changed = small_corrupt(noise, 0.3, images)
    # 38400 pixels: 5 standard deviations are 0.012.
    assert abs((changed == 0).float().mean().item() - dark) < 0.012
    assert abs((changed == 1).float().mean().item() - light) < 0.012
    assert ((changed == 0.5) | (changed == 0) | (changed == 1)).all()
    assert torch.equal(small_corrupt(noise, 0.0, images), images)
    assert not (small_corrupt(noise, 1.0, images) == 0.5).any()


def small_corrupt(noise, level, images):
    state = torch.get_rng_state()
    model = small(DenoisingAutoencoder, image_shape=tuple(images.shape[1:]), noise=noise, level=level)
    torch.set_rng_state(state)
    return model.corrupt(images)


def test_denoise_reconstructs():
    model = small(DenoisingAutoencoder)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(model.denoise(images), model.reconstruct(images))


def test_latent_plane_spans_the_principal_components():
    # Standard deviations 3, 2 and nearly 0 along the axes.
    codes = torch.randn(500, 3)
    codes = (codes - codes.mean(0)) * torch.tensor([2.0, 0.01, 3.0]) + torch.tensor([5.0, 6.0, 7.0])
    plane = latent_plane(codes, 5).reshape(5, 5, 3)
    torch.testing.assert_close(plane[2, 2], codes.mean(0), atol=1e-4, rtol=0)
    down, along = plane[0, 2] - plane[4, 2], plane[2, 4] - plane[2, 0]
    assert abs(down @ along) < 1e-3
    for step, variance in zip((down, along), torch.linalg.eigvalsh(codes.T.cov()).flip(0), strict=False):
        torch.testing.assert_close(step.norm(), 4 * variance.sqrt(), rtol=1e-3, atol=0)
    assert down[2] > 10
    assert along[0] > 6
    torch.testing.assert_close(latent_plane(codes, 1), codes.mean(0, keepdim=True))


def test_latent_grid():
    model = small(Autoencoder, dim=2)
    images = torch.rand(5, 1, 8, 8)
    grid = model.latent_grid(3, images)
    assert grid.shape == (9, 1, 8, 8)
    torch.testing.assert_close(grid[4:5], model.decode(model.encode(images).mean(0, keepdim=True)))


@pytest.mark.parametrize(("codes", "n", "message"), [((2, 4), 3, "at least 3"), ((5, 1), 3, "at least 3"), ((5, 2), 0, "n must be")])
def test_latent_plane_bad_arguments(codes, n, message):
    with pytest.raises(ValueError, match=message):
        latent_plane(torch.rand(codes), n)


def test_prepare_keeps_the_normal_class():
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0, 1])
    model = small(AnomalyDetector, normal_class=1)
    kept, kept_labels = model.prepare(images, labels)
    assert torch.equal(kept, images[[1, 3, 5]])
    assert kept_labels.tolist() == [1, 1, 1]
    assert small(AnomalyDetector).prepare(images, None)[0] is images
    with pytest.raises(ValueError, match="needs labels"):
        model.prepare(images, None)
    with pytest.raises(ValueError, match=r"got 7 among \[0, 1, 2\]"):
        small(AnomalyDetector, normal_class=7).prepare(images, labels)


def test_threshold():
    model = small(AnomalyDetector)
    images = torch.rand(300, 1, 8, 8)
    with pytest.raises(RuntimeError, match="fit_threshold"):
        model.is_anomaly(images)
    scores = model.anomaly_score(images)
    torch.testing.assert_close(scores, F.mse_loss(model.reconstruct(images), images, reduction="none").mean((1, 2, 3)))
    for quantile, share in ((0.9, 0.1), (1.0, 0.0)):
        threshold = model.fit_threshold(images, quantile=quantile)
        torch.testing.assert_close(threshold, scores.quantile(quantile))
        assert model.is_anomaly(images).float().mean() == pytest.approx(share)
    for quantile in (1.1, math.nan):
        with pytest.raises(ValueError, match="quantile must lie"):
            model.fit_threshold(images, quantile=quantile)
    with pytest.raises(ValueError, match="must not be empty"):
        model.fit_threshold(images[:0])
    assert model.threshold == scores.max()


def test_state_dict_includes_the_threshold():
    model, images = small(AnomalyDetector), torch.rand(5, 1, 8, 8)
    model.fit_threshold(images, quantile=0.5)
    other = AnomalyDetector(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.anomaly_score(images), model.anomaly_score(images))
    assert torch.equal(other.is_anomaly(images), model.is_anomaly(images))


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        (Autoencoder, {"image_shape": (1, 10, 8)}, "Autoencoder: images must have at least 1 channel and sides divisible by 4"),
        (DenoisingAutoencoder, {"hidden": 7}, "DenoisingAutoencoder: hidden must be a positive even number, got 7"),
        (AnomalyDetector, {"hidden": 0}, "AnomalyDetector: hidden must be at least 1, got 0"),
        (AnomalyDetector, {"image_shape": (0, 8, 8)}, "AnomalyDetector: images must have"),
        (Autoencoder, {"dim": 0}, "dim must be at least 1"),
        (DenoisingAutoencoder, {"noise": "poisson"}, "noise must be one of gaussian, .* got 'poisson'"),
        (DenoisingAutoencoder, {"level": -0.1}, "level must be a finite number"),
        (DenoisingAutoencoder, {"level": math.nan}, "level must be a finite number"),
        (DenoisingAutoencoder, {"noise": "masking", "level": 1.5}, "at most 1"),
    ],
)
def test_bad_config(system, changes, message):
    with pytest.raises(ValueError, match=message):
        small(system, **changes)


@pytest.mark.parametrize("system", [Autoencoder, DenoisingAutoencoder, AnomalyDetector])
def test_unknown_player(system):
    with pytest.raises(ValueError, match=f"^{system.__name__}: player must be one of model, got 'prior'"):
        small(system).training_step(torch.rand(2, 1, 8, 8), player="prior")


@pytest.mark.parametrize("method", ["training_step", "encode", "reconstruct", "corrupt", "anomaly_score"])
@pytest.mark.parametrize("shape", [(2, 1, 8, 12), (2, 3, 8, 8), (1, 8, 8)])
def test_bad_images(method, shape):
    with pytest.raises(ValueError, match=r"images must have shape \[B, 1, 8, 8\], got \["):
        getattr(small(AnomalyDetector), method)(torch.rand(shape))
    with pytest.raises(TypeError, match=r"^AnomalyDetector: images must be floats in \[0, 1\], got torch.uint8"):
        getattr(small(AnomalyDetector), method)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
