"""`genperf sample`: images from a trained system."""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from .._errors import UserError, import_extra
from ..metrics.statistics_files import write_atomically
from . import options

HELP = "draw samples from a trained system"

_MOST_COLUMNS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path, help="the folder that `genperf train` wrote")
    parser.add_argument("--n", type=options.number(int, 1), default=64, metavar="N", help="how many images (%(default)s)")
    labels = "of conditional samples, such as 0,1,2, over and over; without it all classes in turn"
    parser.add_argument("--labels", type=_labels, metavar="LABELS", help=labels)
    out = (
        "samples.png: one picture of them all; a new or empty folder: a .png for each; samples.npz: an array 'images', uint8 "
        "[N, H, W, C], and their 'labels' (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("samples.png"), metavar="PATH", help=out)
    parser.add_argument("--data", help="where the images of the run lie now, if not where they lay")
    parser.add_argument("--seed", type=options.number(int, 0), default=0, help="of the noise (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("numpy", "numpy"), ("PIL", "pillow")):
        import_extra(module, package, "train")
    from ..training.runs import load_run
    from ..training.sampling import cannot_sample, draw, num_conditions
    from ..training.seeding import seeded

    _check_out(arguments.out)
    device = options.device(arguments.device)
    found = load_run(arguments.folder, device, data=arguments.data)
    reason = cannot_sample(found.system)
    if reason is not None:
        raise UserError(f"{found.name} cannot be sampled from: {reason}.")
    labels = _chosen_labels(arguments, found.name, num_conditions(found.system))
    with seeded(arguments.seed, device), torch.no_grad():
        images = draw(found.system, arguments.n, labels)
    columns = len(arguments.labels) if arguments.labels and 1 < len(arguments.labels) <= _MOST_COLUMNS else None
    try:
        _write(arguments.out, images, labels, columns or min(_MOST_COLUMNS, math.ceil(len(images) ** 0.5)))
    except OSError as error:
        raise UserError(f"--out must name a place that can be written to, got {str(arguments.out)!r}: {error}.") from error
    print(f"written: {len(images)} images to {arguments.out}")
    return 0


def _chosen_labels(arguments: argparse.Namespace, name: str, classes: int) -> Tensor | None:
    if not classes:
        if arguments.labels is not None:
            raise UserError(f"--labels are for conditional systems, got them for {name}.")
        return None
    labels = torch.tensor(arguments.labels) if arguments.labels is not None else torch.arange(classes)
    if labels.max() >= classes:
        raise UserError(f"--labels must lie in 0 ... {classes - 1}, got {int(labels.max())}.")
    return labels[torch.arange(arguments.n) % len(labels)]


def _check_out(path: Path) -> None:
    """Before anything is computed."""
    if path.suffix in (".png", ".npz"):
        if path.is_dir():
            raise UserError(f"--out must be a file where it ends in {path.suffix}, got the folder {str(path)!r}.")
    elif path.suffix and not path.is_dir():
        raise UserError(f"--out must be a .png or .npz file or a folder, got {str(path)!r}.")
    elif path.is_file() or (path.is_dir() and any(path.iterdir())):
        # Among older images, these could not be told apart, nor scored alone.
        raise UserError(f"--out must be a new or empty folder, or end in .png or .npz, got {str(path)!r}.")


def _write(path: Path, images: Tensor, labels: Tensor | None, columns: int) -> None:
    import numpy as np

    from ..training.pictures import write_image, write_images

    if path.suffix == ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_images(path, images, columns)
    elif path.suffix == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"images": (images * 255).round().byte().movedim(1, -1).numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        write_atomically(path, lambda file: np.savez(file, **arrays))
    else:
        path.mkdir(parents=True, exist_ok=True)
        digits = len(str(len(images) - 1))
        for number, image in enumerate(images):
            write_image(path / f"{number:0{digits}}.png", image)


def _labels(text: str) -> list[int]:
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        labels = [-1]
    if min(labels) < 0:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 0 with commas between them, got {text!r}")
    return labels
