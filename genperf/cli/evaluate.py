"""`genperf evaluate`: score a trained system on held-out images."""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .._errors import UserError, import_extra
from ..fid.extractors import PIXELS, Extractor, load_extractor
from ..metrics.statistics_files import write_atomically
from . import options

HELP = "score a trained system on held-out images"

_DESCRIPTION = """\
Score the system of a run, by all that it can do, on the images that were held out of its training.

Generated images are compared with held-out ones by the Frechet distance of their features (FID). The features are those of a
small classifier that is trained on the labelled training images (within half a minute for the digits) and kept in the folder
as classifier.pt; or those of --extractor, as `genperf fid` computes them, grayscale images repeated to three channels.
Distances of different extractors or classifiers cannot be compared. The scores go to evaluation.json in the folder.
"""

# What a score says, its unit first. Scores of one level of codes have its name added.
_MEANINGS = {
    "mse": "of reconstructed held-out images, pixels in [0, 1]",
    "psnr": "dB, of reconstructed held-out images",
    "psnr_noisy": "dB, of held-out images with noise",
    "psnr_denoised": "dB, of these without it",
    "psnr_gain": "dB, by denoising",
    "negative_elbo": "nats per held-out image",
    "perplexity": "of the codes of held-out images",
    "codes_used": "codes in use there",
    "auroc": "of held-out images of other classes against the normal one",
    "accuracy": "of classified held-out images",
    "error": "share of held-out images classified wrong",
    "fid": "Frechet distance of generated to held-out images",
    "fid_training_images": "that of training images instead, to compare with",
    "fid_noise": "that of uniform noise",
    "fid_mean_image": "that of the mean training image alone",
    "coverage": "of {classes} classes occur among the generated images, at a fifth of their share or more",
    "label_accuracy": "share of generated images that are of the class asked for",
    "class_kl": "nats, divergence of their classes from those of the training images",
    "duplicates": "share of generated images as near to a training image as 0.01 of the held-out ones",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path, help="the folder that `genperf train` wrote")
    parser.add_argument("--samples", type=options.number(int, 2), default=2500, metavar="N", help="generated images (%(default)s)")
    extractor = "features for FID: inception or module.path:callable, see `genperf fid --help`; without it a classifier's"
    parser.add_argument("--extractor", metavar="NAME", help=extractor)
    pixels = "what an extractor gets: float32 in [0, 1] (unit, the default), in [-1, 1] (signed), or uint8"
    parser.add_argument("--pixels", choices=PIXELS, help=pixels)
    parser.add_argument("--weights", type=Path, metavar="PATH", help="weights of inception, where they are not in the cache of torch.hub")
    parser.add_argument("--data", help="where the images of the run lie now, if not where they lay")
    parser.add_argument("--seed", type=options.number(int, 0), default=0, help="of all noise (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print what evaluation.json holds")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("numpy", "numpy"), ("PIL", "pillow")):
        import_extra(module, package, "train")
    from ..training import classifier as classifiers
    from ..training import sampling
    from ..training.evaluation import anchors, evaluate
    from ..training.runs import load_run

    if arguments.extractor is None and (arguments.pixels is not None or arguments.weights is not None):
        raise UserError(f"--{'pixels' if arguments.pixels is not None else 'weights'} is for an --extractor, got none.")
    device = options.device(arguments.device)
    folder = arguments.folder
    found = load_run(folder, device, data=arguments.data)
    system, training, held_out = found.system, found.training, found.held_out

    extractor = classifier = None
    notes = []
    reason = sampling.cannot_sample(system)
    if reason is None:
        if arguments.extractor is not None:
            extractor = _in_color(load_extractor(arguments.extractor, pixels=arguments.pixels, weights=arguments.weights, device=device))
        without = classifiers.unsuitable(training)
        if without is None:
            with _writing(folder):
                classifier = classifiers.trained_classifier(training, held_out, folder=folder, device=device)
            notes.append(f"The classifier is right on {classifier.accuracy:.1%} of the held-out images.")
        elif extractor is None:
            notes.append(f"Without FID: {without} to train a classifier with; --extractor computes features without one.")
        if len(held_out.images) < 2:
            notes.append("Without FID: one held-out image has no covariance.")
    else:
        notes.append(f"Without samples: {reason}.")

    chosen = {"samples": arguments.samples, "extractor": extractor, "classifier": classifier, "seed": arguments.seed}
    scores = evaluate(system, training, held_out, **chosen)
    results = {
        "system": found.name,
        "scores": _finite(scores),
        "anchors": _finite(anchors(training, held_out, **chosen)) if "fid" in scores else {},
        "features": None if "fid" not in scores else arguments.extractor or "classifier",
        "classifier_accuracy": None if classifier is None else classifier.accuracy,
        "held_out_images": len(held_out.images),
        "classes": 0 if training.labels is None else len(training.labels.unique()),
        "samples": arguments.samples if reason is None else 0,
        "seed": arguments.seed,
        "notes": notes,
    }
    text = json.dumps(results, indent=2)
    path = folder / "evaluation.json"
    with _writing(folder):
        write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    print(text if arguments.json else _table(results, path))
    return 0


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the folder of the run must be one that can be written to, got {str(folder)!r}: {error}.") from error


def _in_color(extractor: Extractor) -> Callable[[Tensor], Tensor]:
    def features(images: Tensor) -> Tensor:
        return extractor(images.expand(-1, 3, -1, -1))

    return features


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def _table(results: dict[str, Any], path: Path) -> str:
    lines = [f"{results['system']}, {results['held_out_images']} held-out images"]
    for name, value in {**results["scores"], **results["anchors"]}.items():
        shown = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
        meaning = _MEANINGS.get(name) or next(text for key, text in _MEANINGS.items() if name.startswith(f"{key}_"))
        lines.append(f"  {name.replace('_', ' '):<20}{shown:>9}  {meaning.format(**results)}")
    return "\n".join([*lines, *results["notes"], f"written: {path}"])
