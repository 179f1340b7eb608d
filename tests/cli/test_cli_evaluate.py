# SPDX-License-Identifier: Apache-2.0
"""`genperf evaluate`, `sample` and `systems`: what they print and write, their options and errors."""

import argparse
import dataclasses
import errno
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from genperf._errors import UserError
from genperf.cli import evaluate as evaluate_command
from genperf.cli import sample as sample_command
from genperf.cli import systems as systems_command
from genperf.models.system import SystemConfig, option
from genperf.training.data import LabeledImages, load_images
from genperf.training.runs import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import stand_in_systems
from stand_in_systems import Classifying, Conditional, Diverged, Generating, NoPrior, Reconstructing

_few_steps, data = stand_in_systems._few_steps, stand_in_systems.data


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
