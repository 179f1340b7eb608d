# SPDX-License-Identifier: Apache-2.0
"""Streaming mean and covariance of features."""

from typing import Any

import torch
from torch import Tensor

from .._distributed import all_gather_ints, all_gather_rows, all_reduce_sum, world_size
from ._features import FeatureStore

# Rows per matrix product; with fewer, reading and writing the [d, d] sums would dominate.
_BLOCK_ROWS = 1024


class FeatureMoments(FeatureStore):
    """Mean and covariance of features that come in batches, in float64.

    Equivalent to:
        features = torch.cat(batches).double()                                   # [N, d]
        mean = features.mean(0)
        cov = torch.cov(features.T, correction=1 if unbiased else 0)

    in memory independent of N. Sums are of differences from a shift near the mean, combined by the formula of Chan, Golub and
    LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1979): sums of raw second moments
    lose digits where the mean is large compared with the standard deviation. Features are buffered until there are enough for
    an efficient matrix product. The result depends on the split into batches only up to rounding.

    `state_dict` holds the sums of all features so far, and can be loaded by an instance with `dim=None`.

    Args:
        dim: d; None for that of the first features.
        unbiased: whether to divide by N - 1, as numpy.cov and most evaluators do; False divides by N, as StyleGAN does.
        device: device of the sums; None for that of the first features. Features are moved there. With features on MPS, which
            has no float64, the sums are on the CPU.

    Attributes:
        count: N, an int.
        mean: [d], float64.
        cov: [d, d], float64, exactly symmetric.
        dim: d, or None while unknown.

    Raises:
        ValueError: an argument out of range; `mean` without samples; `cov` with fewer than two samples (one if not unbiased).
    """

    def __init__(self, dim: int | None = None, *, unbiased: bool = True, device: torch.device | str | None = None) -> None:
        super().__init__(dim, device)
        self.unbiased = unbiased
        self.reset()

    @property
    def count(self) -> int:
        return self._count + self._pending_rows

    @property
    def dim(self) -> int | None:
        if self._pending:
            return self._pending[0].shape[1]
        return len(self.shift) or self._given_dim

    @property
    def mean(self) -> Tensor:
        self._require(1, "a mean")
        self._flush()
        return self.shift + self.offset

    @property
    def cov(self) -> Tensor:
        self._require(2 if self.unbiased else 1, "an unbiased covariance" if self.unbiased else "a covariance")
        self._flush()
        cov = self.scatter / (self._count - self.unbiased)
        return (cov + cov.T) / 2

    def update(self, features: Tensor) -> "FeatureMoments":
        """Add a batch of features.

        Args:
            features: [N, d], or [B, d, H, W], which are averaged over positions; float32, bfloat16, float16 or float64. N
                may be 0. They are detached.

        Raises:
            ValueError: another d than before, another shape, NaN or infinity. The batch is not added.
            TypeError: not a floating-point tensor.
            RuntimeError: after `sync`, without `reset`.
        """
        # Sums created under inference_mode could not be updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            rows = self._take_rows(features, self.dim)
            if not len(rows):
                return self
            if self._pending and self._pending[0].dtype != rows.dtype:
                self._flush()
            if self._pending_rows + len(rows) < _BLOCK_ROWS:
                self._pending.append(rows.clone())
                self._pending_rows += len(rows)
                return self
            if self._pending:
                room = _BLOCK_ROWS - self._pending_rows
                self._pending.append(rows[:room])
                self._pending_rows += room
                self._flush()
                rows = rows[room:]
            while len(rows) >= _BLOCK_ROWS:
                self._add_block(rows[:_BLOCK_ROWS])
                rows = rows[_BLOCK_ROWS:]
            if len(rows):
                self._pending.append(rows.clone())
                self._pending_rows = len(rows)
        return self

    def merge(self, other: "FeatureMoments") -> "FeatureMoments":
        """Add the features of `other`, which is not changed.

        Raises:
            ValueError: features of another dimension.
            TypeError: not a FeatureMoments.
            RuntimeError: after `sync`, without `reset`.
        """
        if not isinstance(other, FeatureMoments):
            raise TypeError(f"FeatureMoments: only FeatureMoments can be merged, got {type(other).__name__}.")
        if self.dim is not None and other.dim is not None and self.dim != other.dim:
            raise ValueError(f"FeatureMoments: merged moments must have one dimension, got {self.dim} and {other.dim}.")
        if not other.count:
            return self
        self.check_not_synced()
        with torch.inference_mode(False), torch.no_grad():
            self._flush()
            other._flush()
            if not self._is_placed and not self._count:
                self._move(other.device)
            shift, offset, scatter = (t.to(self._device) for t in (other.shift, other.offset, other.scatter))
            if not self._count:
                self._count, self.shift, self.offset, self.scatter = other._count, shift.clone(), offset.clone(), scatter.clone()
            else:
                self._join(other._count, (shift - self.shift) + offset, scatter)
        return self

    def sync(self, group: Any = None) -> "FeatureMoments":
        """Combine the features of all ranks, with the same result on each; every rank must call it.

        Counts may differ, and may be 0. Does nothing without torch.distributed.

        Raises:
            RuntimeError: on every rank, if one calls `sync` twice without `reset`, which would count samples twice.
            ValueError: on every rank, if the dimensions of features differ.
        """
        if world_size(group) == 1:
            return self
        self._start_sync(group)
        with torch.inference_mode(False), torch.no_grad():
            self._flush()
            gathered = all_gather_ints([self._count, len(self.shift)], group)
            counts = [count for count, _ in gathered]
            dims = sorted({dim for count, dim in gathered if count})
            if len(dims) > 1:
                raise ValueError(f"FeatureMoments: features must have the same dimension on all ranks, got {dims}.")
            self._synced = True
            if not dims:
                return self
            if not self._count:
                self._allocate(dims[0])
            # All ranks adopt the shift of the first rank with samples; only offsets and one [d, d] sum are communicated.
            first = next(rank for rank, count in enumerate(counts) if count)
            shifts, offsets = (all_gather_rows(t[None], [1] * len(counts), group) for t in (self.shift, self.offset))
            offsets = offsets + (shifts - shifts[first])
            weights = torch.tensor(counts, dtype=torch.float64, device=self._device)
            offset = weights @ offsets / sum(counts)
            delta = offsets[torch.distributed.get_rank(group)] - offset
            scatter = self.scatter.addr(delta, delta, alpha=self._count)
            self.scatter = all_reduce_sum(scatter, group)
            self.shift, self.offset, self._count = shifts[first], offset, sum(counts)
        return self

    def reset(self) -> None:
        """Remove all features; `dim` is kept only if it was given."""
        self._synced = False
        self._pending: list[Tensor] = []
        self._pending_rows = 0
        self._allocate(self._given_dim or 0)

    def _allocate(self, dim: int) -> None:
        self._count = 0
        # Not buffers, which DistributedDataParallel would overwrite with those of the first rank.
        with torch.inference_mode(False):
            self.shift = torch.zeros(dim, dtype=torch.float64, device=self._device)
            self.offset = torch.zeros_like(self.shift)
            self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self._device)

    def _require(self, samples: int, what: str) -> None:
        if self.count < samples:
            raise ValueError(f"FeatureMoments: {what} needs at least {samples} sample{'s' * (samples > 1)}, got {self.count}.")

    def _flush(self) -> None:
        """Add the buffered features to the sums."""
        if self._pending:
            with torch.inference_mode(False), torch.no_grad():
                self._add_block(torch.cat(self._pending))
            self._pending, self._pending_rows = [], 0

    def _add_block(self, rows: Tensor) -> None:
        rows = rows.to(torch.float64)
        if not self._count:
            if not len(self.shift):
                self._allocate(rows.shape[1])
            self.shift = rows.mean(0)
        # The difference of nearby numbers is exact.
        rows = rows - self.shift
        offset = rows.mean(0)
        rows -= offset
        self._join(len(rows), offset, rows.T @ rows)

    def _join(self, count: int, offset: Tensor, scatter: Tensor) -> None:
        """Add `count` samples with mean shift + offset, and `scatter`, the sum of outer products of differences from that mean."""
        total = self._count + count
        delta = offset - self.offset
        self.scatter = (self.scatter + scatter).addr_(delta, delta, alpha=self._count * count / total)
        self.offset = self.offset + delta * (count / total)
        self._count = total

    def _device_for(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if device.type == "mps" else device

    def _place(self, device: torch.device) -> None:
        self.shift, self.offset, self.scatter = (t.to(device) for t in (self.shift, self.offset, self.scatter))
        self._pending = [t.to(device) for t in self._pending]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._flush()
        destination.update({prefix + name: getattr(self, name) for name in ("shift", "offset", "scatter")})
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "count"] = torch.tensor(self._count)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = ("count", "shift", "offset", "scatter")
        missing_keys, errors = args[2], args[4]
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent:
            missing_keys += absent
            return
        count, shift, offset, scatter = (state_dict[prefix + name] for name in names)
        dim = shift.numel()
        shapes = [tuple(t.shape) for t in (count, shift, offset, scatter)]
        if shapes != [(), (dim,), (dim,), (dim, dim)] or (dim == 0 and count > 0):
            errors.append(f"FeatureMoments: {', '.join(names)} of the state must have shapes [], [d], [d], [d, d], got {shapes}.")
            return
        if self._given_dim not in (None, dim):
            errors.append(f"FeatureMoments: the state must have {self._given_dim} dimensions, got {dim}.")
            return
        self._start_load(state_dict, prefix, shift.device)
        self.shift, self.offset, self.scatter = (t.detach().to(self._device, torch.float64, copy=True) for t in (shift, offset, scatter))
        self._count = int(count)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The sums were buffers in earlier releases."""
        super().__setstate__({**state, **state["_buffers"], "_buffers": {}})

    def extra_repr(self) -> str:
        return f"dim={self.dim}, count={self.count}, unbiased={self.unbiased}"
