# SPDX-License-Identifier: Apache-2.0
"""What a `FrechetLoss` keeps for one reference: its statistics, and the history of generated features."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._choices import Impl, Precision
from ..metrics._sample_moments import Moments, population_moments, sample_moments
from ..ops.covariance_factor import working_dtype
from ..ops.frechet_distance import frechet_distance


class StatisticsModule(nn.Module):
    """A module whose tensors move to other devices but keep their dtype (float64 becomes float32 on MPS).

    The attributes named in HISTORY are moved, saved and loaded as persistent buffers are. They are none, since
    DistributedDataParallel would overwrite those of each rank by those of the first.
    """

    HISTORY: tuple[str, ...] = ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "StatisticsModule":
        for child in self.children():
            child._apply(fn)
        with self._history_as_buffers():
            for name, buffer in self.named_buffers(recurse=False):
                device = fn(torch.empty(0, device=buffer.device)).device
                self._buffers[name] = buffer.to(device, working_dtype(device) if buffer.dtype == torch.float64 else buffer.dtype)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        with self._history_as_buffers():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._history_as_buffers():
            super()._load_from_state_dict(*args)

    @contextlib.contextmanager
    def _history_as_buffers(self) -> Iterator[None]:
        names = [name for name in self.HISTORY if name in self.__dict__]
        self._buffers.update({name: self.__dict__.pop(name) for name in names})
        try:
            yield
        finally:
            self.__dict__.update({name: self._buffers.pop(name) for name in names})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The history was a set of buffers in earlier releases."""
        buffers = dict(state["_buffers"])
        history = {name: buffers.pop(name) for name in self.HISTORY if name in buffers}
        super().__setstate__({**state, **history, "_buffers": buffers})


class FeatureDistance(StatisticsModule):
    """The Frechet distance to one reference, from the batch and its history: a queue, moving averages or none.

    Each step calls `past` and `step` with its result, `distance`, and `commit`, which adds the batch to the history.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, factor: Tensor, queue_size: int, momentum: float | None, unbiased: bool) -> None:
        super().__init__()
        dtype = working_dtype(mean.device)
        mean = mean.detach().to(dtype)
        self.unbiased = unbiased
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("factor", factor.detach().to(mean.device, dtype, copy=True), persistent=False)
        self.history: FeatureQueue | MovingMoments | None = None
        if queue_size:
            self.history = FeatureQueue(queue_size, mean, unbiased)
        elif momentum is not None:
            self.history = MovingMoments(momentum, mean, unbiased)

    def past(self, count: int) -> Any:
        """What the distance of a batch of `count` samples needs of the history; `commit` overwrites it."""
        return None if self.history is None else self.history.past(count)

    def step(self, features: Tensor, past: Any) -> Any:
        """The state after this batch, for `distance` and `commit`."""
        x = features.to(self.mean.dtype)
        return x if self.history is None else self.history.step(x, past)

    def distance(self, step: Any, past: Any, precision: Precision, impl: Impl | None) -> Tensor:
        moments = batch_moments(step, self.unbiased) if self.history is None else self.history.moments(step, past)
        return frechet_distance(
            moments.mean,
            moments.cov,
            self.mean,
            None,
            factor1=moments.factor,
            factor2=self.factor,
            precision=precision,
            impl=impl,
        )

    @torch.no_grad()
    def commit(self, step: Any) -> None:
        if self.history is not None:
            self.history.commit(step)


class QueuedMoments(NamedTuple):
    mean: Tensor  # [d]
    cov: Tensor  # [d, d], of the queue as a population
    count: int


class FeatureQueue(StatisticsModule):
    """A ring buffer of the last features, with running sums of their moments if it can hold as many features as dimensions.

    With fewer features the distance uses a factor of the covariance, which is computed from the features themselves.
    """

    HISTORY = ("features", "cursor", "shift", "total", "outer")

    def __init__(self, size: int, mean: Tensor, unbiased: bool) -> None:
        super().__init__()
        self.size = size
        self.unbiased = unbiased
        self.features = mean.new_zeros(size, mean.shape[0], dtype=torch.float32)
        self.cursor = torch.zeros(2, dtype=torch.int64, device=mean.device)
        # The values of `cursor` on the host, to avoid a device synchronization.
        self._position, self._filled = 0, 0
        self.has_sums = size >= mean.shape[0]
        if self.has_sums:
            # Sums of features minus a shift, so that moments do not cancel where the mean is large.
            self.shift = mean.clone()
            self.total = torch.zeros_like(mean)
            self.outer = mean.new_zeros(mean.shape[0], mean.shape[0])

    def past(self, count: int) -> Tensor | QueuedMoments:
        if not self.has_sums or self._filled == 0 or self._filled + count <= self.features.shape[1]:
            return self.features[: self._filled]
        center = self.total / self._filled
        return QueuedMoments(self.shift + center, self.outer / self._filled - torch.outer(center, center), self._filled)

    def step(self, x: Tensor, past: Tensor | QueuedMoments) -> Tensor:
        return x

    def moments(self, x: Tensor, past: Tensor | QueuedMoments) -> Moments:
        if isinstance(past, Tensor):
            return batch_moments(torch.cat([past.to(x.dtype), x]), self.unbiased)
        count = past.count + len(x)
        mean, cov = mixture(past.mean, past.cov, *population_moments(x), len(x) / count)
        return Moments(mean, cov * (count / (count - 1)) if self.unbiased else cov)

    def commit(self, x: Tensor) -> None:
        rows = x.detach().to(self.features.dtype)
        if self._filled < self.size:
            # Dropping samples synchronizes with the device. A full queue keeps the old sample in their place instead.
            rows = rows[rows.isfinite().all(1)]
        rows = rows[-self.size :]
        n = rows.shape[0]
        index = (torch.arange(n, device=rows.device) + self._position) % self.size
        old = self.features[index]
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, old)
        self.features[index] = rows
        if self.has_sums and self._position + n >= self.size:
            self._recompute_sums()
        elif self.has_sums:
            entering = rows.to(self.total.dtype) - self.shift
            leaving = old[min(n, self.size - self._filled) :].to(self.total.dtype) - self.shift
            self.total.add_(entering.sum(0) - leaving.sum(0))
            self.outer.addmm_(entering.T, entering).addmm_(leaving.T, leaving, alpha=-1)
        self._position = (self._position + n) % self.size
        self._filled = min(self._filled + n, self.size)
        self.cursor[0].fill_(self._position)
        self.cursor[1].fill_(self._filled)

    def _recompute_sums(self) -> None:
        """Sum over a full queue, to remove the rounding errors of running additions and subtractions."""
        self.total.zero_()
        self.outer.zero_()
        for rows in self.features.split(1024):
            rows = rows.to(self.total.dtype) - self.shift
            self.total.add_(rows.sum(0))
            self.outer.addmm_(rows.T, rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._position, self._filled = self.cursor.tolist()


class MovingMomentsState(NamedTuple):
    mean: Tensor  # [d]
    cov: Tensor  # [d, d], of the mixture as a population
    weights: Tensor  # [], sum of the weights, 1 - momentum ** steps
    squares: Tensor  # [], sum of the squared sample weights, the inverse of the effective number of samples


class MovingMoments(StatisticsModule):
    """Moments of the mixture of all batches so far, in which each batch has `momentum` times the weight of the next."""

    HISTORY = ("mean", "cov", "weights", "squares")

    def __init__(self, momentum: float, mean: Tensor, unbiased: bool) -> None:
        super().__init__()
        self.momentum = momentum
        self.unbiased = unbiased
        self.mean = torch.zeros_like(mean)
        self.cov = mean.new_zeros(mean.shape[0], mean.shape[0])
        self.weights = mean.new_zeros(())
        self.squares = mean.new_zeros(())

    def past(self, count: int) -> MovingMomentsState:
        return MovingMomentsState(self.mean, self.cov, self.weights, self.squares)

    def step(self, x: Tensor, past: MovingMomentsState) -> MovingMomentsState:
        weights = self.momentum * past.weights + (1 - self.momentum)
        weight = (1 - self.momentum) / weights  # 1 at the first step
        mean, cov = mixture(past.mean, past.cov, *population_moments(x), weight)
        return MovingMomentsState(mean, cov, weights, (1 - weight) ** 2 * past.squares + weight**2 / x.shape[0])

    def moments(self, step: MovingMomentsState, past: MovingMomentsState) -> Moments:
        if not self.unbiased:
            return Moments(step.mean, step.cov)
        rest = 1 - step.squares
        return Moments(step.mean, step.cov / torch.where(rest > 0, rest, 1))

    def commit(self, step: MovingMomentsState) -> None:
        finite = step.mean.isfinite().all() & step.cov.isfinite().all()
        for name, value in step._asdict().items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, value.detach(), buffer))


def batch_moments(x: Tensor, unbiased: bool) -> Moments:
    return sample_moments("FrechetLoss", x, unbiased and len(x) > 1)


def mixture(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """Moments of a mixture of two populations, `weight` that of the second, without cancellation."""
    difference = mean2 - mean1
    between = weight * (1 - weight) * torch.outer(difference, difference)
    return mean1 + weight * difference, (1 - weight) * cov1 + weight * cov2 + between
