# SPDX-License-Identifier: Apache-2.0
"""Scores between two sets of images, features or statistics, and statistics of one."""

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import metrics
from .._choices import Pixels
from .._distributed import all_gather_ints, all_gather_rows, rank, world_size
from .._errors import UserError, import_extra, reason
from .._messages import log
from ..ops.frechet_distance import frechet_distance
from .extractors import Extractor, load_extractor
from .pretrained_extractors import PRETRAINED
from .sources import Features, Images, Source, Statistics, open_source

_CHUNK = 4096  # rows of a feature array per update of the moments


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Options of `compare` and `save_statistics`."""

    device: torch.device
    extractor: str = "inception"  # or "module.path:callable"
    weights: Path | None = None  # as in `load_extractor`, and `pixels`
    pixels: Pixels | None = None
    channels: int = 3  # of the extractor's input; as in `read_batches`, and `size` and `workers`
    size: tuple[int, int] | None = None
    workers: int = 1
    exif: bool = True  # turn images upright, as in `image_files.open_image`
    batch_size: int = 64  # images per call of the extractor
    biased: bool = False  # divide covariances by N instead of N - 1
    kid: bool = False  # also compute the kernel inception distance
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0  # of the subsets
    precision_recall: bool = False  # also compute precision, recall, density and coverage
    neighbors: int = 3  # k of their k-nearest-neighbor radii

    @property
    def needing_features(self) -> str:
        """The given command-line options that need the features of both inputs, for error messages; empty if there are none."""
        options = {"--kid": self.kid, "--precision-recall": self.precision_recall}
        return " and ".join(option for option, given in options.items() if given)


@dataclasses.dataclass
class _Side:
    """Moments of one input, and its features if a score needs them."""

    mean: Tensor  # [d], float64
    cov: Tensor  # [d, d], float64
    count: int | None = None  # unknown for a statistics file
    features: Tensor | None = None  # [N, d]
    reference: metrics.FrechetReference | None = None  # of a statistics file


class _Dimension(NamedTuple):
    """Number of features, and the input that it is known from."""

    size: int
    path: str


def compare(a: str, b: str, options: ScoreOptions) -> dict[str, Any]:
    """Compute the Frechet distance, and the scores that `options` asks for, between the inputs at two paths.

    Args:
        a, b: real and generated images, by convention; see `open_source` for the supported inputs.

    Returns:
        files, n (samples per input, None for statistics), d (features per sample), extractor, biased, distance, mean_term, trace_term,
        and with the options also kid, precision, recall, density, coverage.

    Raises:
        UserError: an input or option is invalid, or a score is not finite.
    """
    (real, fake), extractor = _measure([a, b], options, features_needed_for=options.needing_features)
    scores = _scores(real, fake, options)
    _check_finite(scores, a, b)
    return _facts([a, b], [real, fake], extractor, options) | scores


def save_statistics(path: str, out: Path, options: ScoreOptions) -> dict[str, Any]:
    """Write mean and covariance of the features of the input at `path` to the .npz file `out`.

    Returns:
        files, n, d, extractor and biased as in `compare`, and saved, the path that was written.

    Raises:
        UserError: the input or an option is invalid, or the file cannot be written.
    """
    sides, extractor = _measure([path], options, features_needed_for="--save-stats")
    facts = _facts([path], sides, extractor, options) | {"saved": str(out)}
    if rank() > 0:
        return facts
    try:
        metrics.save_statistics(out, sides[0].mean, sides[0].cov)
    except OSError as error:
        kept = _save_elsewhere(out, sides[0])
        raise UserError(f"--save-stats {str(out)!r} cannot be written: {reason(error)}{kept}.") from error
    except ValueError as error:
        rule = str(error).removeprefix("save_statistics: ").rstrip(".")
        raise UserError(f"--save-stats {str(out)!r} cannot be written: {rule}.") from error
    return facts


def _save_elsewhere(out: Path, side: _Side) -> str:
    """Write the statistics, which may have taken hours, to the folder of temporary files; where to, for an error message."""
    path = Path(tempfile.gettempdir(), f"{out.stem}-{os.getpid()}.npz")
    try:
        metrics.save_statistics(path, side.mean, side.cov)
    except OSError:
        return ""
    return f"; the statistics are in {str(path)!r} instead"


def _facts(paths: list[str], sides: list[_Side], extractor: Extractor | None, options: ScoreOptions) -> dict[str, Any]:
    return {
        "files": paths,
        "n": [side.count for side in sides],
        "d": len(sides[0].mean),
        "extractor": extractor and extractor.name,
        "biased": options.biased,
    }


def _measure(paths: list[str], options: ScoreOptions, *, features_needed_for: str) -> tuple[list[_Side], Extractor | None]:
    """Open and check all inputs, then compute features and moments; also returns the extractor, if there are images."""
    sources = [open_source(path) for path in paths]
    known = _check_sources(sources, options, features_needed_for)
    extractor = None
    if any(isinstance(source, Images) for source in sources):
        if options.extractor in ("inception", *PRETRAINED) and options.channels != 3:
            raise UserError(f"--extractor {options.extractor} takes images of 3 channels, got --channels {options.channels}.")
        import_extra("tqdm", "tqdm", "fid")
        extractor = load_extractor(options.extractor, pixels=options.pixels, weights=options.weights, device=options.device)
    sides = []
    for source in sources:
        sides.append(_measure_source(source, known, extractor, options))
        known = _Dimension(len(sides[-1].mean), source.path)
    return sides, extractor


def _check_sources(sources: list[Source], options: ScoreOptions, features_needed_for: str) -> _Dimension | None:
    """Check everything that does not depend on computed features; returns the dimension if a file determines it."""
    known = None
    minimum, purpose = 2, "a covariance"
    if options.precision_recall and options.neighbors > 1:
        minimum, purpose = options.neighbors + 1, f"--neighbors {options.neighbors}"
    for source in sources:
        if not isinstance(source, Statistics):
            count = len(source.images) if isinstance(source, Images) else len(source.rows)
            if count < minimum:
                raise UserError(f"{purpose} needs at least {minimum} samples, got {count} in {source.path!r}.")
        elif features_needed_for:
            raise UserError(f"features or images are needed for {features_needed_for}, got the statistics file {source.path!r}.")
        if not isinstance(source, Images):
            dimension = source.reference.dim if isinstance(source, Statistics) else source.rows.shape[1]
            _check_dimension(known, dimension, source)
            known = _Dimension(dimension, source.path)
    return known


def _check_dimension(known: _Dimension | None, dimension: int, source: Source) -> None:
    if known is not None and dimension != known.size:
        got = f"{known.size} in {known.path!r} and {dimension} in {source.path!r}"
        raise UserError(f"both sides must have features of one dimension, got {got}.")


def _measure_source(source: Source, known: _Dimension | None, extractor: Extractor | None, options: ScoreOptions) -> _Side:
    if isinstance(source, Statistics):
        reference = source.reference.to(options.device)
        return _Side(reference.mean, reference.cov, reference=reference)
    split = isinstance(source, Images) and world_size() > 1
    moments = metrics.FeatureMoments(unbiased=not options.biased, device=options.device)
    kept = []
    with contextlib.closing(_feature_batches(source, extractor, options)) as batches:
        for batch in batches:
            _check_dimension(known, batch.shape[1], source)
            try:
                moments.update(batch.to(options.device))
            except ValueError as error:
                rule = str(error).removeprefix("FeatureMoments: ").rstrip(".")
                raise UserError(f"the features of {source.path!r} cannot be used: {rule}.") from error
            if options.needing_features:
                kept.append(batch)
    if split:
        kept = [_synchronize(moments, kept)]
    if moments.count <= moments.mean.numel() and rank() == 0:
        log.warning(
            "%d samples of %d features in %r have a singular covariance; the distance is biased upwards, and comparable only with "
            "distances of as many samples.",
            moments.count,
            moments.mean.numel(),
            source.path,
        )
    features = torch.cat(kept).to(options.device) if options.needing_features else None
    return _Side(moments.mean, moments.cov, moments.count, features)


def _synchronize(moments: metrics.FeatureMoments, kept: list[Tensor]) -> Tensor:
    """Sum the moments of all ranks, and return the features that they have kept, in the order of the images."""
    shares = all_gather_ints([moments.count, sum(map(len, kept))])
    moments.sync()
    if not any(rows for _, rows in shares):
        return torch.empty(0)
    own = torch.cat(kept) if kept else torch.empty(0, len(moments.mean), device=moments.device)
    return all_gather_rows(own, [rows for _, rows in shares])


def _feature_batches(source: Features | Images, extractor: Extractor | None, options: ScoreOptions) -> Generator[Tensor, None, None]:
    """Features [B, d]."""
    if isinstance(source, Features):
        yield from source.rows.split(_CHUNK)
        return
    assert extractor is not None  # loaded wherever there are images
    from tqdm import tqdm

    from .images import read_batches

    reading = {name: getattr(options, name) for name in ("batch_size", "channels", "size", "workers", "exif")}
    # Shares of consecutive images, so that the features of all ranks are in their order.
    count, ranks = len(source.images), world_size()
    share = range(count * rank() // ranks, count * (rank() + 1) // ranks)
    bar = tqdm(total=len(share), unit="image", desc=source.path, mininterval=0.1 if sys.stderr.isatty() else 10, disable=rank() > 0)
    resizes = options.extractor in ("inception", *PRETRAINED)  # each image to the size that it takes
    sizes: set[tuple[int, ...]] = set()  # of height and width, up to two
    with bar, contextlib.closing(read_batches(source.images, source.path, share=share, one_size=not resizes, **reading)) as batches:
        for batch in batches:
            if len(sizes) < 2:
                sizes.add(tuple(batch.shape[2:]))
            yield extractor(batch)
            bar.update(len(batch))
    if ranks > 1:
        two = [*sizes, (0, 0), (0, 0)][:2]
        sizes = {size for a, b, c, d in all_gather_ints([*two[0], *two[1]]) for size in ((a, b), (c, d))} - {(0, 0)}
    if len(sizes) > 1 and not resizes:
        got = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise UserError(f"images must have one size unless --size gives it, got {got} in {source.path!r}.")
    if len(sizes) > 1 and rank() == 0:
        log.warning(
            "the images in %r have several sizes, and %s resizes each to what it takes; --size resizes them before, antialiased.",
            source.path,
            options.extractor,
        )


def _scores(a: _Side, b: _Side, options: ScoreOptions) -> dict[str, Any]:
    mean_term = (a.mean - b.mean).square().sum().item()
    trace_term = _trace_term(a, b)
    scores: dict[str, Any] = {"distance": mean_term + trace_term, "mean_term": mean_term, "trace_term": trace_term}
    if not options.needing_features:
        return scores
    assert a.features is not None
    assert b.features is not None
    if options.kid:
        scores["kid"] = _kid(a.features, b.features, options)
    if options.precision_recall:
        values = metrics.precision_recall(a.features, b.features, k=options.neighbors)
        scores |= {name: value.item() for name, value in values._asdict().items()}
    return scores


def _trace_term(a: _Side, b: _Side) -> float:
    # The distance for equal means.
    if a.reference is not None:
        return a.reference.distance(a.mean, b.cov).item()
    if b.reference is not None:
        return b.reference.distance(b.mean, a.cov).item()
    return frechet_distance(a.mean, a.cov, a.mean, b.cov).item()


def _kid(a: Tensor, b: Tensor, options: ScoreOptions) -> dict[str, float]:
    subset_size = min(options.kid_subset_size, len(a), len(b))
    distance = metrics.KernelInceptionDistance(subsets=options.kid_subsets, subset_size=subset_size)
    distance.update(a, real=True)
    distance.update(b, real=False)
    mean, std = distance.compute(generator=torch.Generator().manual_seed(options.seed))
    return {"mean": mean.item(), "std": std.item(), "subsets": options.kid_subsets, "subset_size": subset_size}


def _check_finite(scores: dict[str, Any], a: str, b: str) -> None:
    for name, score in scores.items():
        for value in score.values() if isinstance(score, dict) else [score]:
            if not math.isfinite(value):
                raise UserError(f"the numbers in {a!r} and {b!r} must be small enough for a finite {name}, got {value}.")
