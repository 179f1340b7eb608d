# SPDX-License-Identifier: Apache-2.0
import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import genperf
from genperf.metrics import FeatureMoments, FrechetDistance, FrechetReference, load_statistics, save_statistics
from genperf.testing import largest_allocation


def distance(x, y, unbiased=True):
    """The definition, in float64 by eigenvalues of the product."""
    x, y = x.cpu().double(), y.cpu().double()
    cov1, cov2 = (torch.cov(t.T, correction=int(unbiased)) for t in (x, y))
    roots = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + cov1.trace() + cov2.trace() - 2 * roots)


def features(count, dim, seed, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return ((torch.randn(count, dim, generator=generator) @ mix).relu() + 0.1 * seed).to(device, dtype)


class Pooled(nn.Module):
    """An extractor that returns noise in training mode."""

    def __init__(self, wrap=None):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(3)
        self.wrap = wrap

    def forward(self, images):
        found = self.norm(self.drop(images))
        return found if self.wrap is None else self.wrap(found)


@pytest.mark.parametrize("count", [12, 200])
@pytest.mark.parametrize("unbiased", [True, False])
def test_reference_from_features_matches_that_from_moments(count, unbiased, device):
    real, fake = features(count, 20, 1, device), features(90, 20, 2, device)
    reference = FrechetReference.from_features(real, unbiased=unbiased)
    moments, fakes = (FeatureMoments(unbiased=unbiased).update(x) for x in (real, fake))
    other = FrechetReference.from_moments(moments.mean, moments.cov)
    for found in (reference, other):
        assert (found.dim, found.dtype, found.device.type) == (20, torch.float64, device)
        torch.testing.assert_close(found.mean, moments.mean)
        torch.testing.assert_close(found.cov, moments.cov, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(found.factor @ found.factor.T, moments.cov, atol=1e-12, rtol=1e-10)
        expected = distance(real, fake, unbiased)
        assert float(found.distance(fakes.mean, fakes.cov)) == pytest.approx(expected, rel=1e-6)
        assert float(found.distance_to_features(fake, unbiased=unbiased)) == pytest.approx(expected, rel=1e-6)
        assert float(found.distance_to_features(fake[:7], unbiased=unbiased)) == pytest.approx(distance(real, fake[:7], unbiased), rel=1e-6)


def test_centered_features_serve_as_factor():
    reference = FrechetReference.from_features(features(6, 400, 1))
    assert reference.factor.shape == (400, 5)
    batch = features(5, 400, 2)
    square = 400 * 400 * 8
    assert largest_allocation(lambda: FrechetReference.from_features(batch)) < square / 4
    assert largest_allocation(lambda: reference.distance_to_features(batch)) < square / 4
    assert reference.cov.shape == (400, 400)


class Large(TorchDispatchMode):
    """Records every result of at least `nbytes` that owns its memory."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.found = nbytes, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.nbytes:
            self.found[result.untyped_storage().data_ptr()] = result
        return result


def test_many_features_are_copied_once():
    reference = FrechetReference.from_features(features(60, 4, 1))
    batch = features(2000, 4, 2, dtype=torch.float64)
    with Large(batch.nbytes // 2) as large:
        reference.distance_to_features(batch)
    large.found.pop(batch.untyped_storage().data_ptr(), None)
    assert len(large.found) == 1


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_distance_to_features_has_gradients(count, shape, device):
    reference = FrechetReference.from_features(features(60, 6, 1, device))
    x = features(count * int(np.prod(shape)), 6, 2, device, torch.float64).reshape(count, *shape, 6).movedim(-1, 1).requires_grad_()
    assert torch.autograd.gradcheck(reference.distance_to_features, (x,))
    half = x.detach().bfloat16().requires_grad_()
    reference.distance_to_features(half).backward()
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.isfinite().all()


def test_coinciding_samples_have_finite_gradients(device):
    reference = FrechetReference.from_features(features(60, 6, 1, device))
    for count in (1, 2, 9):
        x = torch.ones(count, 6, device=device, requires_grad=True)
        value = reference.distance_to_features(x, unbiased=False)
        expected = (reference.mean - 1).square().sum() + reference.cov.trace()
        torch.testing.assert_close(value, expected)
        assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_distance_has_gradients(device):
    reference = FrechetReference.from_features(features(60, 4, 1, device))
    moments = FeatureMoments().update(features(30, 4, 2, device))
    mean, root = moments.mean.requires_grad_(), torch.linalg.cholesky(moments.cov).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, r: reference.distance(m, r @ r.T), (mean, root))
    assert reference.distance(mean.detach().float(), moments.cov.float()).dtype == torch.float64


def test_reference_to_device_and_dtype(device):
    reference = FrechetReference.from_features(features(60, 5, 1))
    moved = reference.to(device, torch.float32)
    assert (moved.dtype, moved.device.type, reference.dtype) == (torch.float32, device, torch.float64)
    x = features(30, 5, 2, device)
    found = moved.distance_to_features(x)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(reference.to(device).distance_to_features(x)), rel=1e-4)
    assert "dim=5, rank=5" in repr(reference)


@pytest.mark.parametrize("count", [4, 50])
def test_save_and_load(count, tmp_path):
    reference = FrechetReference.from_features(features(count, 8, 1))
    path = tmp_path / "reference.npz"
    reference.save(path)
    loaded = FrechetReference.load(path)
    for found, expected in zip((loaded.mean, loaded.cov, loaded.factor), (reference.mean, reference.cov, reference.factor), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    with np.load(path) as arrays:
        assert set(arrays.files) == {"mu", "sigma", "factor"}
        assert arrays["sigma"].dtype == np.float64
    mean, cov = load_statistics(path)
    save_statistics(tmp_path / "plain.npz", mean, cov)
    x = features(20, 8, 2)
    plain = FrechetReference.load(str(tmp_path / "plain.npz"))
    assert float(plain.distance_to_features(x)) == pytest.approx(float(reference.distance_to_features(x)), rel=1e-9)


def test_factor_of_another_covariance_raises(tmp_path):
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3), factor=np.eye(3) * 1.01)
    with pytest.raises(ValueError, match=r"wrong.npz must hold a factor \[d, r\] of its sigma"):
        FrechetReference.load(tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match=r"must end in .npz, got 'a.pt'"):
        FrechetReference.from_moments(np.zeros(3), np.eye(3)).save("a.pt")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: FrechetReference(torch.zeros(3), None, torch.zeros(2, 3)), ValueError, r"got mean \[3\], factor \[2, 3\]"),
        (
            lambda r: FrechetReference(torch.zeros(3), None, torch.zeros(3, 3).to("meta")),
            ValueError,
            "one device, got mean cpu, factor meta",
        ),
        (lambda r: FrechetReference(torch.zeros(3).half(), None, torch.zeros(3, 3).half()), TypeError, "float64, or float32"),
        (lambda r: FrechetReference(torch.zeros(3), None, torch.zeros(3, 3).double()), TypeError, "as the others are"),
        (lambda r: FrechetReference.from_moments(torch.zeros(3), torch.eye(2)), ValueError, r"\[d\] and \[d, d\], got \[3\] and \[2, 2\]"),
        (lambda r: FrechetReference.from_moments(torch.zeros(2), torch.tensor([[1.0, 1], [0, 1]])), ValueError, "must be symmetric"),
        (lambda r: FrechetReference.from_features(torch.zeros(1, 3)), ValueError, "needs at least 2 samples, got 1"),
        (lambda r: r.distance_to_features(torch.zeros(1, 3)), ValueError, "needs at least 2 samples, got 1"),
        (lambda r: r.distance_to_features(torch.zeros(4, 2)), ValueError, r"\[N, 3\] or \[B, 3, H, W\], got \[4, 2\]"),
        (lambda r: r.distance_to_features(torch.zeros(4, 3, dtype=torch.int64)), TypeError, "got torch.int64"),
    ],
)
def test_bad_input_of_the_reference(call, error, message):
    with pytest.raises(error, match=message):
        call(FrechetReference.from_features(features(9, 3, 1)))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("fake_count", [6, 150])
def test_metric_matches_the_distance_of_all_samples(unbiased, fake_count, device):
    real, fake = features(160, 12, 1, device), features(fake_count, 12, 2, device)
    metric = FrechetDistance(unbiased=unbiased)
    for batch in real.split(50):
        metric.update(batch, real=True)
    for batch in fake.split(33):
        metric.update(batch, False)
    value = metric.compute()
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(distance(real, fake, unbiased), rel=1e-6)
    assert float(metric.compute(impl="reference")) == pytest.approx(float(value), rel=1e-6)


def test_same_samples_have_distance_zero(device):
    metric = FrechetDistance()
    for real in (True, False):
        metric.update(features(50, 12, 1, device), real=real)
    assert 0 <= float(metric.compute()) < 1e-10


@pytest.mark.parametrize("kind", ["object", "path"])
def test_reference_in_place_of_real_samples(kind, tmp_path, device):
    real, fake = features(160, 12, 1), features(80, 12, 2, device)
    reference = FrechetReference.from_features(real)
    reference.save(tmp_path / "reference.npz")
    metric = FrechetDistance(reference=reference if kind == "object" else tmp_path / "reference.npz")
    metric.update(fake, real=False)
    assert float(metric.compute()) == pytest.approx(distance(real, fake), rel=1e-6)
    with pytest.raises(ValueError, match="got an update with real=True"):
        metric.update(fake, real=True)
    with pytest.raises(ValueError, match="must have 12 dimensions"):
        metric.update(fake[:, :5], real=False)
    other = FrechetDistance()
    other.update(real, real=True)
    with pytest.raises(ValueError, match="are those of the reference, got 160 to merge"):
        metric.merge(other)
    with pytest.raises(RuntimeError, match="are those of the reference, got a state with 160"):
        metric.load_state_dict(other.state_dict())


@pytest.mark.parametrize("wrap", [None, lambda x: [x], lambda x: (x.mean((2, 3)),)])
def test_extractor_runs_in_evaluation_mode_without_gradients(wrap, device):
    extractor = Pooled(wrap).to(device)
    extractor.norm.eval()
    images = torch.randn(40, 3, 4, 4, device=device)
    metric = FrechetDistance(extractor)
    metric.update(images.clone().requires_grad_(), real=True)
    metric.update(images + 1, real=False)
    pooled = (images / (1 + extractor.norm.eps) ** 0.5).mean((2, 3))
    assert float(metric.compute()) == pytest.approx(distance(pooled, pooled + 1 / (1 + extractor.norm.eps) ** 0.5), rel=1e-5)
    assert extractor.drop.training
    assert not extractor.norm.training, "every submodule keeps its mode"
    assert all(key.startswith(("real.", "fake.")) for key in metric.state_dict())


def test_extractor_modes_after_an_error_and_device(device):
    extractor = Pooled()
    metric = FrechetDistance(extractor).to(device)
    assert extractor.norm.weight.device.type == device
    metric.eval()
    assert extractor.training, "train() and eval() of the metric must not reach the extractor"
    with pytest.raises(RuntimeError):
        metric.update(torch.zeros(2, 5, 3, 3, device=device), real=True)
    assert extractor.drop.training


def test_extractor_of_floats_and_bytes():
    metric = FrechetDistance(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    with pytest.raises(RuntimeError, match=r"^FrechetDistance: the extractor must take x as it is, got torch.uint8 .*; many take floats"):
        metric.update(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), real=True)
    assert metric.real.count == 0
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):  # as it is
        metric.update(torch.zeros(4, 3, 2, 3), real=True)


def test_extractor_with_several_outputs_raises():
    metric = FrechetDistance(lambda x: [x, x])
    with pytest.raises(ValueError, match="must return one tensor of features, got 2 outputs"):
        metric.update(torch.zeros(2, 3), real=True)
    with pytest.raises(TypeError, match="extractor must be None or callable, got int"):
        FrechetDistance(64)


@pytest.mark.parametrize("reset_real", [True, False])
def test_reset(reset_real):
    real, fake = features(50, 4, 1), features(50, 4, 2)
    metric = FrechetDistance(reset_real=reset_real)
    metric.update(real, real=True)
    metric.update(real, real=False)
    metric.reset()
    assert metric.fake.count == 0
    assert metric.real.count == (0 if reset_real else 50)
    if reset_real:
        metric.update(real, real=True)
    metric.update(fake, real=False)
    assert float(metric.compute()) == pytest.approx(distance(real, fake), rel=1e-6)


def test_merge_and_state_dict():
    real, fake = features(60, 4, 1), features(70, 4, 2)
    parts = [FrechetDistance() for _ in range(3)]
    for i, part in enumerate(parts):
        part.update(real[i::3], real=True)
        if i:
            part.update(fake[i - 1 :: 2], real=False)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    file = io.BytesIO()
    torch.save(parts[0].state_dict(), file)
    file.seek(0)
    resumed = FrechetDistance()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for metric in (parts[0], resumed, copy.deepcopy(resumed)):
        assert float(metric.compute()) == pytest.approx(distance(real, fake), rel=1e-6)
    other = FrechetDistance()
    other.update(torch.zeros(2, 5), real=False)
    with pytest.raises(ValueError, match="merged features must have one dimension, got 4 and 5"):
        parts[0].merge(other)
    assert parts[0].real.count == 60
    with pytest.raises(TypeError, match="only the same metric can be merged"):
        parts[0].merge(genperf.metrics.PrecisionRecall())


def test_too_few_samples_and_bad_updates():
    metric = FrechetDistance()
    with pytest.raises(ValueError, match="needs at least 2 real samples, got 0"):
        metric.compute()
    metric.update(torch.randn(4, 3), real=True)
    metric.update(torch.randn(1, 3), real=False)
    with pytest.raises(ValueError, match="needs at least 2 generated samples, got 1"):
        metric.compute()
    with pytest.raises(ValueError, match="must have 3 dimensions like those before, got 4"):
        metric.update(torch.randn(4, 4), real=False)
    with pytest.raises(TypeError, match="real must be True or False, got 1"):
        metric.update(torch.randn(4, 3), real=1)
    assert (metric.real.count, metric.fake.count) == (4, 1)
    with pytest.raises(ValueError, match="must be that of the reference, 3, got 4"):
        FrechetDistance(reference=FrechetReference.from_features(torch.randn(9, 3)), dim=4)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing.npz"):
        FrechetDistance(reference="missing.npz")
