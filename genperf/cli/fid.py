# SPDX-License-Identifier: Apache-2.0
"""`genperf fid`: the Frechet distance between two sets of images, features or statistics."""

import argparse
import dataclasses
import json
import os
import re
import time
from typing import Any

from .._distributed import process_group, rank
from .._errors import UserError
from ..fid.extractors import PIXELS
from ..fid.scores import ScoreOptions, compare, save_statistics
from . import options
from .streams import print_result

_DESCRIPTION = """\
Frechet distance between two distributions of features (Heusel et al., 2017). With Inception features it is the FID.

A and B are each one of
  statistics            .npz with mu [d] and sigma [d, d], as written by pytorch-fid, EDM or ADM; .pkl of StyleGAN or EDM2; .pt of
                        torch-fidelity; .npy of a dictionary
  an array of features  .npy, or .npz or .pt with one array or an array named features, feats or reps; floats [N, d]
  a folder of images    including its subfolders, in the formats that Pillow reads, 8 bits per channel; links are followed, and files
                        and folders whose names begin with a dot are left out
  a zip of images       chosen in the same way
  an array of images    .npy, or .npz with one array or an array named images or arr_0; uint8 [N, H, W] or [N, H, W, 1 or 3]

  genperf fid A B                        prints the distance
  genperf fid --save-stats OUT.npz A     writes the statistics of the features of A; there is no B
"""

_EPILOG = """\
extractors:
  inception             Inception v3 with the weights of the original FID, from the package torch-fidelity. It takes uint8
                        [B, 3, H, W] and resizes to 299x299 like TensorFlow 1. Without --weights, the weights are taken from the
                        cache of torch.hub, and downloaded if they are not there; a message says so.
  dinov2, clip          DINOv2's class token, or CLIP's image embedding. --weights names the folder of a model of the package
                        transformers, such as a download of facebook/dinov2-large or openai/clip-vit-large-patch14-336. Images are
                        resized (bicubic, antialiased) and normalized as in their training.
  module.path:callable  imported, with the current folder on the path. A callable without required arguments, such as a class, is called
                        once and returns the extractor. An nn.Module, or a callable with a required argument, is the extractor. A
                        module is put into evaluation mode and moved to the device. The input is float32 [B, 3, H, W] in [0, 1] on
                        the device (see --channels, --pixels). The output is floats [B, d], or [B, d, H, W], which is averaged over H
                        and W, or a tuple or list with one such tensor, as from pytorch_fid.inception:InceptionV3. The extractor runs
                        without gradients and without TF32.

Photos are turned upright as their EXIF orientation says, as viewers and `genperf train` do. pytorch-fid, clean-fid and torch-fidelity
ignore it: --no-exif gives their distance.

exit codes: 0; 2 after an error, with a message on stderr and no file written; 130 after Ctrl-C; 141 if the reader of stdout is gone. A
result that cannot be written to stdout is written to stderr; statistics that cannot be written to PATH, to the folder of temporary files.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    count = options.number(int, 1)
    add = parser.add_argument
    add("a", metavar="A", type=options.path_text, help="statistics, features or images; by convention the real ones")
    add("b", metavar="B", nargs="?", type=options.path_text, help="statistics, features or images; by convention the generated ones")
    add("--extractor", default="inception", metavar="NAME", help="inception, dinov2, clip or module.path:callable, see below (%(default)s)")
    weights = "file of Inception's weights (that in the cache of torch.hub), or folder of dinov2 or clip"
    add("--weights", type=options.path, metavar="PATH", help=weights)
    add("--pixels", choices=PIXELS, help="input of the extractor: float32 in [0, 1] (unit, the default) or [-1, 1] (signed), or uint8")
    add("--channels", type=int, choices=(1, 3), default=3, help="convert images to RGB (3) or grayscale (1), without alpha (%(default)s)")
    size = "resize all images, with Pillow's antialiased bicubic filter; without it the images of an input may differ in size only for "
    size += "inception, dinov2 and clip, which resize each to what they take"
    add("--size", type=_size, metavar="N|WxH", help=size)
    add("--exif", action=argparse.BooleanOptionalAction, default=True, help="turn images upright by their EXIF orientation (yes)")
    add("--batch-size", type=count, default=64, help="images per call of the extractor (%(default)s)")
    add("--workers", type=options.number(int, 1, 1024), default=min(8, os.cpu_count() or 1), help="threads that read images (%(default)s)")
    add("--device", help="cpu, cuda or cuda:N (cuda if available)")
    add("--biased", action="store_true", help="divide covariances by N, like StyleGAN, instead of N - 1; not in statistics files")
    add("--kid", action="store_true", help="also print the kernel inception distance; A and B must be features or images")
    add("--kid-subsets", type=count, default=100, metavar="N", help="number of random subsets for KID (%(default)s)")
    subset_size = "samples per subset (%(default)s, or the size of the smaller input)"
    add("--kid-subset-size", type=options.number(int, 2), default=1000, metavar="N", help=subset_size)
    add("--seed", type=options.seed, default=0, help="seed of the random subsets (%(default)s)")
    precision_recall = "also print precision, recall, density and coverage, with A as the real images; A and B must be features or images"
    add("--precision-recall", action="store_true", help=precision_recall)
    add("--neighbors", type=count, default=3, metavar="K", help="k of the k-nearest-neighbor radii for --precision-recall (%(default)s)")
    add(
        "--save-stats",
        type=options.path,
        metavar="PATH",
        help="write mu and sigma of A to this new .npz file instead of printing a distance",
    )
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ScoreOptions)}
    chosen = ScoreOptions(**{**values, "device": options.device(arguments.device)})
    _check_inputs(arguments, chosen)
    with process_group(chosen.device):
        if arguments.save_stats is None:
            results = compare(arguments.a, arguments.b, chosen)
        else:
            results = save_statistics(arguments.a, arguments.save_stats, chosen)
        first = rank() == 0
    if not first:
        return 0
    results["seconds"] = time.perf_counter() - start
    return print_result(json.dumps(results) if arguments.json else _text(results))


def _check_inputs(arguments: argparse.Namespace, chosen: ScoreOptions) -> None:
    """Check the number of inputs and the output path, without opening the inputs."""
    path = arguments.save_stats
    if path is None:
        if arguments.b is None:
            raise UserError("two inputs are needed, or one with --save-stats, got one.")
        return
    if arguments.b is not None:
        raise UserError("--save-stats takes one input, got two.")
    if chosen.needing_features:
        raise UserError(f"--save-stats takes one input and computes no distance, got it with {chosen.needing_features}.")
    # Checked before the features are computed, which may take hours.
    if path.suffix != ".npz" or path.exists() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--save-stats must name a new .npz file in a folder that can be written to, got {str(path)!r}.")


def _text(results: dict[str, Any]) -> str:
    def line(label: str, value: str) -> str:
        return f"{label:<17}{value}"

    lines = []
    if "distance" in results:
        lines.append(line("Frechet distance", f"{results['distance']:.6g}"))
        lines.append(line("  of means", f"{results['mean_term']:.6g}"))
        lines.append(line("  of covariances", f"{results['trace_term']:.6g}"))
    if "kid" in results:
        kid = results["kid"]
        lines.append(
            line("KID", f"{kid['mean']:.6g}, standard deviation {kid['std']:.2g} over {kid['subsets']} subsets of {kid['subset_size']}")
        )
    if "precision" in results:
        lines += [line(name, f"{results[name]:.4f}") for name in ("precision", "recall", "density", "coverage")]
    for name, path, count in zip("AB", results["files"], results["n"], strict=False):
        content = "statistics" if count is None else f"{count} samples"
        lines.append(line(name, f"{content} of {results['d']} features, {path}"))
    if "saved" in results:
        lines.append(line("written", results["saved"]))
    return "\n".join(lines)


def _size(text: str) -> tuple[int, int]:
    """Width and height from N or WxH."""
    sizes = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sizes is None:
        raise argparse.ArgumentTypeError(f"must be N or WxH in pixels, got {text!r}")
    if max(map(len, sizes.groups(""))) > 5:
        raise argparse.ArgumentTypeError(f"must be below 100000 pixels a side, got {text!r}")
    width, height = sizes.groups()
    return int(width), int(height or width)
