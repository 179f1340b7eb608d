# SPDX-License-Identifier: Apache-2.0
"""genperf.compat.torcheval against float64 arithmetic and, where it is installed, against torcheval."""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

import genperf
from genperf.compat.torcheval import STATES, FrechetInceptionDistance

DIM = 6


def features(count, seed, offset=0.0):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * (1 + seed) + offset


class Colors(nn.Module):
    """Features of images: mean colors of their halves."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, (2, 1)).flatten(1)


def filled(metric, real, fake, batch=64):
    for side, x in ((True, real), (False, fake)):
        for part in x.split(batch):
            assert metric.update(part, is_real=side) is metric
    return metric


def exact(real, fake):
    a, b = real.double(), fake.double()
    return genperf.frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).float()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_distance_of_features(offset):
    real, fake = features(200, 0, offset), features(150, 1, offset + 1)
    found = filled(FrechetInceptionDistance(feature_dim=DIM), real, fake).compute()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(real, fake), rtol=1e-5, atol=0)


def test_fewer_samples_than_features():
    real, fake = features(4, 0), features(5, 1)
    found = filled(FrechetInceptionDistance(feature_dim=DIM), real, fake).compute()
    torch.testing.assert_close(found, exact(real, fake), rtol=1e-5, atol=0)


def test_model_is_frozen_and_called_on_images():
    model = nn.Sequential(Colors(), nn.Linear(DIM, DIM), nn.Dropout())
    metric = FrechetInceptionDistance(model, DIM)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    real, fake = torch.rand(40, 3, 8, 8), torch.rand(30, 3, 8, 8) ** 2
    torch.testing.assert_close(filled(metric, real, fake).compute(), exact(model(real), model(fake)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(dtype):
    """Sums are those of float32 features of the same values, also where half precision would overflow."""
    real, fake = features(60, 0, 300.0).to(dtype), features(50, 1, 290.0).to(dtype)
    found = filled(FrechetInceptionDistance(feature_dim=DIM), real, fake).compute()
    torch.testing.assert_close(found, exact(real, fake), rtol=1e-5, atol=0)


def test_states_are_merged_copied_and_loaded():
    real, fake = features(90, 0), features(80, 1)
    whole = filled(FrechetInceptionDistance(feature_dim=DIM), real, fake)
    parts = [filled(FrechetInceptionDistance(feature_dim=DIM), real[i::3], fake[i::3]) for i in range(3)]
    before = copy.deepcopy(parts[1].state_dict())
    assert parts[0].merge_state(parts[1:]) is parts[0]
    torch.testing.assert_close(parts[0].compute(), whole.compute())
    assert all(torch.equal(before[name], value) for name, value in parts[1].state_dict().items())
    assert tuple(before) == STATES
    other = FrechetInceptionDistance(feature_dim=DIM)
    other.load_state_dict(whole.state_dict())
    other.update(real, is_real=True)
    assert whole.num_real_images == 90
    assert other.num_real_images == 180
    assert whole.reset() is whole
    assert not any(value.any() for value in whole.state_dict().values())
    assert other.to("cpu") is other


def test_state_that_does_not_fit_is_refused():
    metric = filled(FrechetInceptionDistance(feature_dim=DIM), features(9, 0), features(9, 1))
    before = metric.state_dict()
    for state, message in (
        ({**before, "real_sum": torch.zeros(3)}, r"real_sum must have shape \[6\], got \[3\]"),
        ({"real_sum": before["real_sum"] + 1}, "missing"),
        ({**before, "other": torch.zeros(1)}, "unexpected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            metric.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in metric.state_dict().items())
    metric.load_state_dict({"real_sum": before["real_sum"] + 1}, strict=False)
    torch.testing.assert_close(metric.real_sum, before["real_sum"] + 1)


def test_too_few_images():
    metric = FrechetInceptionDistance(feature_dim=DIM)
    with pytest.warns(RuntimeWarning, match="real and generated images"):
        assert metric.compute() == 0
    metric.update(features(1, 0), is_real=True).update(features(5, 0), is_real=False)
    with pytest.raises(RuntimeError, match="at least two real and two generated images, got 1 and 5"):
        metric.compute()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.update([1.0], True), "images must be a tensor, got 'list'"),
        (lambda m: m.update(torch.zeros(2, DIM), 1), "is_real must be True or False, got 1"),
        (lambda m: m.update(torch.zeros(2, 5), True), r"features must have shape \[N, 6\], got \[2, 5\]"),
        (lambda m: m.update(torch.zeros(6), True), r"features must have shape \[N, 6\], got \[6\]"),
        (lambda m: FrechetInceptionDistance(Colors(), DIM).update(torch.zeros(2, 4, 8, 8), True), r"images must have shape \[N, 3, H, W\]"),
    ],
)
def test_bad_arguments(call, message):
    metric = FrechetInceptionDistance(feature_dim=DIM)
    with pytest.raises(ValueError, match=message):
        call(metric)
    assert not metric.num_real_images
    with pytest.raises(RuntimeError, match="feature_dim must be a positive integer, got 0"):
        FrechetInceptionDistance(feature_dim=0)


@pytest.mark.skipif(importlib.util.find_spec("torcheval") is None, reason="needs torcheval")
def test_matches_torcheval(monkeypatch):
    fid = importlib.import_module("torcheval.metrics.image.fid")
    monkeypatch.setattr(fid, "_TORCHVISION_AVAILABLE", True)  # which a model of one's own does not need
    real, fake = torch.rand(80, 3, 8, 8), torch.rand(70, 3, 8, 8) ** 2
    theirs, ours = (filled(each(Colors(), DIM), real, fake) for each in (fid.FrechetInceptionDistance, FrechetInceptionDistance))
    torch.testing.assert_close(ours.compute(), theirs.compute(), rtol=1e-3, atol=1e-5)
    for target, source in ((theirs, ours), (ours, theirs)):
        before = source.compute()
        target.reset()
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.compute(), before, rtol=1e-3, atol=1e-5, check_dtype=False)
        target.update(real, is_real=True)
    toolkit = importlib.import_module("torcheval.metrics.toolkit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(toolkit.sync_and_compute(ours), ours.compute())
    assert isinstance(ours, importlib.import_module("torcheval.metrics.metric").Metric)
