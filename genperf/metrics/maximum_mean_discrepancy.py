# SPDX-License-Identifier: Apache-2.0
"""The maximum mean discrepancy between real and generated samples under a Gaussian kernel."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops._precision import normalized
from ..ops.covariance_factor import working_dtype
from ._feature_rows import FeatureRows
from ._features import finite_features
from ._kernel_sums import squared_mmd
from ._two_samples import TwoSampleMetric


def gaussian_mmd(
    real: Tensor,  # [M, d]
    fake: Tensor,  # [N, d]
    *,
    sigma: float = 10.0,
    unbiased: bool = False,
) -> Tensor:
    """Squared maximum mean discrepancy with a Gaussian kernel.

    Equivalent to:
        def kernel(x, y): return (-torch.cdist(x, y).square() / (2 * sigma**2)).exp()
        value = kernel(real, real).mean() + kernel(fake, fake).mean() - 2 * kernel(real, fake).mean()

    in float64, block by block, without an M x N kernel matrix; of the symmetric matrices half is computed. With `unbiased`, pairs of a
    sample with itself are left out, and the estimate can be negative. Not differentiable.

    Args:
        real, fake: float32, bfloat16, float16 or float64; M and N may differ.
        sigma: positive.

    Returns:
        A float64 scalar (float32 on MPS).

    Raises:
        ValueError: too few samples (one on each side, or two if unbiased), different dimensions or devices, NaN or infinity, or sigma
            out of range.
        TypeError: not a floating-point tensor.
    """
    name = "gaussian_mmd"
    _check_sigma(name, sigma)
    real = finite_features(name, real, None)
    fake = finite_features(name, fake, real.shape[1])
    if min(len(real), len(fake)) < 1 + unbiased:
        raise ValueError(f"{name}: there must be at least {1 + unbiased} samples on each side, got {len(real)} and {len(fake)}.")
    if real.device != fake.device:
        raise ValueError(f"{name}: real and fake must be on one device, got {real.device} and {fake.device}.")
    return _mmd(real, fake, sigma, unbiased)


class MaximumMeanDiscrepancy(TwoSampleMetric):
    """With features of CLIP, CMMD; Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (2023).

    Equivalent to:
        value = scale * gaussian_mmd(F.normalize(real), F.normalize(fake), sigma=sigma, unbiased=unbiased)

    of all samples, without normalization if not `normalize`. The defaults are those of the paper.

    Args:
        extractor: as in `FrechetDistance`.
        sigma: of the kernel exp(-|x - y|^2 / (2 sigma^2)).
        scale: factor of the value.
        unbiased: leave out pairs of a sample with itself.
        normalize: normalize features to length 1.
        reset_real: whether `reset` removes the real samples too.
        device: device of the stored features; None for that of the first features.

    Attributes:
        real, fake: the stored features, each with `.features` [N, d] and `.count`.

    Raises:
        ValueError: sigma or scale out of range.
    """

    real: FeatureRows
    fake: FeatureRows

    def __init__(
        self,
        extractor: Callable[[Any], Any] | None = None,
        *,
        sigma: float = 10.0,
        scale: float = 1000.0,
        unbiased: bool = False,
        normalize: bool = True,
        reset_real: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        _check_sigma("MaximumMeanDiscrepancy", sigma)
        if not 0 < scale < math.inf:
            raise ValueError(f"MaximumMeanDiscrepancy: scale must be positive and finite, got {scale!r}.")
        super().__init__(extractor, FeatureRows(device=device), FeatureRows(device=device), reset_real)
        self.sigma = sigma
        self.scale = scale
        self.unbiased = unbiased
        self.normalize = normalize

    def compute(self) -> Tensor:
        """The value, a float64 scalar (float32 on MPS).

        Raises:
            ValueError: no real or no generated samples; fewer than two if unbiased.
        """
        self._require(1 + self.unbiased)
        real, fake = self.real.features, self.fake.features.to(self.real.device)
        if self.normalize:
            dtype = working_dtype(real.device)
            real, fake = normalized(real.to(dtype), 1), normalized(fake.to(dtype), 1)
        return self.scale * _mmd(real, fake, self.sigma, self.unbiased)


def _check_sigma(name: str, sigma: float) -> None:
    if not 0 < sigma < math.inf:
        raise ValueError(f"{name}: sigma must be positive and finite, got {sigma!r}.")


def _mmd(real: Tensor, fake: Tensor, sigma: float, unbiased: bool) -> Tensor:
    # Differences from a common center are exact enough where the features lie far from the origin.
    center = real.to(working_dtype(real.device)).mean(0)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - center, y - center
        squared = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x.mm(y.T)
        return squared.clamp_(min=0).mul_(-0.5 / sigma**2).exp_()

    return squared_mmd(real, fake, kernel, unbiased=unbiased)
