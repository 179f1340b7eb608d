# SPDX-License-Identifier: Apache-2.0
"""FrechetInceptionDistance of torcheval, implemented with genperf.frechet_distance; torcheval need not be installed.

    from genperf.compat.torcheval import FrechetInceptionDistance

The methods, the names of the states and the returned values are those of upstream: states load in both directions, and where torcheval is
installed, its toolkit synchronizes ranks. Values agree up to rounding where upstream is accurate.

Differences from upstream:
  - Without a model, `update` takes features. Upstream's default model, which torchvision downloads, is
    `torcheval.metrics.image.fid.FIDInceptionV3()`; `genperf fid` computes the FID of the original weights.
  - torchvision need not be installed.
  - States are float64 (float32 on MPS); upstream's float32 sums of squares cancel if the mean is large.
  - Fewer samples than features: upstream takes roots of eigenvalues that are rounding errors. Here the rank of a covariance of
    n samples is limited to n - 1. The distance is never negative.
  - A single real or fake image raises RuntimeError; upstream returns NaN.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import warn_caller
from ..ops._validate import check
from ..ops.covariance_factor import working_dtype
from ._feature_sums import distance_of_sums

STATES = ("real_sum", "real_cov_sum", "fake_sum", "fake_cov_sum", "num_real_images", "num_fake_images")


class FrechetInceptionDistance:
    """Frechet distance between the features of real and generated images, with the interface of torcheval.

        metric = FrechetInceptionDistance(model, feature_dim)
        metric.update(images, is_real=True)
        metric.update(generated, is_real=False)
        fid = metric.compute()

    Args:
        model: a module, images [N, 3, H, W] -> features [N, feature_dim], which is moved to the device, put in evaluation mode and
            frozen; None if `update` takes features.
        feature_dim: number of features.
        device: of states and model; None for the CPU.

    Raises:
        RuntimeError: a feature_dim that is not positive.
    """

    real_sum: Tensor  # [d]
    real_cov_sum: Tensor  # [d, d]: the sum of outer products
    fake_sum: Tensor
    fake_cov_sum: Tensor
    num_real_images: Tensor
    num_fake_images: Tensor

    def __init__(self, model: nn.Module | None = None, feature_dim: int = 2048, device: torch.device | None = None) -> None:
        if not (isinstance(feature_dim, int) and feature_dim > 0):
            raise RuntimeError(f"FrechetInceptionDistance: feature_dim must be a positive integer, got {feature_dim!r}.")
        self._device = torch.device("cpu" if device is None else device)
        self.model = None if model is None else model.to(self._device).eval().requires_grad_(False)
        self.feature_dim = feature_dim
        self.reset()

    @property
    def device(self) -> torch.device:
        return self._device

    def reset(self) -> "FrechetInceptionDistance":
        """Remove all images."""
        dtype = working_dtype(self.device)
        for side in ("real", "fake"):
            setattr(self, f"{side}_sum", torch.zeros(self.feature_dim, dtype=dtype, device=self.device))
            setattr(self, f"{side}_cov_sum", torch.zeros(self.feature_dim, self.feature_dim, dtype=dtype, device=self.device))
            setattr(self, f"num_{side}_images", torch.zeros((), dtype=torch.int32, device=self.device))
        return self

    @torch.no_grad()
    def update(self, images: Tensor, is_real: bool) -> "FrechetInceptionDistance":
        """Add a batch.

        Args:
            images: [N, 3, H, W] for a model; features [N, feature_dim] without one.
            is_real: whether they are real or generated.

        Raises:
            ValueError: another shape, or an is_real that is not a bool. The batch is not added.
        """
        name = "FrechetInceptionDistance"
        check(name, "images must be a tensor", type(images).__name__, isinstance(images, Tensor))
        check(name, "is_real must be True or False", is_real, isinstance(is_real, bool))
        if self.model is not None:
            check(name, "images must have shape [N, 3, H, W]", list(images.shape), images.dim() == 4 and images.shape[1] == 3)
        features = images.to(self.device) if self.model is None else self.model(images.to(self.device))
        rule = f"features must have shape [N, {self.feature_dim}]"
        check(name, rule, list(features.shape), features.dim() == 2 and features.shape[1] == self.feature_dim)
        features = features.to(self.real_sum.dtype)
        self._add("real" if is_real else "fake", features.sum(0), features.T @ features, len(features))
        return self

    @torch.no_grad()
    def merge_state(self, metrics: Iterable[Any]) -> "FrechetInceptionDistance":
        """Add the images of other metrics, which are not changed."""
        for metric in metrics:
            for side in ("real", "fake"):
                parts = (getattr(metric, name) for name in (f"{side}_sum", f"{side}_cov_sum", f"num_{side}_images"))
                total, outer, count = (part.to(self.device) for part in parts)
                self._add(side, total, outer, count)
        return self

    def _add(self, side: str, total: Tensor, outer: Tensor, count: Tensor | int) -> None:
        for name, added in ((f"{side}_sum", total), (f"{side}_cov_sum", outer), (f"num_{side}_images", count)):
            setattr(self, name, getattr(self, name) + added)

    def _prepare_for_merge_state(self) -> None:
        """Called by torcheval's toolkit; sums need no preparation."""

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The distance between all real and all generated images since the last reset, a float32 scalar on the device.

        Without real or without generated images it is 0, with a RuntimeWarning, as upstream.

        Raises:
            RuntimeError: a single real or generated image.
        """
        counts = int(self.num_real_images), int(self.num_fake_images)
        if 0 in counts:
            rule = "there must be real and generated images; returning 0.0"
            warn_caller(f"FrechetInceptionDistance: {rule}, got {counts[0]} and {counts[1]}.", RuntimeWarning)
            return torch.tensor(0.0)
        if 1 in counts:
            raise RuntimeError(
                f"FrechetInceptionDistance: there must be at least two real and two generated images, got {counts[0]} and {counts[1]}."
            )
        real, fake = (self.real_sum, self.real_cov_sum, counts[0]), (self.fake_sum, self.fake_cov_sum, counts[1])
        return distance_of_sums(real, fake).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the states."""
        return {name: getattr(self, name).clone() for name in STATES}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load the states of this class or of torcheval's.

        Raises:
            RuntimeError: missing or unexpected names with strict, or another feature_dim. No state is changed.
        """
        missing, unexpected = set(STATES) - set(state_dict), set(state_dict) - set(STATES)
        if strict and (missing or unexpected):
            found = f"missing {sorted(missing)} and unexpected {sorted(unexpected)}"
            raise RuntimeError(f"FrechetInceptionDistance: a state must have the names {list(STATES)}, got {found}.")
        loaded = {}
        for name in set(STATES) - missing:
            own = getattr(self, name)
            value = torch.as_tensor(state_dict[name])
            if value.shape != own.shape:
                raise RuntimeError(f"FrechetInceptionDistance: {name} must have shape {list(own.shape)}, got {list(value.shape)}.")
            loaded[name] = value.detach().to(own.device, own.dtype, copy=True)
        for name, value in loaded.items():
            setattr(self, name, value)

    def to(self, device: torch.device | str, *args: Any, **kwargs: Any) -> "FrechetInceptionDistance":
        """Move states and model to a device."""
        self._device = torch.device(device)
        dtype = working_dtype(self._device)
        for name in STATES:
            value = getattr(self, name)
            setattr(self, name, value.to(self._device, dtype if value.is_floating_point() else value.dtype))
        if self.model is not None:
            self.model.to(self._device)
        return self


try:
    from torcheval.metrics.metric import Metric  # pyright: ignore[reportMissingImports]
except ImportError:
    pass
else:
    Metric.register(FrechetInceptionDistance)  # which torcheval's toolkit asks for
