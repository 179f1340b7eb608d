"""Scores of a trained system, those that it has by what it can do."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..metrics.frechet_distance import FrechetDistance
from ..metrics.mode_coverage import mode_coverage
from ..metrics.nearest_images import nearest_images
from ..models.system import System, evaluating
from ..nn.vector_quantizer import code_usage
from .classifier import Classifier, predict
from .data import LabelledImages
from .sampling import cannot_sample, num_conditions, sample_batches
from .seeding import seeded

_COVERED = 0.2
_NEAREST = 0.01

# Maps images, uint8 [B, C, H, W], to features [B, d].
Extractor = Callable[[Tensor], Tensor]


@torch.no_grad()
def evaluate(
    system: System,
    training: LabelledImages,
    held_out: LabelledImages,
    *,
    samples: int = 2500,
    extractor: Extractor | None = None,
    classifier: Classifier | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Score a system by every method that it has; torch's random state stays as it is.

    has                 scores, of the held-out images or of `samples` generated ones
    reconstruct         mse, psnr = -10 log10(mse) in dB
    corrupt, denoise    psnr_noisy, psnr_denoised, psnr_gain in dB
    negative_elbo       negative_elbo in nats per image
    encode to indices   perplexity and codes_used; with the name of the level where there are several
    anomaly_score       auroc of the images of other classes against those of config.normal_class
    classify            accuracy, error
    sample              fid: Frechet distance of features to the held-out images; of the extractor, or else of the classifier
                        coverage: classes that the classifier finds in at least a fifth of their share of the training images
                        class_kl: divergence of the classes that it finds from those shares, in nats
                        label_accuracy: share of samples in which it finds the class that was asked for
                        duplicates: share of samples as near to a training image, in pixels, as only 1 % of the held-out images are

    What needs labels, an extractor or a classifier that is not there is left out, and so is the distance to a single
    held-out image. Labels of conditional samples come in the shares that they have in the training images. An anomaly
    detector's reconstructions are of its normal class.

    Raises:
        UserError: samples with NaN or infinity, or an extractor that fails.
    """
    device = system.device
    scores: dict[str, float] = {}
    with seeded(seed, device), evaluating(system):
        batches = usual(system, held_out).split(batch_size)
        if batches[0].numel():
            scores |= _reconstruction(system, batches) | _denoising(system, batches)
            if hasattr(system, "negative_elbo"):
                scores["negative_elbo"] = _mean(system.negative_elbo(batch.to(device)) for batch in batches)
        scores |= _codes(system, held_out, batch_size) | _anomalies(system, held_out, batch_size) | _classes(system, held_out, batch_size)
        if samples and cannot_sample(system) is None:
            scores |= _samples(system, training, held_out, samples, extractor, classifier, batch_size)
    return scores


@torch.no_grad()
def anchors(
    training: LabelledImages,
    held_out: LabelledImages,
    *,
    samples: int = 2500,
    extractor: Extractor | None = None,
    classifier: Classifier | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """What a `fid` is to be compared with: that of training images, of uniform noise, and of the mean training image alone.

    A classifier tells its training images from others, so generated images may come below fid_training_images.
    """
    features = _features(extractor, classifier)
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
    found = {}
    for name, batches in candidates.items():
        for batch in batches:
            distance.update(features(batch), real=False)
        found[name] = distance.compute().item()
        distance.reset()
    return found


def area_under_roc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive sample scores above a negative one; ties count half.

    Args:
        scores: [N].
        positive: bool [N], of either kind at least one.
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()  # from 1, equal ones share their mean
    positives, negatives = int(positive.sum()), int((~positive).sum())
    return ((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


def class_labels(n: int, labels: Tensor) -> Tensor:
    """n labels in order, in the shares that they have among `labels`."""
    return labels.sort().values[torch.arange(n) * len(labels) // n]


def usual(system: System, held_out: LabelledImages) -> Tensor:
    """The held-out images of the kind that the system learned from."""
    normal = getattr(system.config, "normal_class", None)
    return held_out.images if normal is None or held_out.labels is None else held_out.images[held_out.labels == normal]


def _reconstruction(system: System, batches: tuple[Tensor, ...]) -> dict[str, float]:
    if not hasattr(system, "reconstruct"):
        return {}
    mse = _mse(batches, (system.reconstruct(batch.to(system.device)) for batch in batches))
    return {"mse": mse, "psnr": _psnr(mse)}


def _denoising(system: System, batches: tuple[Tensor, ...]) -> dict[str, float]:
    if not (hasattr(system, "corrupt") and hasattr(system, "denoise")):
        return {}
    noisy = [system.corrupt(batch.to(system.device)) for batch in batches]
    before, after = _psnr(_mse(batches, noisy)), _psnr(_mse(batches, (system.denoise(batch) for batch in noisy)))
    return {"psnr_noisy": before, "psnr_denoised": after, "psnr_gain": after - before}


def _codes(system: System, held_out: LabelledImages, batch_size: int) -> dict[str, float]:
    if not (hasattr(system, "encode") and hasattr(system.config, "num_codes")):
        return {}
    encoded = [system.encode(batch.to(system.device)) for batch in held_out.images.split(batch_size)]
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


def _anomalies(system: System, held_out: LabelledImages, batch_size: int) -> dict[str, float]:
    normal = getattr(system.config, "normal_class", None)
    if not hasattr(system, "anomaly_score") or normal is None or held_out.labels is None:
        return {}
    positive = held_out.labels != normal
    if positive.all() or not positive.any():
        return {}
    found = [system.anomaly_score(batch.to(system.device)).cpu() for batch in held_out.images.split(batch_size)]
    return {"auroc": area_under_roc(torch.cat(found), positive)}


def _classes(system: System, held_out: LabelledImages, batch_size: int) -> dict[str, float]:
    if not hasattr(system, "classify") or held_out.labels is None:
        return {}
    found = [system.classify(batch.to(system.device)).argmax(1).cpu() for batch in held_out.images.split(batch_size)]
    accuracy = (torch.cat(found) == held_out.labels).double().mean().item()
    return {"accuracy": accuracy, "error": 1 - accuracy}


def _samples(
    system: System,
    training: LabelledImages,
    held_out: LabelledImages,
    samples: int,
    extractor: Extractor | None,
    classifier: Classifier | None,
    batch_size: int,
) -> dict[str, float]:
    conditional = num_conditions(system) > 0 and training.labels is not None
    labels = class_labels(samples, training.labels) if conditional else None
    features = _features(extractor, classifier)
    if len(held_out.images) < 2:
        features = None
    distance = None if features is None else _distance_to(held_out.images.split(batch_size), features)
    trained_on = training.images.to(system.device)
    distances, classes = [], []
    for batch in sample_batches(system, samples, labels, batch_size):
        distances.append(nearest_images(batch, trained_on).distances.cpu())
        if distance is not None:
            distance.update(features(batch), real=False)
        if classifier is not None:
            classes.append(predict(classifier, batch))
    scores = {} if distance is None else {"fid": distance.compute().item()}
    if classifier is not None:
        found = torch.cat(classes)
        shares = training.labels.bincount(minlength=classifier.num_classes).double() / len(training.labels)
        spread = mode_coverage(found, classifier.num_classes, expected=shares)
        scores["coverage"] = int(((shares > 0) & (spread.shares > 0) & (spread.shares >= _COVERED * shares)).sum())
        scores["class_kl"] = spread.kl.item()
        if labels is not None:
            scores["label_accuracy"] = (found == labels).double().mean().item()
    real = torch.cat([nearest_images(batch.to(system.device), trained_on).distances.cpu() for batch in held_out.images.split(batch_size)])
    scores["duplicates"] = (torch.cat(distances) <= real.quantile(_NEAREST)).double().mean().item()
    return scores


def _features(extractor: Extractor | None, classifier: Classifier | None) -> Extractor | None:
    """From images in [0, 1] to features; None where nothing makes any."""
    if extractor is not None:
        return lambda images: extractor((images.clamp(0, 1) * 255).round().byte())
    if classifier is None:
        return None
    device = classifier.output.weight.device
    return lambda images: classifier.features(images.to(device))


def _distance_to(real: tuple[Tensor, ...], features: Extractor) -> FrechetDistance:
    distance = FrechetDistance(reset_real=False)
    for batch in real:
        distance.update(features(batch), real=True)
    return distance


def _mse(images: tuple[Tensor, ...], others: Iterator[Tensor] | list[Tensor]) -> float:
    """Mean squared difference of all pixels."""
    total = sum((other.cpu().double() - batch).square().sum().item() for batch, other in zip(images, others, strict=True))
    return total / sum(batch.numel() for batch in images)


def _psnr(mse: float) -> float:
    return math.inf if mse == 0 else -10 * math.log10(mse)


def _mean(batches: Iterator[Tensor]) -> float:
    return torch.cat([batch.cpu() for batch in batches]).double().mean().item()
