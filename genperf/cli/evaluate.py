# SPDX-License-Identifier: Apache-2.0
"""`genperf evaluate`: score a trained system on held-out images."""

import argparse
import json
from pathlib import Path
from typing import Any

from .._errors import UserError, import_extra
from ..fid.extractors import PIXELS
from . import options
from .streams import print_result

_DESCRIPTION = """\
Score a trained system on the images that were held out of its training, with every score that its methods support.

Generated images are scored by the Frechet distance (FID) of their features to those of the held-out images. The features are those of a
small classifier, which is trained on the labels of the training images (half a minute for the digits) and kept in the folder as
classifier.pt; with --extractor they are computed as in `genperf fid`, with grayscale images repeated to three channels. Distances of
different extractors or classifiers are not comparable. The scores are written to evaluation.json in the folder; if it cannot be written to,
they are printed, with exit code 2.
"""

# Unit and meaning of each score. Scores per level of codes have the level's name appended.
_MEANINGS = {
    "mse": "of reconstructed held-out images, pixels in [0, 1]",
    "psnr": "dB, of reconstructed held-out images",
    "psnr_noisy": "dB, of held-out images with noise",
    "psnr_denoised": "dB, of the denoised images",
    "psnr_gain": "dB, by denoising",
    "negative_elbo": "nats per held-out image",
    "perplexity": "of the codes of held-out images",
    "codes_used": "codes used by held-out images",
    "auroc": "of held-out images of other classes against the normal class",
    "accuracy": "of classified held-out images",
    "error": "share of held-out images classified wrong",
    "fid": "Frechet distance of generated to held-out images",
    "fid_training_images": "for comparison, that of training images",
    "fid_noise": "that of uniform noise",
    "fid_mean_image": "that of the mean training image alone",
    "coverage": "of {classes} classes, those with at least 0.2 of their share of the training images among the generated images",
    "label_accuracy": "share of generated images that are classified as their label",
    "class_kl": "nats, KL divergence of the generated images' classes from those of the training images",
    "duplicates": "share of generated images as near to a training image as the nearest 1 % of the held-out images",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    parser.add_argument("folder", metavar="RUN_FOLDER", type=options.path, help="folder written by `genperf train`")
    parser.add_argument("--samples", type=options.number(int, 2), default=2500, metavar="N", help="generated images (%(default)s)")
    extractor = "features for FID: inception, dinov2, clip or module.path:callable, see `genperf fid --help` (those of a classifier)"
    parser.add_argument("--extractor", metavar="NAME", help=extractor)
    pixels = "input of the extractor: float32 in [0, 1] (unit, the default), float32 in [-1, 1] (signed), or uint8"
    parser.add_argument("--pixels", choices=PIXELS, help=pixels)
    parser.add_argument(
        "--weights", type=options.path, metavar="PATH", help="as in `genperf fid`: file of Inception's weights, or folder of dinov2 or clip"
    )
    parser.add_argument("--data", type=options.path_text, help="location of the run's images, if it has changed since training")
    parser.add_argument("--seed", type=options.seed, default=0, help="seed of all noise (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda if available)")
    parser.add_argument("--json", action="store_true", help="print the content of evaluation.json")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("numpy", "numpy"), ("PIL", "pillow")):
        import_extra(module, package, "train")
    from ..training.evaluation import evaluate_run, write_evaluation
    from ..training.runs import EVALUATION, load_run

    if arguments.extractor is None and (arguments.pixels is not None or arguments.weights is not None):
        raise UserError(f"--{'pixels' if arguments.pixels is not None else 'weights'} is for an --extractor, got none.")
    device = options.device(arguments.device)
    chosen = {name: getattr(arguments, name) for name in ("samples", "extractor", "pixels", "weights", "seed")}
    results = evaluate_run(load_run(arguments.folder, device, data=arguments.data), arguments.folder, device, **chosen)
    failure = None
    try:
        write_evaluation(results, arguments.folder)
    except UserError as error:
        failure = error
    path = None if failure is not None else arguments.folder / EVALUATION
    code = print_result(json.dumps(results, indent=2) if arguments.json else _table(results, path))
    if failure is not None:
        raise failure
    return code


def _table(results: dict[str, Any], path: Path | None) -> str:
    lines = [f"{results['system']}, {results['held_out_images']} held-out images"]
    for name, value in {**results["scores"], **results["anchors"]}.items():
        shown = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
        meaning = _MEANINGS.get(name) or next(text for key, text in _MEANINGS.items() if name.startswith(f"{key}_"))
        lines.append(f"  {name.replace('_', ' '):<20}{shown:>9}  {meaning.format(**results)}")
    return "\n".join([*lines, *results["notes"], *([] if path is None else [f"written: {path}"])])
