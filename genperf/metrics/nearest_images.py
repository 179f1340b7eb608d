# SPDX-License-Identifier: Apache-2.0
"""Nearest training image of each sample, to detect memorization."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._precision import HALF_DTYPES
from ..ops._validate import check_float, check_tensor
from ..ops.nearest_code import nearest_code


class NearestImages(NamedTuple):
    """The nearest training image of each of N samples."""

    indices: Tensor
    """[N], int64: index in the training set, the lowest on ties."""
    distances: Tensor
    """[N], float32 (float64 for float64): Euclidean distance."""


@torch.no_grad()
def nearest_images(
    samples: Tensor,  # [N, ...]
    training_images: Tensor,  # [M, ...]
) -> NearestImages:
    """The exact nearest training image of each sample, in the space of pixels or features.

    Equivalent to:
        distances, indices = torch.cdist(samples.flatten(1).double(), training_images.flatten(1).double()).min(1)

    without the [N, M] distance matrix: the search is `genperf.nearest_code`. Compare samples with their nearest images, and
    the distances with those of held-out images, to detect copies; `duplicate_rate` counts them.

    Args:
        samples: float32, bfloat16, float16 or float64; images, or features of images [N, d].
        training_images: M >= 1 images of the same shape and dtype, or float32 with half-precision samples.

    Returns:
        indices and distances. A sample with a NaN has index 0 and distance NaN; a training image with a NaN is never the
        nearest if another has none.

    Raises:
        ValueError: shapes that do not match, an empty training set, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    return _nearest("nearest_images", samples, training_images)


@torch.no_grad()
def duplicate_rate(
    samples: Tensor,  # [N, ...]
    training_images: Tensor,  # [M, ...]
    threshold: float,
) -> Tensor:
    """Fraction of the samples within a distance of a training image.

    Equivalent to:
        (nearest_images(samples, training_images).distances <= threshold).double().mean()

    Args:
        samples, training_images: as in `nearest_images`.
        threshold: Euclidean distance, at least 0; choose it well below the distances of held-out images.

    Returns:
        A float64 scalar; NaN without samples.

    Raises:
        ValueError, TypeError: as `nearest_images`; also a threshold below 0.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"duplicate_rate: threshold must be a finite number, at least 0, got {threshold!r}.")
    distances = _nearest("duplicate_rate", samples, training_images).distances
    return (distances <= threshold).double().mean()


def _nearest(name: str, samples: Tensor, training_images: Tensor) -> NearestImages:
    for what, images in (("samples", samples), ("training_images", training_images)):
        check_tensor(name, what, images)
        check_float(name, what, images)
    if samples.dim() < 2 or samples.shape[1:] != training_images.shape[1:] or not len(training_images):
        got = f"{list(samples.shape)} and {list(training_images.shape)}"
        raise ValueError(
            f"{name}: samples [N, ...] and training_images [M, ...] must have the same shape but for N and M, M at least 1, got {got}."
        )
    mixed = samples.dtype in HALF_DTYPES and training_images.dtype == torch.float32
    if training_images.dtype != samples.dtype and not mixed:
        raise TypeError(
            f"{name}: training_images must have the dtype of samples, or be float32 with half-precision samples, "
            f"got {training_images.dtype} and {samples.dtype}."
        )
    samples, training_images = samples.flatten(1), training_images.flatten(1)
    indices = nearest_code(samples, training_images)
    working = torch.promote_types(samples.dtype, torch.float32)
    # Computed from differences, since |x|^2 - 2 x.y + |y|^2 would cancel for small distances.
    parts = [
        torch.linalg.vector_norm(s.to(working) - training_images[i].to(working), dim=1)
        for s, i in zip(samples.split(4096), indices.split(4096), strict=True)
    ]
    return NearestImages(indices, torch.cat(parts))
