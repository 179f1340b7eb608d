# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance between real and generated samples, as a metric."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._choices import Impl
from ._two_samples import TwoSampleMetric
from .feature_moments import FeatureMoments
from .frechet_reference import FrechetReference


class FrechetDistance(TwoSampleMetric):
    """Frechet distance between Gaussians fitted to real and generated features.

    With features of an Inception network this is the FID of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule"
    (2017). Moments are float64, the distance is never negative, and there may be fewer samples than dimensions.

        metric = FrechetDistance(extractor)
        for images in real: metric.update(images, real=True)
        for images in generated: metric.update(images, real=False)
        fid = metric.compute()

    Under torch.distributed each rank updates with its own samples, and all ranks call `sync()` once before `compute()`, which
    does not communicate.

    Args:
        extractor: a callable, images -> features [N, d] or [B, d, H, W], possibly in a list or tuple of one. It is called
            with the input of `update`, which is not moved, without gradients; a module is in evaluation mode during the call.
            None: `update` takes features.
        reference: statistics of the real samples, a FrechetReference or the path of a statistics file. With a reference, real
            samples raise a ValueError in updates, merged metrics and states.
        dim: d; None for that of the reference or of the first features.
        reset_real: whether `reset` removes the real samples too.
        unbiased: whether to divide covariances by N - 1; False divides by N, as StyleGAN does.
        device: device of moments and reference; None for that of the first features.

    Attributes:
        real, fake: FeatureMoments.
        reference: the FrechetReference, or None.

    Raises:
        ValueError: a dim other than the reference's, or a file without statistics.
        FileNotFoundError: no such file.
    """

    real: FeatureMoments
    fake: FeatureMoments

    def __init__(
        self,
        extractor: Callable[[Any], Any] | None = None,
        *,
        reference: FrechetReference | str | os.PathLike[str] | None = None,
        dim: int | None = None,
        reset_real: bool = True,
        unbiased: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if reference is not None and not isinstance(reference, FrechetReference):
            reference = FrechetReference.load(reference)
        if reference is not None:
            if dim not in (None, reference.dim):
                raise ValueError(f"FrechetDistance: dim must be that of the reference, {reference.dim}, got {dim}.")
            dim = reference.dim
        real, fake = (FeatureMoments(dim, unbiased=unbiased, device=device) for _ in range(2))
        super().__init__(extractor, real, fake, reset_real)
        self.reference = reference

    def update(self, x: Any, real: bool) -> None:
        if real is True and self.reference is not None:
            raise ValueError("FrechetDistance: the real samples are those of the reference, got an update with real=True.")
        super().update(x, real)

    def merge(self, other: TwoSampleMetric) -> None:
        if self.reference is not None and isinstance(other, FrechetDistance) and other.real.count:
            raise ValueError(f"FrechetDistance: the real samples are those of the reference, got {other.real.count} to merge.")
        super().merge(other)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors, count = args[4], int(state_dict.get(prefix + "real.count", 0))
        if self.reference is not None and count:
            errors.append(f"FrechetDistance: the real samples are those of the reference, got a state with {count}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compute(self, *, impl: Impl | None = None) -> Tensor:
        """The distance between the samples so far, a scalar of float64 or of the reference's dtype.

        Args:
            impl: as in `genperf.frechet_distance`.

        Raises:
            ValueError: fewer than two real or two generated samples (one if not unbiased).
        """
        needed = 2 if self.fake.unbiased else 1
        if self.reference is not None:
            if self.fake.count < needed:
                raise ValueError(f"FrechetDistance: it needs at least {needed} generated samples, got {self.fake.count}.")
            # The moments may have moved to another device since.
            self.reference = self.reference.to(self.fake.device)
            return self.reference.distance(self.fake.mean, self.fake.cov, impl=impl)
        self._require(needed)
        fake_mean, fake_cov = (t.to(self.real.device) for t in (self.fake.mean, self.fake.cov))
        return ops.frechet_distance(self.real.mean, self.real.cov, fake_mean, fake_cov, impl=impl)
