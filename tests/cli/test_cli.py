# SPDX-License-Identifier: Apache-2.0
import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from genperf import _files as files
from genperf.cli import info
from genperf.cli.main import main
from genperf.models import VQVAE
from genperf.training import data
from genperf.training.checkpoint import load_checkpoint
from genperf.training.session import TrainingSession

STEPS_PER_EPOCH = 2


@pytest.fixture
def npz(tmp_path):
    """12 images of 8x8 pixels: 11 for training, in 2 steps per epoch of 4 images, and 3 left over."""
    path = tmp_path / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(12))
    return path


def train(npz, out, *options, system="vqvae"):
    return main(["train", system, "--out", str(out), *options, *([] if npz is None else ["--data", str(npz)])])


SMALL = ("--epochs", "3", "--batch-size", "4", "--num-codes", "6", "--dim", "3", "--seed", "1", "--device", "cpu", "--prior-width", "0")


def interrupt_at(monkeypatch, number, interrupt):
    """Call `interrupt` at the start of training step `number`, counted from 0."""
    step = VQVAE.training_step
    calls = iter(range(number + 1))

    def interrupted(self, images, labels, *, player):
        if next(calls, None) == number:
            interrupt()
        return step(self, images, labels, player=player)

    monkeypatch.setattr(VQVAE, "training_step", interrupted)


def raise_interrupt():
    raise KeyboardInterrupt


def send_interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def assert_same(a, b, path="checkpoint"):
    """Bitwise equal, except for times."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_fails(capsys, code, sentence):
    """The command has failed with code 2 and one sentence."""
    printed = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress bar, if training has started
    assert code == 2
    assert re.search(sentence, printed), printed
    assert re.fullmatch(r"genperf: .*\.", printed), printed


def test_training_writes_its_results(npz, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert train(npz, out, *SMALL) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert [set(losses) for losses in metrics["history"]] == [{"loss", "reconstruction", "quantizer"}] * 3
    assert metrics["held_out_images"] == 1
    assert 0 < metrics["scores"]["mse"] < 1
    assert 1 <= metrics["scores"]["codes_used"] <= 6
    assert metrics["step_ms"]["genperf_ms"] > 0
    assert metrics["step_ms"]["reference_ms"] > 0
    assert metrics["images_per_second"] > 0
    assert metrics["settings"]["seed"] == 1
    assert metrics["config"]["num_codes"] == 6
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.mode == "L"
        assert picture.width >= 80
        assert picture.height >= 160
    with open(out / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert float(table[-1]["loss"]) == metrics["history"][-1]["loss"]
    assert {path.name for path in out.iterdir()} >= {"checkpoint.pt", "metrics.json", "metrics.csv", "losses.png"}
    printed = capsys.readouterr()
    assert re.search(r"mse +0\.\d+", printed.out)
    assert "with their references in plain PyTorch" in printed.out
    assert "step" in printed.err  # the progress bar


@pytest.mark.parametrize("interrupt", [send_interrupt, raise_interrupt])
@pytest.mark.parametrize("decay", ["0.9", "none"])
@pytest.mark.parametrize("number", [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH - 1])
def test_resumed_run_equals_uninterrupted_one(npz, tmp_path, monkeypatch, capsys, decay, number, interrupt):
    options = (*SMALL, "--decay", decay)
    assert train(npz, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as context:
        interrupt_at(context, number, interrupt)
        assert train(npz, tmp_path / "parts", *options) == 130
    assert f"genperf train vqvae --resume --out {tmp_path / 'parts'}" in capsys.readouterr().err
    left = load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["training"]
    # Ctrl-C takes effect after the step; an exception within a step leaves the checkpoint from the start of the epoch.
    finished = number + 1 if interrupt is send_interrupt else number - number % STEPS_PER_EPOCH
    assert left["epoch"] * STEPS_PER_EPOCH + left["step"] == finished

    torch.manual_seed(12345)
    assert train(None, tmp_path / "parts", "--resume") == 0
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert_same(whole, parts)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["scores"] == parts["scores"]
    assert whole["history"] == parts["history"]
    assert (tmp_path / "whole/reconstructions.png").read_bytes() == (tmp_path / "parts/reconstructions.png").read_bytes()


def test_a_run_too_short_for_a_player_says_so(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingSession, "run", lambda self: None)
    short = ("--epochs", "1", "--batch-size", "4", "--width", "8", "--latent-dim", "4")
    assert train(npz, tmp_path / "run", *short, "--critic-steps", "50", system="wgan-gp") == 0
    said = f"genperf: the generator does not train in the {STEPS_PER_EPOCH} steps of this run; a larger --epochs has more."
    assert said in capsys.readouterr().err
    assert train(npz, tmp_path / "run", *short, "--critic-steps", "1", "--overwrite", system="wgan-gp") == 0
    assert "does not train" not in capsys.readouterr().err


def test_resume_can_add_epochs(npz, tmp_path, capsys):
    assert train(npz, tmp_path / "long", *SMALL) == 0
    assert train(npz, tmp_path / "long", "--resume") == 0
    assert "genperf: the run has finished its 3 epochs; a larger --epochs continues it." in capsys.readouterr().err
    assert train(npz, tmp_path / "short", *SMALL, "--epochs", "1") == 0
    assert train(npz, tmp_path / "short", "--resume", "--epochs", "3") == 0
    long, short = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("long", "short"))
    assert_same(long, short)


def test_few_images_are_seen_in_more_epochs(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("genperf.training.session._LEAST_STEPS", 25)
    assert train(npz, tmp_path, *SMALL[2:]) == 0
    assert "an epoch of these images has 2 steps, so the run takes 13 epochs (--epochs)." in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["settings"]["epochs"] == 13


def test_interrupt_restores_the_signal_handler(npz, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 1, send_interrupt)
    assert train(npz, tmp_path, *SMALL) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_failed_save_keeps_the_last_checkpoint(npz, tmp_path, monkeypatch):
    assert train(npz, tmp_path, *SMALL) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def save_half(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    assert train(None, tmp_path, "--resume", "--epochs", "4") == 130
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_seed_determines_the_run(npz, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(npz, tmp_path / name, *SMALL, "--epochs", "1", "--seed", seed) == 0
    a, b, c = (load_checkpoint(tmp_path / name / "checkpoint.pt")["training"]["model"] for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["decoder.0.weight"], c["decoder.0.weight"])


def test_diverging_run_keeps_its_last_checkpoint(npz, tmp_path, capsys):
    assert_fails(capsys, train(npz, tmp_path, *SMALL, "--lr", "1e30"), r"the loss became (nan|inf) in epoch 1; a smaller --lr")
    left = load_checkpoint(tmp_path / "checkpoint.pt")["training"]
    assert left["epoch"] == left["step"] == 0
    assert all(weight.isfinite().all() for weight in left["model"].values())


def write_images(folder, modes, size=(12, 8)):
    folder.mkdir()
    for number, mode in enumerate(modes):
        Image.new(mode, size, number * 20 if mode == "L" else (number * 20, 0, 0)).save(folder / f"{number}.png")
    return folder


def test_folder_of_images(tmp_path):
    gray = data.load_images(str(write_images(tmp_path / "gray", ["L", "L"]))).images
    assert gray.shape == (2, 1, 8, 12)
    torch.testing.assert_close(gray[:, 0, 0, 0], torch.tensor([0, 20 / 255]))
    folder = write_images(tmp_path / "mixed", ["L", "L", "RGB"])
    (folder / "notes.txt").write_text("not an image")
    (folder / "more").mkdir()
    Image.new("RGB", (12, 8), (0, 255, 0)).save(folder / "more" / "a.jpg", quality=95)
    mixed = data.load_images(str(folder)).images
    assert mixed.shape == (4, 3, 8, 12)
    torch.testing.assert_close(mixed[:3, :, 0, 0] * 255, torch.tensor([[0.0, 0, 0], [20, 20, 20], [40, 0, 0]]))
    assert mixed[3, 1].min() > 0.95
    assert train(folder, tmp_path / "out", *SMALL) == 0
    with Image.open(tmp_path / "out" / "reconstructions.png") as picture:
        assert picture.mode == "RGB"


def test_images_of_several_sizes_get_one_that_the_run_keeps(tmp_path, capsys):
    folder, out = write_images(tmp_path / "sizes", ["L", "L"], size=(12, 9)), tmp_path / "out"
    Image.linear_gradient("L").resize((20, 16)).save(folder / "large.png")
    said = "genperf: the images have several sizes; each is scaled and cropped at the center to 8x8 (--size).\n"
    assert train(folder, out, *SMALL, "--epochs", "1") == 0
    assert capsys.readouterr().err.count(said) == 1
    assert load_checkpoint(out / "checkpoint.pt")["settings"]["size"] == 8
    os.rename(folder, tmp_path / "moved")
    for command in (["train", "vqvae", "--out", str(out), "--resume", "--epochs", "2"], ["evaluate", str(out), "--device", "cpu"]):
        assert main([*command, "--data", str(tmp_path / "moved")]) == 0
        assert "several sizes" not in capsys.readouterr().err
    given = ("--size", "12", "--overwrite", "--epochs", "1")
    assert train(tmp_path / "moved", out, *SMALL, *given) == 0
    assert "several sizes" not in capsys.readouterr().err
    assert load_checkpoint(out / "checkpoint.pt")["config"].get("image_shape") is None
    assert load_checkpoint(out / "checkpoint.pt")["data"]["images"].startswith("3x1x12x12-")


@pytest.mark.parametrize("shape", [(3, 8, 4), (3, 8, 4, 1), (3, 8, 4, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz(tmp_path, shape, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels if dtype == np.uint8 else pixels / 255)
    images = data.load_images(str(tmp_path / "a.npz")).images
    assert images.dtype == torch.float32
    expected = torch.from_numpy(pixels.reshape(3, 8, 4, -1)).movedim(-1, 1) / 255
    torch.testing.assert_close(images, expected)


def test_invalid_data(tmp_path, capsys):
    def fails(path, sentence):
        assert_fails(capsys, train(path, tmp_path / "out", *SMALL), sentence)

    def arrays(name, *unnamed, **named):
        np.savez(tmp_path / name, *unnamed, **named)
        return tmp_path / name

    fails(tmp_path / "missing", "'.*missing', which does not exist")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "must hold images, but no file in it has the suffix of an image")
    folder = write_images(tmp_path / "sides", ["L", "L"], size=(14, 10))
    fails(folder, "vqvae needs images whose sides are divisible by 4, got 14x10; --size 8 scales and crops them to 8x8")
    folder = write_images(tmp_path / "broken", ["L"])
    for content in ((folder / "0.png").read_bytes()[:45], b"no image"):
        (folder / "broken.png").write_bytes(content)
        fails(folder, r"the image '.*broken\.png' cannot be read")
    Image.fromarray(np.zeros((8, 12), np.uint16)).save(folder / "broken.png")
    fails(folder, "8 bits per channel")
    (tmp_path / "text.txt").write_text("no")
    fails(tmp_path / "text.txt", "folder or zip archive of images, or an .npz file")
    (tmp_path / "text.npz").write_text("no")
    fails(tmp_path / "text.npz", "cannot be read as .npz")
    fails(arrays("two.npz", a=np.zeros(2), b=np.zeros(2)), "array named 'images' or a single array, got a, b")
    fails(arrays("shape.npz", np.zeros((2, 8, 8, 2))), r"shape \[N, H, W\] or \[N, H, W, 1 or 3\], got \[2, 8, 8, 2\]")
    fails(arrays("dtype.npz", np.zeros((2, 8, 8), np.int64)), "uint8, or floats in .*, got int64")
    fails(arrays("range.npz", np.full((2, 8, 8), 255.0)), r"must lie in \[0, 1\], got 255 \.\.\. 255")
    fails(arrays("nan.npz", np.full((2, 8, 8), np.nan)), r"must lie in \[0, 1\], got nan")
    fails(arrays("object.npz", np.array([None, None])), "cannot be read as .npz")
    fails(arrays("odd.npz", np.zeros((2, 8, 10))), r"divisible by 4, got \[1, 8, 10\]")
    fails(arrays("one.npz", np.zeros((1, 8, 8))), "at least 2 images, .* got 1")
    fails(arrays("none.npz", np.zeros((0, 8, 8))), "at least 2 images, .* got 0")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_unknown_device(npz, tmp_path, capsys, device):
    assert_fails(capsys, train(npz, tmp_path, "--device", device), f"--device must be cpu, cuda or cuda:N, .* got '{device}'")


def test_invalid_resume(npz, tmp_path, capsys):
    def fails(sentence, *options):
        assert_fails(capsys, train(npz, tmp_path / "out", "--resume", *options), sentence)

    fails("needs the checkpoint of an earlier run, got '.*checkpoint.pt', which does not exist")
    assert train(npz, tmp_path / "out", *SMALL) == 0
    capsys.readouterr()
    fails("--lr must have the value that the run began with, 0.002, got 0.1", "--lr", "0.1")
    fails("--epochs must not be less than the 3", "--epochs", "2")
    np.savez(tmp_path / "images.npz", np.zeros((12, 8, 8)))
    fails("needs the images that the run began with")
    torch.save({"model": {}}, tmp_path / "out" / "checkpoint.pt")
    fails("another kind of file")
    for content in (b"", b"not a checkpoint", b"hello world" * 20):
        (tmp_path / "out" / "checkpoint.pt").write_bytes(content)
        fails(r"checkpoint\.pt' cannot be read: \w+")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state["settings"].update(new=1), "options are known, got one with new"),
        (lambda state: state.pop("data"), r"a whole checkpoint, got '.*checkpoint\.pt' without data"),
        (lambda state: state.update(config=3), "is not one that genperf .* can use: TypeError: "),
        (lambda state: state["training"].pop("model"), "is not one that genperf .* can use: KeyError: 'model'"),
        (lambda state: state["training"].pop("epoch"), "is not one that genperf .* can use: KeyError: 'epoch'"),
        (lambda state: state["training"].pop("optimizers"), "is not one that genperf .* can use: KeyError: 'optimizers'"),
        (
            lambda state: state["training"]["model"].update({"decoder.0.weight": torch.zeros(1)}),
            "is not one that genperf .* can use: RuntimeError: .*size mismatch for decoder",
        ),
        (
            lambda state: next(iter(state["training"]["optimizers"].values()))["state"][0].update(exp_avg=torch.zeros(1)),
            r"is not one that genperf .* can use: ValueError: the optimizer has a state \[1\] for a parameter",
        ),
    ],
)
def test_checkpoint_of_another_version(npz, tmp_path, capsys, change, sentence):
    assert train(npz, tmp_path / "out", *SMALL, "--epochs", "1") == 0
    path = tmp_path / "out" / "checkpoint.pt"
    state = load_checkpoint(path)
    change(state)
    torch.save(state, path)
    before = path.read_bytes()
    assert_fails(capsys, train(npz, tmp_path / "out", "--resume", "--epochs", "2"), sentence)
    assert path.read_bytes() == before
    if "epoch'" not in sentence and "optimizer" not in sentence:
        assert_fails(capsys, main(["sample", str(tmp_path / "out"), "--out", str(tmp_path / "a.png")]), sentence)


def fail_after(monkeypatch, count):
    """Let every file after the first `count` find a full disk."""
    write, calls = files.write_atomically, iter(range(count))

    def full(path, content, **options):
        def half(file):
            content(file)
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        write(path, half, **options)

    for module in ("checkpoint", "session", "pictures", "evaluation", "sample_files"):
        monkeypatch.setattr(f"genperf.training.{module}.write_atomically", full)


@pytest.mark.parametrize("count", range(4))
def test_full_disk_while_training(npz, tmp_path, monkeypatch, capsys, count):
    """A checkpoint at the start and one after each of 3 epochs."""
    with monkeypatch.context() as context:
        fail_after(context, count)
        code = train(npz, tmp_path / "out", *SMALL)
    if count == 0:
        assert_fails(capsys, code, "--out must be a folder that can be written to, got '.*out': No space left on device")
        assert not list((tmp_path / "out").iterdir())
        return
    assert_fails(capsys, code, r"the checkpoint in '.*out' cannot be written: No space left on device; the last one is whole, and --resume")
    assert os.listdir(tmp_path / "out") == ["checkpoint.pt"]
    assert train(None, tmp_path / "out", "--resume") == 0
    assert train(npz, tmp_path / "whole", *SMALL) == 0
    assert_same(*(load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "out")))


@pytest.mark.parametrize("count", range(4, 9))
def test_full_disk_after_training_loses_no_result(npz, tmp_path, monkeypatch, capsys, count):
    fail_after(monkeypatch, count)
    code = train(npz, tmp_path / "out", *SMALL)
    printed = capsys.readouterr()
    assert code == 2
    assert re.search(r"^mse +0\.\d+$", printed.out, re.M)
    assert "written" not in printed.out
    assert re.search("^genperf: the results cannot be written to '.*out': No space left on device.$", printed.err, re.M)
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt")["training"]["epoch"] == 3
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".partial"]


def test_run_is_replaced_only_with_overwrite(npz, tmp_path, capsys):
    short = (*SMALL, "--epochs", "1")
    assert train(npz, tmp_path / "out", *short) == 0
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    assert_fails(capsys, train(npz, tmp_path / "out", *short, "--seed", "1"), "--resume continues that run, --overwrite replaces it")
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    (tmp_path / "out" / "evaluation.json").touch()
    assert train(npz, tmp_path / "out", *short, "--seed", "1", "--overwrite") == 0
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt")["settings"]["seed"] == 1
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_runs_with_other_labels_systems_and_options(tmp_path, capsys):
    images = np.random.default_rng(0).random((12, 8, 8))
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=np.arange(12) % 3)
    tiny = ["--data", str(path), "--width", "8", "--epochs", "1", "--batch-size", "4"]
    for system in ("conditional-gan", "gan"):
        assert main(["train", system, "--out", str(tmp_path / system), *tiny]) == 0
    np.savez(path, images=images, labels=np.arange(12) % 4)
    assert_fails(capsys, main(["evaluate", str(tmp_path / "conditional-gan")]), "--data needs the labels that the run began with")
    assert main(["train", "gan", "--out", str(tmp_path / "gan"), "--resume"]) == 0  # does not use labels
    checkpoint = tmp_path / "gan" / "checkpoint.pt"
    state = load_checkpoint(checkpoint)
    torch.save({**state, "system": "no-such"}, checkpoint)
    assert_fails(capsys, main(["sample", str(tmp_path / "gan")]), "needs a run of a system that .* names, got one of 'no-such'")
    torch.save({**state, "config": {"no_such": 1}}, checkpoint)
    assert_fails(capsys, main(["sample", str(tmp_path / "gan")]), "options are known, got one with no_such")
    assert_fails(capsys, main(["train", "lapgan", "--out", str(tmp_path / "one"), *tiny[:-1], "1"]), "more than 1 value per channel")


def test_class_conditional_vqvae(npz, tmp_path, capsys):
    out, unlabeled = tmp_path / "run", tmp_path / "unlabeled.npz"
    options = ("--class-conditional", "--prior-only", "0.5", "--prior-shift", "1", *SMALL[:-1], "8")
    assert train(npz, out, *options) == 0
    history = json.loads((out / "metrics.json").read_text())["history"]  # of 3 epochs of 2 steps
    assert [sorted(losses) for losses in (history[0], history[2])] == [
        ["model_loss", "model_quantizer", "model_reconstruction"],
        ["prior_loss", "prior_nats_per_code"],
    ]
    samples = tmp_path / "samples.npz"
    assert main(["sample", str(out), "--labels", "11,3", "--n", "4", "--out", str(samples)]) == 0
    with np.load(samples) as arrays:
        assert arrays["labels"].tolist() == [11, 3, 11, 3]
    with np.load(npz) as arrays:
        images = arrays["images"]
    np.savez(npz, images=images, labels=np.arange(12)[::-1])
    assert_fails(capsys, main(["sample", str(out)]), "--data needs the labels that the run began with")
    np.savez(unlabeled, images=images)
    assert_fails(capsys, train(unlabeled, tmp_path / "other", *options), "needs labels: .* got images without labels")
    assert train(unlabeled, tmp_path / "other", *SMALL) == 0


def test_out_is_a_file(npz, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_fails(capsys, train(npz, tmp_path / "file", *SMALL), "--out must be a folder")


@pytest.mark.parametrize(("module", "package"), [("tqdm", "tqdm"), ("PIL", "pillow"), ("numpy", "numpy"), ("mlxtend.data", "mlxtend")])
def test_missing_package(tmp_path, monkeypatch, capsys, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert_fails(capsys, train(None, tmp_path, *SMALL), rf"needs the package {package} .* `pip install 'genperf\[train\]'`")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, got '0'"),
        (["--batch-size", "many"], "--batch-size: must be a whole number"),
        (["--lr", "nan"], "--lr: must be a finite number, got 'nan'"),
        (["--lr-decay", "2"], "--lr-decay: must lie in [0, 1], got '2'"),
        (["--precision", "8"], "--precision: must be 32 or bf16, got '8'"),
        (["--seed", "-1"], "--seed: must be"),
    ],
)
def test_option_errors_state_the_rule(options, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "vqvae", *options])
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("command", "arguments"), [("info", ""), ("kmeans", "data.npy --codes 4"), ("train vqvae", ""), ("fid", "A B")])
def test_unknown_options_show_the_usage_of_their_command(command, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), *arguments.split(), "--no-such"])
    assert exit.value.code == 2
    usage, error = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert usage.startswith(f"usage: genperf {command} ")
    assert error == f"genperf {command}: error: unrecognized arguments: --no-such"


def test_options_out_of_range(npz, tmp_path, capsys):
    assert_fails(capsys, train(npz, tmp_path, *SMALL, "--lr", "0"), "--lr must be above 0, got 0")
    assert_fails(capsys, train(npz, tmp_path, *SMALL, "--decay", "1"), r"decay must be None or lie in \[0, 1\), got 1")


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info_names_the_implementation_of_each_op(arguments, capsys):
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in page
    assert "kmeans" in info.OPS
    for op in info.OPS:
        for device in ("cpu", "cuda"):
            assert re.search(rf"^  {op} +{device} +(native|triton|eigen|polar|reference)$", page, re.M), (op, device)
    assert "not triton: the Triton kernel runs on CUDA" in page


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["torch"] == torch.__version__
    assert list(content["ops"]) == list(info.OPS)
    assert content["ops"]["nearest_code"]["cuda"]["implementation"] in ("triton", "reference")


def test_info_without_compiled_kernels(monkeypatch, capsys):
    monkeypatch.setattr("genperf._library.build_info", {})
    monkeypatch.setattr("genperf._library.cpu_failure", "not compiled.")
    assert main([]) == 0
    page = capsys.readouterr().out
    assert "compiled     no: not compiled." in page
    assert re.search("nearest_code +cpu +reference\n +not native: not compiled.", page)


@pytest.mark.parametrize(("argument", "shown"), [("--version", r"genperf \d+\.\d+\.\d+\S*\n"), ("--help", r"usage: genperf (.|\n)*")])
def test_usage_of_the_program_does_not_import_torch(argument, shown):
    command = [sys.executable, "-X", "importtime", "-m", "genperf", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(shown, done.stdout)
    imported = [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    assert "genperf.cli.main" in imported
    assert not [name for name in imported if name.split(".")[0] in ("torch", "numpy")]


def test_program_has_the_public_names():
    """They are loaded with the module of a command, or before that by whoever asks for one."""
    program = "import sys; sys.argv = ['genperf']; import genperf; assert 'torch' not in sys.modules; genperf.nn; genperf.vector_quantize"
    program += "; from genperf import *; assert {*genperf.__all__} <= {*globals()}; assert not hasattr(genperf, 'nonsense')"
    subprocess.run([sys.executable, "-c", program], check=True)
