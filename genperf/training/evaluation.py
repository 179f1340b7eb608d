# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a trained system with the scores that its methods support."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._choices import Pixels
from .._errors import UserError, reason
from .._files import write_atomically
from .._modes import evaluating
from ..fid.extractors import load_extractor
from ..metrics.frechet_distance import FrechetDistance
from ..metrics.mode_coverage import mode_coverage
from ..metrics.nearest_images import nearest_images
from ..models.system import System
from ..nn.vector_quantizer import code_usage
from .classifier import Classifier, classifier_unavailable, predict, trained_classifier
from .data import LabeledImages
from .runs import EVALUATION, Run
from .sampling import num_conditions, sample_batches, sampling_unavailable
from .seeding import seeded

_COVERED_FRACTION = 0.2
_DUPLICATE_QUANTILE = 0.01

# Maps images, uint8 [B, C, H, W], to features [B, d].
FeatureFunction = Callable[[Tensor], Tensor]


def evaluate_run(
    run: Run,
    folder: Path,
    device: torch.device,
    *,
    samples: int = 2500,
    extractor: str | None = None,
    pixels: Pixels | None = None,
    weights: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate the system of a run; `write_evaluation` writes the results.

    FID uses the features of `extractor`, or else those of a classifier, which is trained on the labels of the training images and kept in
    the folder as classifier.pt, if it can be written to.

    Args:
        extractor, pixels, weights: as in `genperf.fid.extractors.load_extractor`.

    Returns:
        what evaluation.json holds: scores, reference values for FID ("anchors"), counts, and notes on the scores that are left out.

    Raises:
        UserError: the extractor fails, or samples with NaN or infinity.
    """
    system, training, held_out = run.system, run.training, run.held_out
    features = classifier = None
    notes = []
    no_samples = sampling_unavailable(system)
    if no_samples is None:
        if extractor is not None:
            features = _expand_channels(load_extractor(extractor, pixels=pixels, weights=weights, device=device))
        no_classifier = classifier_unavailable(training)
        if no_classifier is None:
            classifier = trained_classifier(training, held_out, folder=folder, device=device)
            notes.append(f"The classifier is right on {classifier.accuracy:.1%} of the held-out images.")
        elif features is None:
            notes.append(f"Without FID: {no_classifier} to train a classifier with; --extractor computes features without one.")
        if len(held_out.images) < 2:
            notes.append("Without FID: one held-out image has no covariance.")
    else:
        notes.append(f"Without samples: {no_samples}.")
    options = {"samples": samples, "extractor": features, "classifier": classifier, "seed": seed}
    scores = evaluate(system, training, held_out, **options)
    return {
        "system": run.name,
        "scores": _finite_or_none(scores),
        "anchors": _finite_or_none(anchors(training, held_out, **options)) if "fid" in scores else {},
        "features": None if "fid" not in scores else extractor or "classifier",
        "classifier_accuracy": None if classifier is None else classifier.accuracy,
        "held_out_images": len(held_out.images),
        "classes": 0 if training.labels is None else len(training.labels.unique()),
        "samples": samples if no_samples is None else 0,
        "seed": seed,
        "notes": notes,
    }


def write_evaluation(results: dict[str, Any], folder: Path) -> None:
    """Write the results of `evaluate_run` to evaluation.json in the folder of the run.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / EVALUATION
    try:
        write_atomically(path, lambda file: file.write(f"{json.dumps(results, indent=2)}\n".encode()))
    except OSError as error:
        raise UserError(f"the folder of the run must be one that can be written to, got {str(folder)!r}: {reason(error)}.") from error


@torch.no_grad()
def evaluate(
    system: System,
    training: LabeledImages,
    held_out: LabeledImages,
    *,
    samples: int = 2500,
    extractor: FeatureFunction | None = None,
    classifier: Classifier | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Score a system with every method that it has. Torch's random state does not change.

    method              scores on the held-out images, or on `samples` generated images
    reconstruct         mse, psnr = -10 log10(mse) in dB
    corrupt, denoise    psnr_noisy, psnr_denoised, psnr_gain in dB
    negative_elbo       negative_elbo in nats per image
    encode to indices   perplexity and codes_used; with several levels, one of each per level, named after it
    anomaly_score       auroc, where images of classes other than config.normal_class are the positives
    classify            accuracy, error
    sample              fid: Frechet distance to the held-out images, with features of the extractor, or else of the classifier
                        coverage: number of classes whose share of the samples, as classified, is at least 0.2 of their share of the
                            training images
                        class_kl: KL divergence of the samples' class distribution from that of the training images, in nats
                        label_accuracy: share of conditional samples that are classified as their label
                        duplicates: share of samples whose pixel distance to the nearest training image is within the first percentile
                            of that of the held-out images

    Scores that need labels, an extractor or a classifier are left out if it is missing, and FID also if there is only one held-out image.
    The labels of conditional samples have the distribution of the training labels. An anomaly detector reconstructs images of its normal
    class only.

    Args:
        extractor: maps uint8 images to features.

    Raises:
        UserError: samples with NaN or infinity, or the extractor fails.
    """
    device = system.device
    scores: dict[str, float] = {}
    with seeded(seed, device), evaluating(system):
        batches = normal_images(system, held_out).split(batch_size)
        if batches[0].numel():
            scores |= _reconstruction(system, batches) | _denoising(system, batches)
            negative_elbo = getattr(system, "negative_elbo", None)
            if negative_elbo is not None:
                scores["negative_elbo"] = _mean(negative_elbo(batch.to(device)) for batch in batches)
        scores |= _codes(system, held_out, batch_size) | _anomalies(system, held_out, batch_size) | _classes(system, held_out, batch_size)
        if samples and sampling_unavailable(system) is None:
            scores |= _samples(system, training, held_out, samples, extractor, classifier, batch_size)
    return scores


@torch.no_grad()
def anchors(
    training: LabeledImages,
    held_out: LabeledImages,
    *,
    samples: int = 2500,
    extractor: FeatureFunction | None = None,
    classifier: Classifier | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Reference values for `fid`: the FID of training images, of uniform noise, and of the mean training image alone.

    A classifier's features differ between its training images and held-out images, so generated images may score below
    fid_training_images.
    """
    features = _feature_function(extractor, classifier)
    if features is None or len(held_out.images) < 2:
        return {}
    images = training.images
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:samples]]
    candidates = {
        "fid_training_images": chosen.split(batch_size),
        "fid_noise": (torch.rand(batch.shape, generator=generator) for batch in chosen.split(batch_size)),
        "fid_mean_image": [images.mean(0, keepdim=True).expand(2, -1, -1, -1)],
    }
    distance = _distance_to(held_out.images.split(batch_size), features)
    values = {}
    for name, batches in candidates.items():
        for batch in batches:
            distance.update(features(batch), real=False)
        values[name] = distance.compute().item()
        distance.reset()
    return values


def area_under_roc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive sample scores above a negative one; ties count half.

    Args:
        scores: [N].
        positive: bool [N], with at least one True and one False.
    """
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()  # from 1; ties share their mean rank
    positives, negatives = int(positive.sum()), int((~positive).sum())
    return ((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


def class_labels(n: int, labels: Tensor) -> Tensor:
    """n sorted labels with the distribution of `labels`."""
    return labels.sort().values[torch.arange(n) * len(labels) // n]


def normal_images(system: System, held_out: LabeledImages) -> Tensor:
    """Held-out images of the classes that the system was trained on: only the normal class for an anomaly detector."""
    normal = getattr(system.config, "normal_class", None)
    return held_out.images if normal is None or held_out.labels is None else held_out.images[held_out.labels == normal]


def _reconstruction(system: System, batches: tuple[Tensor, ...]) -> dict[str, float]:
    reconstruct = getattr(system, "reconstruct", None)
    if reconstruct is None:
        return {}
    mse = _mse(batches, (reconstruct(batch.to(system.device)) for batch in batches))
    return {"mse": mse, "psnr": _psnr(mse)}


def _denoising(system: System, batches: tuple[Tensor, ...]) -> dict[str, float]:
    corrupt, denoise = getattr(system, "corrupt", None), getattr(system, "denoise", None)
    if corrupt is None or denoise is None:
        return {}
    noisy = [corrupt(batch.to(system.device)) for batch in batches]
    before, after = _psnr(_mse(batches, noisy)), _psnr(_mse(batches, (denoise(batch) for batch in noisy)))
    return {"psnr_noisy": before, "psnr_denoised": after, "psnr_gain": after - before}


def _codes(system: System, held_out: LabeledImages, batch_size: int) -> dict[str, float]:
    encode = getattr(system, "encode", None)
    if encode is None or not hasattr(system.config, "num_codes"):
        return {}
    encoded = [encode(batch.to(system.device)) for batch in held_out.images.split(batch_size)]
    if isinstance(encoded[0], Tensor):
        levels = {"": encoded}
    else:
        names = getattr(encoded[0], "_fields", range(len(encoded[0])))
        levels = {f"_{name}": level for name, level in zip(names, zip(*encoded, strict=True), strict=True)}
    scores = {}
    for name, level in levels.items():
        usage = code_usage(torch.cat([indices.flatten() for indices in level]), system.config.num_codes)
        scores |= {f"perplexity{name}": usage.perplexity.item(), f"codes_used{name}": int(usage.used)}
    return scores


def _anomalies(system: System, held_out: LabeledImages, batch_size: int) -> dict[str, float]:
    anomaly_score, normal = getattr(system, "anomaly_score", None), getattr(system.config, "normal_class", None)
    if anomaly_score is None or normal is None or held_out.labels is None:
        return {}
    positive = held_out.labels != normal
    if positive.all() or not positive.any():
        return {}
    anomaly_scores = [anomaly_score(batch.to(system.device)).cpu() for batch in held_out.images.split(batch_size)]
    return {"auroc": area_under_roc(torch.cat(anomaly_scores), positive)}


def _classes(system: System, held_out: LabeledImages, batch_size: int) -> dict[str, float]:
    classify = getattr(system, "classify", None)
    if classify is None or held_out.labels is None:
        return {}
    predicted = [classify(batch.to(system.device)).argmax(1).cpu() for batch in held_out.images.split(batch_size)]
    accuracy = (torch.cat(predicted) == held_out.labels).double().mean().item()
    return {"accuracy": accuracy, "error": 1 - accuracy}


def _samples(
    system: System,
    training: LabeledImages,
    held_out: LabeledImages,
    samples: int,
    extractor: FeatureFunction | None,
    classifier: Classifier | None,
    batch_size: int,
) -> dict[str, float]:
    labels = class_labels(samples, training.labels) if num_conditions(system) > 0 and training.labels is not None else None
    features = _feature_function(extractor, classifier) if len(held_out.images) > 1 else None
    distance = None if features is None else _distance_to(held_out.images.split(batch_size), features)
    training_images = training.images.to(system.device)
    distances, classes = [], []
    for batch in sample_batches(system, samples, labels, batch_size):
        distances.append(nearest_images(batch, training_images).distances.cpu())
        if distance is not None and features is not None:
            distance.update(features(batch), real=False)
        if classifier is not None:
            classes.append(predict(classifier, batch))
    scores = {} if distance is None else {"fid": distance.compute().item()}
    if classifier is not None:
        assert training.labels is not None  # which the classifier was trained on
        predicted = torch.cat(classes)
        shares = training.labels.bincount(minlength=classifier.num_classes).double() / len(training.labels)
        modes = mode_coverage(predicted, classifier.num_classes, expected=shares)
        scores["coverage"] = int(((shares > 0) & (modes.shares > 0) & (modes.shares >= _COVERED_FRACTION * shares)).sum())
        scores["class_kl"] = modes.kl.item()
        if labels is not None:
            scores["label_accuracy"] = (predicted == labels).double().mean().item()
    batches = held_out.images.split(batch_size)
    real = torch.cat([nearest_images(batch.to(system.device), training_images).distances.cpu() for batch in batches])
    scores["duplicates"] = (torch.cat(distances) <= real.quantile(_DUPLICATE_QUANTILE)).double().mean().item()
    return scores


def _feature_function(extractor: FeatureFunction | None, classifier: Classifier | None) -> FeatureFunction | None:
    """A function from images in [0, 1] to features; None without an extractor and a classifier."""
    if extractor is not None:
        return lambda images: extractor((images.clamp(0, 1) * 255).round().byte())
    if classifier is None:
        return None
    device = classifier.output.weight.device
    return lambda images: classifier.features(images.to(device))


def _distance_to(real: tuple[Tensor, ...], features: FeatureFunction) -> FrechetDistance:
    distance = FrechetDistance(reset_real=False)
    for batch in real:
        distance.update(features(batch), real=True)
    return distance


def _mse(images: tuple[Tensor, ...], others: Iterator[Tensor] | list[Tensor]) -> float:
    """Mean squared error over all pixels."""
    total = sum((other.cpu().double() - batch).square().sum().item() for batch, other in zip(images, others, strict=True))
    return total / sum(batch.numel() for batch in images)


def _psnr(mse: float) -> float:
    return math.inf if mse == 0 else -10 * math.log10(mse)


def _mean(batches: Iterator[Tensor]) -> float:
    return torch.cat([batch.cpu() for batch in batches]).double().mean().item()


def _expand_channels(extractor: FeatureFunction) -> FeatureFunction:
    """Repeat grayscale images to three channels."""
    return lambda images: extractor(images.expand(-1, 3, -1, -1))


def _finite_or_none(scores: dict[str, float]) -> dict[str, float | None]:
    """Replace infinity, which JSON does not support, with None."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
