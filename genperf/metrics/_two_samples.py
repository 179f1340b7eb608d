"""What metrics that compare real with generated samples share: where features come from, and where they go."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import gather_numbers, world_size
from ._features import FeatureStore, only_output


class TwoSampleMetric(nn.Module):
    """Keeps features of real and of generated samples apart; a subclass computes from `self.real` and `self.fake`.

    The extractor is not a submodule: `state_dict` holds features or their moments only, and `train()` and `eval()` leave the extractor
    alone. `.to(device)` moves it with the metric.
    """

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
        """Take in a batch.

        Args:
            x: what the extractor takes, or, without one, features [N, d] or [B, d, H, W], which are averaged over positions.
            real: whether the samples are real ones.

        Raises:
            ValueError: features of another dimension than before, of another shape, NaN or infinite; nothing of such a
                batch is counted.
            TypeError: no floating-point tensor, or a `real` that is neither True nor False.
            RuntimeError: after a `sync`, without a `reset` in between.
        """
        if not isinstance(real, bool):
            raise TypeError(f"{type(self).__name__}: real must be True or False, got {real!r}.")
        features = x if self.extractor is None else self._extract(x)
        self._check_dim(features)
        (self.real if real else self.fake).update(features)

    def reset(self) -> None:
        """Forget the generated samples, and the real ones too unless `reset_real` is False."""
        self.fake.reset()
        if self.reset_real:
            self.real.reset()

    def merge(self, other: "TwoSampleMetric") -> None:
        """Take in what `other`, a metric of the same class, has taken in; it stays as it is.

        Raises:
            TypeError: another class.
            ValueError: features of another dimension.
            RuntimeError: after a `sync`, without a `reset` in between.
        """
        if type(other) is not type(self):
            raise TypeError(f"{type(self).__name__}: only the same metric can be merged, got {type(other).__name__}.")
        for mine in (self.real, self.fake):
            for theirs in (other.real, other.fake):
                if mine.dim is not None and theirs.dim is not None and mine.dim != theirs.dim:
                    raise ValueError(f"{type(self).__name__}: merged features must have one dimension, got {mine.dim} and {theirs.dim}.")
        for mine, theirs in ((self.real, other.real), (self.fake, other.fake)):
            if theirs.count:
                mine.check_not_synced()
        self.real.merge(other.real)
        self.fake.merge(other.fake)

    def sync(self, group: Any = None) -> None:
        """Take in what all processes of torch.distributed have; every process must call it, and then holds the same.

        Real samples that stay through `reset` are exchanged once. Without torch.distributed nothing happens.

        Raises:
            RuntimeError: a process synchronized before and did not reset, which would count its samples twice; on every process.
            ValueError: features of different dimensions, on every process.
        """
        if world_size(group) == 1:
            return
        if len({real for (real,) in gather_numbers([self.real.is_synced], group)}) > 1:
            raise RuntimeError(f"{type(self).__name__}: some processes hold the real samples of all, and others only theirs; reset() each.")
        self.fake.sync(group)
        if not self.real.is_synced:
            self.real.sync(group)

    def _check_dim(self, features: Any) -> None:
        """Real and generated features must be of one dimension; what else is wrong with them shows later."""
        known = self.real.dim or self.fake.dim
        if isinstance(features, Tensor) and features.dim() in (2, 4) and known not in (None, features.shape[1]):
            raise ValueError(f"{type(self).__name__}: features must have {known} dimensions as those before, got {features.shape[1]}.")

    def _require(self, needed: int, purpose: str = "it") -> None:
        """A sentence where there are fewer than `needed` samples on a side."""
        for side, store in (("real", self.real), ("generated", self.fake)):
            if store.count < needed:
                raise ValueError(f"{type(self).__name__}: {purpose} needs at least {needed} {side} samples, got {store.count}.")

    def _extract(self, x: Any) -> Tensor:
        with torch.no_grad(), evaluating(self.extractor):
            return only_output(f"{type(self).__name__}: the extractor", self.extractor(x))

    def _apply(self, fn: Callable, recurse: bool = True) -> "TwoSampleMetric":
        if isinstance(self.extractor, nn.Module):
            self.extractor._apply(fn)
        return super()._apply(fn, recurse)


@contextmanager
def evaluating(extractor: object) -> Iterator[None]:
    """Every submodule in evaluation mode, and afterwards each in the mode it was in."""
    modules = [m for m in extractor.modules() if m.training] if isinstance(extractor, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
