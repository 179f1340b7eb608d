# SPDX-License-Identifier: Apache-2.0
"""Base class of metrics that compare real and generated samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import all_gather_ints, world_size
from .._errors import reason
from .._modes import evaluating
from ._features import FeatureStore, only_output


class TwoSampleMetric(nn.Module):
    """Stores the features of real and generated samples; a subclass computes the metric from `self.real` and `self.fake`.

    The extractor is not a submodule: `state_dict` holds features or moments only, and `train()` and `eval()` do not reach it.
    `.to(device)` moves it with the metric.
    """

    real: FeatureStore
    fake: FeatureStore

    def __init__(self, extractor: Callable[[Any], Any] | None, real: FeatureStore, fake: FeatureStore, reset_real: bool) -> None:
        super().__init__()
        if extractor is not None and not callable(extractor):
            raise TypeError(f"{type(self).__name__}: extractor must be None or callable, got {type(extractor).__name__}.")
        self._extractor = (extractor,)
        self.real = real
        self.fake = fake
        self.reset_real = reset_real

    @property
    def extractor(self) -> Callable[[Any], Any] | None:
        return self._extractor[0]

    def update(self, x: Any, real: bool) -> None:
        """Add a batch.

        Args:
            x: input of the extractor; without one, features [N, d], or [B, d, H, W], which are averaged over positions.
            real: whether the samples are real or generated.

        Raises:
            ValueError: features of another dimension than before, of another shape, or NaN or infinite. The batch is not added.
            TypeError: features that are not a floating-point tensor, or a `real` that is not a bool.
            RuntimeError: after `sync`, without `reset`.
        """
        if not isinstance(real, bool):
            raise TypeError(f"{type(self).__name__}: real must be True or False, got {real!r}.")
        features = x if self.extractor is None else self._extract(x)
        self._check_dim(features)
        (self.real if real else self.fake).update(features)

    def reset(self) -> None:
        """Remove the generated samples, and the real ones unless `reset_real` is False."""
        self.fake.reset()
        if self.reset_real:
            self.real.reset()

    def merge(self, other: "TwoSampleMetric") -> None:
        """Add the samples of `other`, a metric of the same class, which is not changed.

        Raises:
            TypeError: another class.
            ValueError: features of another dimension.
            RuntimeError: after `sync`, without `reset`.
        """
        if type(other) is not type(self):
            raise TypeError(f"{type(self).__name__}: only the same metric can be merged, got {type(other).__name__}.")
        for store in (self.real, self.fake):
            for added in (other.real, other.fake):
                if store.dim is not None and added.dim is not None and store.dim != added.dim:
                    raise ValueError(f"{type(self).__name__}: merged features must have one dimension, got {store.dim} and {added.dim}.")
        for store, added in ((self.real, other.real), (self.fake, other.fake)):
            if added.count:
                store.check_not_synced()
        self.real.merge(other.real)
        self.fake.merge(other.fake)

    def sync(self, group: Any = None) -> None:
        """Gather the samples of all ranks on every rank; every rank must call it. Does nothing without torch.distributed.

        Real samples that are kept through `reset` are gathered once.

        Raises:
            RuntimeError: on every rank, if one calls `sync` twice without `reset`, which would count samples twice.
            ValueError: on every rank, if the dimensions of features differ.
        """
        if world_size(group) == 1:
            return
        if len({real for (real,) in all_gather_ints([self.real.is_synced], group)}) > 1:
            raise RuntimeError(f"{type(self).__name__}: the real samples are synchronized on some ranks only; call reset() on all.")
        self.fake.sync(group)
        if not self.real.is_synced:
            self.real.sync(group)

    def _check_dim(self, features: Any) -> None:
        """Raise ValueError unless real and generated features have the same dimension; `update` of the store checks the rest."""
        known = self.real.dim or self.fake.dim
        if isinstance(features, Tensor) and features.dim() in (2, 4) and known not in (None, features.shape[1]):
            raise ValueError(f"{type(self).__name__}: features must have {known} dimensions like those before, got {features.shape[1]}.")

    def _require(self, needed: int, purpose: str = "it") -> None:
        """Raise ValueError unless there are `needed` real and `needed` generated samples."""
        for side, store in (("real", self.real), ("generated", self.fake)):
            if store.count < needed:
                raise ValueError(f"{type(self).__name__}: {purpose} needs at least {needed} {side} samples, got {store.count}.")

    def _extract(self, x: Any) -> Tensor:
        assert self.extractor is not None
        name = type(self).__name__
        with torch.no_grad(), evaluating(self.extractor):
            try:
                output = self.extractor(x)
            except RuntimeError as error:
                if not isinstance(x, Tensor) or x.is_floating_point():
                    raise
                rule = f"{name}: the extractor must take x as it is, got {x.dtype} and an extractor that fails on it"
                raise RuntimeError(f"{rule} ({reason(error)}); many take floats, such as x / 255.") from error
            return only_output(f"{name}: the extractor", output)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TwoSampleMetric":
        if isinstance(self.extractor, nn.Module):
            self.extractor._apply(fn)
        return super()._apply(fn, recurse)
