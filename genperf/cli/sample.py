# SPDX-License-Identifier: Apache-2.0
"""`genperf sample`: draw samples from a trained system."""

import argparse
import math
from pathlib import Path

import torch

from .._errors import UserError, import_extra
from . import options
from .streams import print_result

_MAX_COLUMNS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN_FOLDER", type=options.path, help="folder written by `genperf train`")
    parser.add_argument("--n", type=options.number(int, 1), default=64, metavar="N", help="number of images (%(default)s)")
    labels = "labels of conditional samples, such as 0,1,2, repeated in turn (all classes)"
    parser.add_argument("--labels", type=_labels, metavar="LABELS", help=labels)
    out = (
        "a .png file for one picture of all samples; an .npz file for arrays 'images', uint8 [N, H, W, C], and 'labels'; or a new or empty "
        "folder for a .png per sample (%(default)s)"
    )
    parser.add_argument("--out", type=options.path, default=Path("samples.png"), metavar="PATH", help=out)
    parser.add_argument("--data", type=options.path_text, help="location of the run's images, if it has changed since training")
    parser.add_argument("--seed", type=options.seed, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda if available)")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("numpy", "numpy"), ("PIL", "pillow")):
        import_extra(module, package, "train")
    from ..training.runs import load_run
    from ..training.sample_files import check_output_path, write_samples
    from ..training.sampling import draw, sample_labels, sampling_unavailable
    from ..training.seeding import seeded

    check_output_path(arguments.out)
    device = options.device(arguments.device)
    trained = load_run(arguments.folder, device, data=arguments.data)
    reason = sampling_unavailable(trained.system)
    if reason is not None:
        raise UserError(f"{trained.name} cannot be sampled from: {reason}.")
    labels = sample_labels(trained.name, trained.system, arguments.n, arguments.labels)
    with seeded(arguments.seed, device), torch.no_grad():
        images = draw(trained.system, arguments.n, labels)
    write_samples(arguments.out, images, labels, _columns(arguments))
    return print_result(f"written: {len(images)} images to {arguments.out}")


def _columns(arguments: argparse.Namespace) -> int:
    """One column per given label, or else a square grid."""
    if arguments.labels and 1 < len(arguments.labels) <= _MAX_COLUMNS:
        return len(arguments.labels)
    return min(_MAX_COLUMNS, math.ceil(arguments.n**0.5))


def _labels(text: str) -> list[int]:
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        labels = [-1]
    if not 0 <= min(labels) <= max(labels) <= options.MOST:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 0 with commas between them, got {text!r}")
    return labels
