# SPDX-License-Identifier: Apache-2.0
"""Gaussians fitted to features, from the sums that other libraries' metrics keep."""

import torch
from torch import Tensor

from ..ops.covariance_factor import working_dtype
from ..ops.frechet_distance import frechet_distance

Sums = tuple[Tensor, Tensor, int]
"""The sum of features [d], the sum of their outer products [d, d], and their number, at least 2."""


def distance_of_sums(real: Sums, fake: Sums) -> Tensor:
    """The Frechet distance between Gaussians fitted to the features of two sums; float64, or float32 on MPS."""
    (mean1, cov1, factor1), (mean2, cov2, factor2) = moments_of_sums(*real), moments_of_sums(*fake)
    return frechet_distance(mean1, cov1, mean2, cov2, factor1=factor1, factor2=factor2)


def moments_of_sums(total: Tensor, outer: Tensor, count: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mean, and the covariance or a factor of it, which has the rank that `count` samples can have."""
    dtype = working_dtype(total.device)
    mean = total.to(dtype) / count
    cov = (outer.to(dtype) - count * torch.outer(mean, mean)) / (count - 1)
    rank = count - 1
    if rank >= mean.shape[0] or not cov.isfinite().all():
        return mean, cov, None
    values, vectors = torch.linalg.eigh(cov)
    return mean, None, vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
