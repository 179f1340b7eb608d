# SPDX-License-Identifier: Apache-2.0
"""The kernel inception distance between real and generated samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._feature_rows import FeatureRows
from ._features import finite_features, whole_number
from ._kernel_sums import squared_mmd
from ._two_samples import TwoSampleMetric


def polynomial_mmd(
    real: Tensor,  # [M, d]
    fake: Tensor,  # [N, d]
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy with a polynomial kernel.

    Equivalent to:
        def kernel(x, y): return (gamma * x @ y.T + coef) ** degree
        within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(real, real), kernel(fake, fake))]
        value = sum(within) - 2 * kernel(real, fake).mean()

    in float64, block by block, without an M x N kernel matrix; of the symmetric matrices half is computed. The estimate can be
    negative. Not differentiable.

    Args:
        real, fake: float32, bfloat16, float16 or float64; M and N may differ.
        degree: a positive integer.
        gamma: positive; None for 1 / d.
        coef: at least 0.

    Returns:
        A float64 scalar (float32 on MPS).

    Raises:
        ValueError: fewer than two real or two fake samples, different dimensions, NaN or infinity, or a parameter out of range.
        TypeError: not a floating-point tensor.
    """
    name = "polynomial_mmd"
    degree = _checked_degree(name, degree, gamma, coef)
    real = finite_features(name, real, None)
    fake = finite_features(name, fake, real.shape[1])
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{name}: there must be at least two samples on each side, got {len(real)} and {len(fake)}.")
    if real.device != fake.device:
        raise ValueError(f"{name}: real and fake must be on one device, got {real.device} and {fake.device}.")
    return _mmd(real, fake, degree, 1 / real.shape[1] if gamma is None else gamma, coef)


class KernelInceptionDistance(TwoSampleMetric):
    """Squared maximum mean discrepancy of features under a polynomial kernel; Binkowski et al., "Demystifying MMD GANs" (2018).

    Unlike the Frechet distance, the estimate is unbiased for any number of samples. `compute` averages over random subsets, as
    evaluators do; a seed draws the same subsets as in torchmetrics. `compute_full` uses every pair of samples once.

    Args:
        extractor: as in `FrechetDistance`.
        subsets: number of subsets.
        subset_size: number of real and of generated samples in a subset.
        degree, gamma, coef: parameters of the kernel (gamma x.y + coef)^degree; gamma=None for 1 / d.
        reset_real: whether `reset` removes the real samples too.
        device: device of the stored features; None for that of the first features.

    Attributes:
        real, fake: the stored features, each with `.features` [N, d] and `.count`.

    Raises:
        ValueError: a parameter out of range.
    """

    real: FeatureRows
    fake: FeatureRows

    def __init__(
        self,
        extractor: Callable[[Any], Any] | None = None,
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        reset_real: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        name = "KernelInceptionDistance"
        subsets = whole_number(name, "subsets", subsets, 1)
        subset_size = whole_number(name, "subset_size", subset_size, 2)
        degree = _checked_degree(name, degree, gamma, coef)
        super().__init__(extractor, FeatureRows(device=device), FeatureRows(device=device), reset_real)
        self.subsets = subsets
        self.subset_size = subset_size
        self.degree = degree
        self.gamma = gamma
        self.coef = coef

    def compute(self, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and (biased) standard deviation over the subsets, float64 scalars (float32 on MPS).

        After `sync` each rank draws its own subsets; pass generators of the same seed to get the same value on all ranks.

        Args:
            generator: CPU generator for the subsets; None for torch's default generator.

        Raises:
            ValueError: fewer real or generated samples than `subset_size`.
        """
        self._require(self.subset_size, f"a subset of {self.subset_size}")
        real, fake = self._features()
        estimates = []
        for _ in range(self.subsets):
            subset = [x[torch.randperm(len(x), generator=generator)[: self.subset_size].to(x.device)] for x in (real, fake)]
            estimates.append(_mmd(subset[0], subset[1], self.degree, self._gamma, self.coef))
        values = torch.stack(estimates)
        return values.mean(), values.std(unbiased=False)

    def compute_full(self) -> Tensor:
        """The deterministic estimate from all samples, see `polynomial_mmd`; the numbers of samples may differ.

        Raises:
            ValueError: fewer than two real or two generated samples.
        """
        self._require(2)
        return _mmd(*self._features(), self.degree, self._gamma, self.coef)

    @property
    def _gamma(self) -> float:
        return 1 / self.real.features.shape[1] if self.gamma is None else self.gamma

    def _features(self) -> tuple[Tensor, Tensor]:
        return self.real.features, self.fake.features.to(self.real.device)


def _checked_degree(name: str, degree: int, gamma: float | None, coef: float) -> int:
    """Check the parameters of the kernel, and return the degree as an int."""
    degree = whole_number(name, "degree", degree, 1)
    if gamma is not None and not gamma > 0:
        raise ValueError(f"{name}: gamma must be None or positive, got {gamma!r}.")
    if not coef >= 0:
        raise ValueError(f"{name}: coef must not be negative, got {coef!r}.")
    return degree


def _mmd(real: Tensor, fake: Tensor, degree: int, gamma: float, coef: float) -> Tensor:
    return squared_mmd(real, fake, lambda x, y: x.mm(y.T).mul_(gamma).add_(coef).pow_(degree), unbiased=True)
