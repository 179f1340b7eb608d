# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, density and coverage of generated samples."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.covariance_factor import working_dtype
from ._feature_rows import FeatureRows
from ._features import finite_features, whole_number
from ._two_samples import TwoSampleMetric

# Rows and columns per block of the distance matrix.
_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 4096


class PrecisionRecallScores(NamedTuple):
    """float64 scalars (float32 on MPS)."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def precision_recall(
    real: Tensor,  # [M, d]
    fake: Tensor,  # [N, d]
    *,
    k: int = 3,
) -> PrecisionRecallScores:
    """Precision, recall, density and coverage from balls around the samples, with the k-th nearest neighbor on the boundary.

    Equivalent to:
        def radius(x): return torch.cdist(x, x).fill_diagonal_(inf).kthvalue(k).values
        distance = torch.cdist(real, fake)                                           # [M, N]
        in_real, in_fake = distance <= radius(real)[:, None], distance <= radius(fake)
        precision = in_real.any(0).double().mean()                                   # generated samples in a real ball
        recall = in_fake.any(1).double().mean()                                      # real samples in a generated ball
        density = in_real.double().sum() / (k * N)
        coverage = in_real.any(1).double().mean()                                    # real balls with a generated sample

    Precision and recall: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019). Density and
    coverage: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (2020). Balls are closed, so an exact
    copy of a sample counts; the package prdc excludes points on the boundary.

    Distances are computed in float64 block by block, without an M x N matrix, from features minus their common mean, so that
    features far from the origin lose no precision. Distances that differ by no more than rounding count as equal.

    Args:
        real, fake: float32, bfloat16, float16 or float64; M and N may differ.
        k: number of the neighbor, not counting the sample itself; 3 in the paper on precision and recall, 5 in that on
            density and coverage.

    Raises:
        ValueError: k or fewer real or fake samples, different dimensions, or NaN or infinity.
        TypeError: not a floating-point tensor.
    """
    name = "precision_recall"
    k = whole_number(name, "k", k, 1)
    real = finite_features(name, real, None)
    fake = finite_features(name, fake, real.shape[1])
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{name}: there must be more than k={k} samples on each side, got {len(real)} and {len(fake)}.")
    if real.device != fake.device:
        raise ValueError(f"{name}: real and fake must be on one device, got {real.device} and {fake.device}.")
    return _scores(real, fake, k)


class PrecisionRecall(TwoSampleMetric):
    """Precision, recall, density and coverage of generated samples; see `precision_recall`.

    Args:
        extractor: as in `FrechetDistance`.
        k: number of the neighbor on the boundary of a ball.
        reset_real: whether `reset` removes the real samples too.
        device: device of the stored features; None for that of the first features.

    Attributes:
        real, fake: the stored features, each with `.features` [N, d] and `.count`.

    Raises:
        ValueError: a k below 1.
    """

    real: FeatureRows
    fake: FeatureRows

    def __init__(
        self,
        extractor: Callable[[Any], Any] | None = None,
        *,
        k: int = 3,
        reset_real: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        k = whole_number("PrecisionRecall", "k", k, 1)
        super().__init__(extractor, FeatureRows(device=device), FeatureRows(device=device), reset_real)
        self.k = k

    def compute(self) -> PrecisionRecallScores:
        """The four scores, also by name: `.precision`, `.recall`, `.density`, `.coverage`.

        Raises:
            ValueError: k or fewer real or generated samples.
        """
        self._require(self.k + 1, f"the neighbor k={self.k}")
        return _scores(self.real.features, self.fake.features.to(self.real.device), self.k)


@torch.no_grad()
def _scores(real: Tensor, fake: Tensor, k: int) -> PrecisionRecallScores:
    dtype = working_dtype(real.device)
    center = (real.mean(0, dtype=dtype) * len(real) + fake.mean(0, dtype=dtype) * len(fake)) / (len(real) + len(fake))
    real_points, fake_points = _Points(real, center), _Points(fake, center)
    real_radii, fake_radii = real_points.squared_radii(k), fake_points.squared_radii(k)

    precise = torch.zeros(len(fake), dtype=torch.bool, device=center.device)
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=center.device) for _ in range(2))
    pairs = torch.zeros((), dtype=torch.int64, device=center.device)
    for i, j, square, rounding in real_points.distances(fake_points):
        square -= rounding
        in_real = square <= real_radii[i][:, None]
        precise[j] |= in_real.any(0)
        covered[i] |= in_real.any(1)
        pairs += in_real.sum()
        recalled[i] |= (square <= fake_radii[j]).any(1)
    means = [t.to(dtype).mean() for t in (precise, recalled, covered)]
    return PrecisionRecallScores(means[0], means[1], pairs.to(dtype) / (k * len(fake)), means[2])


class _Points:
    """Features minus a center, computed block by block."""

    def __init__(self, features: Tensor, center: Tensor) -> None:
        self.features, self.center = features, center
        self.norms = torch.cat([self[i].square().sum(1) for i in self.blocks(_BLOCK_COLUMNS)])

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.features[rows].to(self.center.dtype) - self.center

    def blocks(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def distances(self, other: "_Points") -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Blocks (rows, columns, squared distances, bound on their rounding error)."""
        # Each of d products and sums, and each subtraction of the center, rounds by at most eps / 2.
        unit = (len(self.center) + 8) * torch.finfo(self.center.dtype).eps
        for i in self.blocks(_BLOCK_ROWS):
            rows = self[i]
            for j in other.blocks(_BLOCK_COLUMNS):
                norms = self.norms[i][:, None] + other.norms[j]
                yield i, j, torch.addmm(norms, rows, other[j].T, alpha=-2), unit * norms

    def squared_radii(self, k: int) -> Tensor:
        """Squared distance of each sample to its k-th nearest neighbor, plus a bound on the rounding error."""
        nearest, bounds = [], []
        for i, j, square, bound in self.distances(self):
            if i.start < j.stop and j.start < i.stop:  # a block with part of the diagonal: a sample is not its own neighbor
                rows, columns = (torch.arange(part.start, part.stop, device=square.device) for part in (i, j))
                square.masked_fill_(rows[:, None] == columns, torch.inf)
            if j.start == 0:
                nearest.append(square[:, :0])
                bounds.append(square[:, :0])
            found = torch.cat([nearest[-1], square], 1)
            found, places = found.topk(min(k, found.shape[1]), largest=False)
            nearest[-1] = found
            bounds[-1] = torch.cat([bounds[-1], bound], 1).gather(1, places)
        return torch.cat(nearest)[:, k - 1] + torch.cat(bounds)[:, k - 1]
