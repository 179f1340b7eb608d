"""`genperf fid`: the Frechet distance between two sets of images, features or statistics."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import metrics
from .._errors import UserError, import_extra
from ..fid.extractors import PIXELS, Extractor, load_extractor
from ..fid.sources import Features, Images, Source, Statistics, open_source
from ..ops.frechet_distance import frechet_distance
from . import options

HELP = "Frechet distance (FID) between images, features or statistics"

_DESCRIPTION = """\
Frechet distance between two distributions of features (Heusel et al., 2017); with Inception's features it is the FID.

A and B are each
  a statistics file     .npz with mu [d] and sigma [d, d], as pytorch-fid, EDM, ADM and others write it; .pkl of StyleGAN or EDM2
  an array of features  .npy, or .npz with one array or one named features or feats; floats [N, d]
  a folder of images    with the folders within it, in the formats that Pillow reads, 8 bits per channel
  an array of images    .npy, or .npz with one array or one named images or arr_0; uint8 [N, H, W] or [N, H, W, 1 or 3]

  genperf fid A B                        prints the distance
  genperf fid --save-stats OUT.npz A     writes the statistics of A's features instead, and reads no B
"""

_EPILOG = """\
extractors:
  inception             Inception v3 with the weights of the original FID, from the package torch-fidelity. It gets uint8
                        [B, 3, H, W] and resizes to 299x299 as TensorFlow did. Without --weights torch-fidelity takes them from
                        the cache of torch.hub, or downloads them there, and a line says so.
  module.path:callable  imported with the current folder on the path. An nn.Module object, or a callable that needs an argument, is the
                        extractor; a callable that needs none (such as a class) is called once and returns it. A module
                        is put into evaluation mode and on the device. It gets float32 [B, 3, H, W] in [0, 1] on the device (see
                        --channels, --pixels), without gradients, and returns floats [B, d] or [B, d, H, W] (averaged over
                        H and W), or a tuple or list of just one such tensor: pytorch_fid.inception:InceptionV3 fits. It runs without TF32.

exit codes: 0; 2 with a sentence on stderr after a mistake, and nothing written; 130 after Ctrl-C.
"""

_CHUNK = 4096  # rows of a feature array that are read at once
_FEATURES_ONLY = {"kid": "--kid", "precision_recall": "--precision-recall"}


@dataclasses.dataclass
class _Side:
    """What is known of A or B when its features have been seen."""

    mean: Tensor  # [d], float64
    cov: Tensor  # [d, d], float64
    count: int | None = None  # unknown for a statistics file
    features: Tensor | None = None  # [N, d], where a metric needs them
    reference: metrics.FrechetReference | None = None  # of a statistics file


class _Dimension(NamedTuple):
    """Length of the features, and the input that it is known from."""

    size: int
    path: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("a", metavar="A", help="real images by custom: statistics file, features or images")
    parser.add_argument("b", metavar="B", nargs="?", help="generated images by custom; likewise")
    parser.add_argument(
        "--extractor", default="inception", metavar="NAME", help="inception (the default) or module.path:callable, see below"
    )
    parser.add_argument("--weights", type=Path, metavar="PATH", help="weights of inception, where they are not in the cache of torch.hub")
    parser.add_argument(
        "--pixels", choices=PIXELS, help="what an extractor gets: float32 in [0, 1] (unit, the default), in [-1, 1], or uint8"
    )
    channels = "3: RGB, grayscale images repeated (the default); 1: grayscale; transparency is dropped"
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help=channels)
    size = "resize all images to this, by Pillow's bicubic filter with antialiasing; without it each side's images must have one size"
    parser.add_argument("--size", type=_size, metavar="N|WxH", help=size)
    parser.add_argument("--batch-size", type=options.number(int, 1), default=64, help="images per call of the extractor (%(default)s)")
    parser.add_argument(
        "--workers", type=options.number(int, 1), default=min(8, os.cpu_count() or 1), help="threads that read images (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument(
        "--biased", action="store_true", help="divide covariances by N, as StyleGAN does, not by N - 1; not those of a statistics file"
    )
    parser.add_argument("--kid", action="store_true", help="also the kernel inception distance; needs features or images on both sides")
    parser.add_argument("--kid-subsets", type=options.number(int, 1), default=100, metavar="N", help="random subsets (%(default)s)")
    parser.add_argument(
        "--kid-subset-size",
        type=options.number(int, 2),
        default=1000,
        metavar="N",
        help="samples in each (%(default)s, or all of the smaller side)",
    )
    parser.add_argument("--seed", type=options.number(int, 0), default=0, help="of those subsets (%(default)s)")
    precision_recall = "also precision, recall, density and coverage, A being real; needs features or images on both sides"
    parser.add_argument("--precision-recall", action="store_true", help=precision_recall)
    parser.add_argument(
        "--neighbors", type=options.number(int, 1), default=3, metavar="K", help="of its k-nearest-neighbor radii (%(default)s)"
    )
    parser.add_argument("--save-stats", type=Path, metavar="PATH", help="write mu and sigma of A to this new .npz file, and no distance")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    paths = _paths(arguments)
    device = options.device(arguments.device)
    sources = [open_source(path) for path in paths]
    known = _check_sources(sources, arguments)
    extractor = None
    if any(isinstance(source, Images) for source in sources):
        if arguments.extractor == "inception" and arguments.channels != 3:
            raise UserError(f"--extractor inception takes images of 3 channels, got --channels {arguments.channels}.")
        import_extra("tqdm", "tqdm", "fid")
        extractor = load_extractor(arguments.extractor, pixels=arguments.pixels, weights=arguments.weights, device=device)
    sides = []
    for source in sources:
        sides.append(_measure(source, known, extractor, arguments, device))
        known = _Dimension(len(sides[-1].mean), source.path)
    results = {
        "files": paths,
        "n": [side.count for side in sides],
        "d": len(sides[0].mean),
        "extractor": extractor and extractor.name,
        "biased": arguments.biased,
    }
    if arguments.save_stats is None:
        scores = _compare(*sides, arguments)
        _check_finite(scores, paths)
        results |= scores
    else:
        results["saved"] = _save(arguments.save_stats, sides[0])
    results["seconds"] = time.perf_counter() - start
    print(json.dumps(results) if arguments.json else _text(results))
    return 0


def _paths(arguments: argparse.Namespace) -> list[str]:
    """The inputs, after the checks that need no look at them."""
    path = arguments.save_stats
    if path is None:
        if arguments.b is None:
            raise UserError("two inputs are needed, or one with --save-stats, got one.")
        return [arguments.a, arguments.b]
    if arguments.b is not None:
        raise UserError("--save-stats takes one input, got two.")
    if _features_only(arguments):
        raise UserError(f"--save-stats takes one input and computes no distance, got it with {_features_only(arguments)}.")
    # Before the hours that the features may take.
    if path.suffix != ".npz" or path.exists() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--save-stats must name a new .npz file in a folder that can be written to, got {str(path)!r}.")
    return [arguments.a]


def _features_only(arguments: argparse.Namespace) -> str:
    """The given options that statistics are not enough for."""
    return " and ".join(option for name, option in _FEATURES_ONLY.items() if getattr(arguments, name))


def _check_sources(sources: list[Source], arguments: argparse.Namespace) -> _Dimension | None:
    """Check what can be checked before any feature is computed; returns the dimension, if a file gives it."""
    option = "--save-stats" if arguments.save_stats is not None else _features_only(arguments)
    known = None
    least, purpose = 2, "a covariance"
    if arguments.precision_recall and arguments.neighbors > 1:
        least, purpose = arguments.neighbors + 1, f"--neighbors {arguments.neighbors}"
    for source in sources:
        if not isinstance(source, Statistics):
            count = len(source.images) if isinstance(source, Images) else len(source.rows)
            if count < least:
                raise UserError(f"{purpose} needs at least {least} samples, got {count} in {source.path!r}.")
        elif option:
            raise UserError(f"features or images are needed for {option}, got the statistics file {source.path!r}.")
        if not isinstance(source, Images):
            dimension = source.reference.dim if isinstance(source, Statistics) else source.rows.shape[1]
            _check_dimension(known, dimension, source)
            known = _Dimension(dimension, source.path)
    return known


def _check_dimension(known: _Dimension | None, dimension: int, source: Source) -> None:
    if known is not None and dimension != known.size:
        got = f"{known.size} in {known.path!r} and {dimension} in {source.path!r}"
        raise UserError(f"both sides must have features of one dimension, got {got}.")


def _measure(
    source: Source, known: _Dimension | None, extractor: Extractor | None, arguments: argparse.Namespace, device: torch.device
) -> _Side:
    if isinstance(source, Statistics):
        reference = source.reference.to(device)
        return _Side(reference.mean, reference.cov, reference=reference)
    moments = metrics.FeatureMoments(unbiased=not arguments.biased, device=device)
    kept = []
    batches = _batches(source, extractor, arguments)
    with contextlib.closing(batches):
        for batch in batches:
            _check_dimension(known, batch.shape[1], source)
            try:
                moments.update(batch.to(device))
            except ValueError as error:
                reason = str(error).removeprefix("FeatureMoments: ").rstrip(".")
                raise UserError(f"the features of {source.path!r} cannot be used: {reason}.") from error
            if _features_only(arguments):
                kept.append(batch)
    if moments.count <= moments.mean.numel():
        print(
            f"genperf: {moments.count} samples of {moments.mean.numel()} features in {source.path!r} have a singular covariance; distances "
            f"from so few are too large, and comparable only at the same number.",
            file=sys.stderr,
        )
    return _Side(moments.mean, moments.cov, moments.count, torch.cat(kept).to(device) if kept else None)


def _batches(source: Features | Images, extractor: Extractor | None, arguments: argparse.Namespace) -> Iterator[Tensor]:
    """Features [B, d]."""
    if isinstance(source, Features):
        yield from source.rows.split(_CHUNK)
        return
    from tqdm import tqdm

    from ..fid.images import read_batches

    options = {name: getattr(arguments, name) for name in ("batch_size", "channels", "size", "workers")}
    bar = tqdm(total=len(source.images), unit="image", desc=source.path, mininterval=0.1 if sys.stderr.isatty() else 10)
    with bar, contextlib.closing(read_batches(source.images, source.path, **options)) as batches:
        for batch in batches:
            yield extractor(batch)
            bar.update(len(batch))


def _compare(a: _Side, b: _Side, arguments: argparse.Namespace) -> dict[str, object]:
    mean_term = (a.mean - b.mean).square().sum().item()
    trace_term = _trace_term(a, b)
    results = {"distance": mean_term + trace_term, "mean_term": mean_term, "trace_term": trace_term}
    if arguments.kid:
        results["kid"] = _kid(a.features, b.features, arguments)
    if arguments.precision_recall:
        scores = metrics.precision_recall(a.features, b.features, k=arguments.neighbors)
        results |= {name: score.item() for name, score in scores._asdict().items()}
    return results


def _trace_term(a: _Side, b: _Side) -> float:
    # Between equal means the distance is its other term.
    if a.reference is not None:
        return a.reference.distance(a.mean, b.cov).item()
    if b.reference is not None:
        return b.reference.distance(b.mean, a.cov).item()
    return frechet_distance(a.mean, a.cov, a.mean, b.cov).item()


def _check_finite(scores: dict[str, Any], paths: list[str]) -> None:
    for name, score in scores.items():
        for value in score.values() if isinstance(score, dict) else [score]:
            if not math.isfinite(value):
                a, b = paths
                raise UserError(f"the numbers in {a!r} and {b!r} must be small enough for a finite {name}, got {value}.")


def _kid(a: Tensor, b: Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    subset_size = min(arguments.kid_subset_size, len(a), len(b))
    distance = metrics.KernelInceptionDistance(subsets=arguments.kid_subsets, subset_size=subset_size)
    distance.update(a, real=True)
    distance.update(b, real=False)
    mean, std = distance.compute(generator=torch.Generator().manual_seed(arguments.seed))
    return {"mean": mean.item(), "std": std.item(), "subsets": arguments.kid_subsets, "subset_size": subset_size}


def _save(path: Path, side: _Side) -> str:
    try:
        metrics.save_statistics(path, side.mean, side.cov)
    except OSError as error:
        raise UserError(f"--save-stats {str(path)!r} cannot be written: {error}.") from error
    except ValueError as error:
        reason = str(error).removeprefix("save_statistics: ").rstrip(".")
        raise UserError(f"--save-stats {str(path)!r} cannot be written: {reason}.") from error
    return str(path)


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
        held = "statistics" if count is None else f"{count} samples"
        lines.append(line(name, f"{held} of {results['d']} features, {path}"))
    if "saved" in results:
        lines.append(line("written", results["saved"]))
    return "\n".join(lines)


def _size(text: str) -> tuple[int, int]:
    """Width and height from N or WxH."""
    sizes = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sizes is None:
        raise argparse.ArgumentTypeError(f"must be N or WxH in pixels, got {text!r}")
    width, height = sizes.groups()
    return int(width), int(height or width)
