# SPDX-License-Identifier: Apache-2.0
"""Mode coverage: the classes of generated samples, and their distribution."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._validate import check_tensor
from ..ops.covariance_factor import working_dtype
from ._features import whole_number


class ModeCoverage(NamedTuple):
    """Distribution of samples over K classes."""

    modes: Tensor
    """Number of classes among the samples; scalar, int64."""
    kl: Tensor
    """KL divergence from the expected distribution, in nats; scalar, float64 (float32 on MPS)."""
    shares: Tensor
    """[K], of kl's dtype: the fraction of samples in each class."""


@torch.no_grad()
def mode_coverage(
    predictions: Tensor,  # [N] or [N, K]
    num_classes: int,
    *,
    expected: Tensor | None = None,  # [K]
    min_share: float = 0.0,
) -> ModeCoverage:
    """Number of classes among samples, and the KL divergence of their distribution from the expected one.

    Equivalent to:
        shares = torch.bincount(predictions, minlength=K) / N
        modes = ((shares > 0) & (shares >= min_share)).sum()
        kl = (shares * (shares / expected).log()).nansum()

    A collapsed generator covers few classes and has a large divergence: the scores of stacked MNIST in Srivastava et al.,
    "VEEGAN" (2017), and Lin et al., "PacGAN" (2018). The classes can come from a classifier trained on the real data, from
    the components of a mixture, or from nearest centers.

    Args:
        predictions: classes, int64, -1 ... K - 1, where -1 (no class) is ignored; or a floating-point score of each class,
            such as probabilities or logits, of which the largest is taken.
        num_classes: K.
        expected: counts or fractions of the classes in the data; None for uniform. The divergence is infinite if samples have
            a class with an expected fraction of 0.
        min_share: smallest fraction of the samples for a class to count as covered, 0 ... 1; 0 counts every class that occurs.

    Raises:
        ValueError: shapes that do not match, a class or number out of range, NaN scores, or no sample of any class.
        TypeError: predictions that are neither int64 nor floating-point.
    """
    name = "mode_coverage"
    num_classes = whole_number(name, "num_classes", num_classes, 1)
    if not 0 <= min_share <= 1:
        raise ValueError(f"{name}: min_share must lie in [0, 1], got {min_share!r}.")
    classes = _classes(name, predictions, num_classes)
    dtype = working_dtype(classes.device)
    counts = torch.bincount(classes + 1, minlength=num_classes + 1)[1:]
    if not counts.any():
        raise ValueError(f"{name}: there must be at least one sample of a class, got {len(classes)} samples and none of a class.")
    shares = counts.to(dtype) / counts.sum()
    modes = ((counts > 0) & (shares >= min_share)).sum()
    expected_shares = _shares(name, expected, num_classes, shares)
    # 0 log(0 / q) is 0 for any q.
    kl = torch.where(counts > 0, shares * (shares / expected_shares).log(), 0).sum().clamp(min=0)
    return ModeCoverage(modes, kl, shares)


def _classes(name: str, predictions: Tensor, num_classes: int) -> Tensor:
    """The checked classes [N], int64, -1 ... K - 1."""
    check_tensor(name, "predictions", predictions)
    if predictions.is_floating_point():
        if predictions.dim() != 2 or predictions.shape[1] != num_classes:
            raise ValueError(f"{name}: scores must have shape [N, {num_classes}], got {list(predictions.shape)}.")
        if predictions.isnan().any():
            raise ValueError(
                f"{name}: scores must be numbers, got NaN in {int(predictions.isnan().any(1).sum())} of {len(predictions)} samples."
            )
        return predictions.argmax(1)
    if predictions.dtype != torch.int64:
        raise TypeError(f"{name}: predictions must be int64 classes or floating scores, got {predictions.dtype}.")
    if predictions.dim() != 1:
        raise ValueError(f"{name}: classes must have shape [N], got {list(predictions.shape)}.")
    if predictions.numel():
        low, high = (int(bound) for bound in predictions.aminmax())
        if low < -1 or high >= num_classes:
            raise ValueError(f"{name}: classes must lie between -1 and {num_classes - 1}, got {low} ... {high}.")
    return predictions


def _shares(name: str, expected: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """The expected fraction of each class, [K]."""
    if expected is None:
        return torch.full_like(like, 1 / num_classes)
    check_tensor(name, "expected", expected)
    if list(expected.shape) != [num_classes]:
        raise ValueError(f"{name}: expected must have shape [{num_classes}], got {list(expected.shape)}.")
    expected = expected.to(like)
    if not (expected.isfinite().all() and (expected >= 0).all() and expected.sum() > 0):
        raise ValueError(
            f"{name}: expected must hold finite numbers of at least 0, not all 0, got {expected.min():g} ... {expected.max():g}."
        )
    return expected / expected.sum()
