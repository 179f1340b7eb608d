# SPDX-License-Identifier: Apache-2.0
"""Scores of systems against their formulas."""

import numpy as np
import pytest
import stand_in_systems
import torch
from stand_in_systems import (
    Anomalies,
    Base,
    Classifying,
    Collapsed,
    Conditional,
    Denoising,
    Diverged,
    Generating,
    Indices,
    Likelihood,
    NoPrior,
    Reconstructing,
    TwoLevels,
)

from genperf._errors import UserError
from genperf.training.data import LabeledImages
from genperf.training.evaluation import anchors, area_under_roc, class_labels, evaluate

_few_steps, data, classifier = stand_in_systems._few_steps, stand_in_systems.data, stand_in_systems.classifier


def test_scores_match_their_formulas(data):
    _, held_out = data
    images = held_out.images
    mse = (0.25 * images.double().square()).mean().item()
    assert evaluate(Reconstructing(), *data) == pytest.approx({"mse": mse, "psnr": -10 * np.log10(mse)})
    scores = evaluate(Denoising(), *data, batch_size=7)
    assert scores["psnr_noisy"] == pytest.approx(-10 * np.log10(0.25))
    assert scores["psnr_denoised"] == pytest.approx(-10 * np.log10((0.05 - 0.9 * images.double()).square().mean().item()))
    assert scores["psnr_gain"] == scores["psnr_denoised"] - scores["psnr_noisy"]
    assert evaluate(Likelihood(), *data)["negative_elbo"] == pytest.approx(images.sum((1, 2, 3)).mean().item(), abs=1)
    share = images.gt(0.5).double().mean().item()
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert evaluate(Indices(), *data) == pytest.approx({"perplexity": np.exp(entropy), "codes_used": 2})
    scores = evaluate(TwoLevels(), *data, batch_size=3)
    assert list(scores) == ["perplexity_top", "codes_used_top", "perplexity_bottom", "codes_used_bottom"]
    assert scores["perplexity_bottom"] == pytest.approx(np.exp(entropy))
    scores = evaluate(Classifying(), *data, samples=0)
    assert scores["accuracy"] == pytest.approx((held_out.labels == 0).double().mean().item())
    assert scores["error"] == pytest.approx(1 - scores["accuracy"])
    assert evaluate(Base(), *data) == {}


def test_perfect_reconstructions(data):
    system = Reconstructing()
    system.factor.data.fill_(1)
    assert evaluate(system, *data) == {"mse": 0, "psnr": float("inf")}


def test_anomalies(data):
    training, held_out = data
    scores = evaluate(Anomalies(), *data)
    others = held_out.labels[held_out.labels != 1]
    # Class 3 scores above class 1; class 0 scores like class 1, up to noise.
    expected = ((others == 3).sum() + 0.5 * (others == 0).sum()) / len(others)
    assert scores["auroc"] == pytest.approx(expected.item(), abs=0.2)
    assert scores["auroc"] > (others == 3).double().mean()
    normal = held_out.images[held_out.labels == 1]
    assert scores["mse"] == pytest.approx((0.25 * normal.double().square()).mean().item())
    for labels in (None, torch.ones_like(held_out.labels), torch.zeros_like(held_out.labels)):
        assert "auroc" not in evaluate(Anomalies(), training, LabeledImages(held_out.images, labels))


def test_area_under_roc_counts_pairs():
    scores = torch.tensor([0.1, 0.4, 0.4, 0.4, 0.9, 0.2, 0.9])
    positive = torch.tensor([False, True, False, True, True, True, False])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))
    assert area_under_roc(torch.arange(7.0), torch.arange(7) > 3) == 1
    assert area_under_roc(torch.zeros(7), torch.arange(7) > 3) == 0.5


def test_class_labels_keep_the_distribution():
    labels = torch.tensor([3, 0, 0, 1, 0, 3])
    assert class_labels(12, labels).bincount().tolist() == [6, 2, 0, 4]
    assert class_labels(3, labels).tolist() == [0, 0, 3]


def test_samples_of_the_data_score_well(data, classifier):
    training, _ = data
    good = evaluate(Generating(), *data, samples=400, classifier=classifier)
    assert list(good) == ["fid", "coverage", "class_kl", "duplicates"]
    assert good["coverage"] == 3  # no image has class 2
    assert good["class_kl"] < 0.02
    conditional = evaluate(Conditional(), *data, samples=400, classifier=classifier, batch_size=64)
    assert conditional["label_accuracy"] == 1
    assert conditional["class_kl"] < 1e-4
    collapsed = evaluate(Collapsed(training.images[:1]), *data, samples=400, classifier=classifier)
    assert collapsed["coverage"] == 1
    assert collapsed["duplicates"] == 1
    assert good["duplicates"] < 0.2
    found = anchors(*data, samples=100, classifier=classifier)
    assert list(found) == ["fid_training_images", "fid_noise", "fid_mean_image"]
    assert found["fid_noise"] > 5 * found["fid_training_images"]
    assert collapsed["fid"] > 5 * good["fid"]
    assert good["fid"] < 5 * found["fid_training_images"]
    unconditional = evaluate(Classifying(), *data, samples=50, classifier=classifier)
    assert unconditional["coverage"] == 1
    assert "label_accuracy" not in unconditional


def test_fid_of_an_extractor(data):
    _, held_out = data
    seen = []

    def extractor(images):
        seen.append(images)
        return images.flatten(1).float()[:, :3]

    scores = evaluate(Collapsed(held_out.images[:1] * 3 - 1), *data, samples=10, extractor=extractor, batch_size=6)
    assert all(images.dtype == torch.uint8 for images in seen)
    assert [len(images) for images in seen] == [6, 6, 6, 2, 6, 4]
    assert set(scores) == {"fid", "duplicates"}
    real = (held_out.images * 255).round().flatten(1)[:, :3].double()
    fake = ((held_out.images[0] * 3 - 1).clamp(0, 1) * 255).round().flatten()[:3].double()
    assert scores["fid"] == pytest.approx(((real.mean(0) - fake).square().sum() + real.var(0).sum()).item(), rel=1e-3)


def test_evaluate_has_no_side_effects(data, classifier):
    system = Generating().train()
    state = torch.get_rng_state()
    first = evaluate(system, *data, samples=20, classifier=classifier, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert system.training
    torch.rand(1)
    assert evaluate(system, *data, samples=20, classifier=classifier, seed=1) == first
    assert evaluate(system, *data, samples=20, classifier=classifier, seed=2) != first


def test_no_samples(data, classifier):
    assert evaluate(Generating(), *data, samples=0, classifier=classifier) == {}
    assert evaluate(NoPrior(), *data, classifier=classifier) == {}
    with pytest.raises(UserError, match="samples must be finite, got NaN or infinity"):
        evaluate(Diverged(), *data, samples=10)
