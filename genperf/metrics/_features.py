# SPDX-License-Identifier: Apache-2.0
"""Checks of features, and the base class of what stores them: one rule for shapes, devices and dtypes."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import all_gather_ints
from ..ops._validate import check_float, check_tensor
from ..ops.covariance_factor import working_dtype


def feature_matrix(owner: str, x: Tensor, dim: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Features x as a matrix [N, d], differentiable. [B, d, H, W] is averaged over positions, in `dtype` or at least float32.

    Raises:
        ValueError: another shape, or d other than `dim`.
        TypeError: not a floating-point tensor.
    """
    check_tensor(owner, "features", x)
    check_float(owner, "features", x)
    if x.dim() not in (2, 4) or x.shape[1] == 0 or dim not in (None, x.shape[1]) or (x.dim() == 4 and x.shape[2:].numel() == 0):
        d = "d" if dim is None else dim
        raise ValueError(f"{owner}: features must have shape [N, {d}] or [B, {d}, H, W], got {list(x.shape)}.")
    if x.dim() == 2:
        return x
    return x.flatten(1) if x.shape[2:].numel() == 1 else x.mean((2, 3), dtype=dtype or torch.promote_types(x.dtype, torch.float32))


def only_output(owner: str, output: Any) -> Any:
    """Unpack a list or tuple of one output.

    Raises:
        ValueError: several outputs, or none.
    """
    if not isinstance(output, list | tuple):
        return output
    if len(output) != 1:
        raise ValueError(f"{owner} must return one tensor of features, got {len(output)} outputs.")
    return output[0]


def finite_features(owner: str, x: Tensor, dim: int | None) -> Tensor:
    """`feature_matrix` without gradient, averaged in float64 (float32 on MPS).

    Raises:
        ValueError: also for NaN or infinite features.
    """
    check_tensor(owner, "features", x)
    rows = feature_matrix(owner, x.detach(), dim, working_dtype(x.device))
    finite = rows.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"{owner}: features must be finite, got NaN or infinity in {int((~finite).sum())} of {len(rows)} samples.")
    return rows


def whole_number(owner: str, name: str, value: Any, least: int) -> int:
    """Convert an integer, such as numpy's, to int.

    Raises:
        ValueError: not an integer, or less than `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{owner}: {name} must be a whole number of at least {least}, got {value!r}.")
    return number


class FeatureStore(nn.Module):
    """Base class of `FeatureMoments` and `FeatureRows`: dimension and device of the features, and the state of `sync`.

    `.half()` and `.to(dtype)` do not change the dtype of buffers.
    """

    def __init__(self, dim: int | None, device: torch.device | str | None) -> None:
        super().__init__()
        self._given_dim = None if dim is None else whole_number(type(self).__name__, "dim", dim, 1)
        # Without a device, the store moves to that of its first features.
        self._is_placed = device is not None
        self._device = self._device_for(torch.device("cpu" if device is None else device))
        self._synced = False

    @property
    def device(self) -> torch.device:
        """Device of the stored features or sums."""
        return self._device

    @property
    def is_synced(self) -> bool:
        """Whether the store holds the samples of all ranks."""
        return self._synced

    @property
    def count(self) -> int:
        """Number of samples."""
        raise NotImplementedError

    @property
    def dim(self) -> int | None:
        """Dimension of the features; None while unknown."""
        raise NotImplementedError

    def update(self, features: Tensor) -> "FeatureStore":
        raise NotImplementedError

    def merge(self, other: Any) -> "FeatureStore":
        raise NotImplementedError

    def sync(self, group: Any = None) -> "FeatureStore":
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def _device_for(self, device: torch.device) -> torch.device:
        """The device to store features of `device` on."""
        return device

    def _place(self, device: torch.device) -> None:
        """Move the stored tensors to `device`."""
        raise NotImplementedError

    def _take_rows(self, features: Tensor, dim: int | None) -> Tensor:
        """Check features, and return them as a matrix on the store's device."""
        rows = finite_features(type(self).__name__, features, dim)
        self.check_not_synced()
        if not self._is_placed and not self.count:
            self._move(rows.device)
        return rows.to(self._device)

    def _move(self, device: torch.device) -> None:
        device = self._device_for(device)
        if device != self._device:
            self._place(device)
            self._device = device

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FeatureStore":
        device = fn(torch.empty(0, device=self._device)).device
        if device != self._device:
            self._is_placed = True
            self._move(device)
        return self

    def check_not_synced(self) -> None:
        """Raise RuntimeError after `sync`: new samples would be on one rank only."""
        if self._synced:
            raise RuntimeError(
                f"{type(self).__name__}: call reset() before adding samples after sync(), which gathered those of all ranks."
            )

    def _start_sync(self, group: Any) -> None:
        # Gathered, so that all ranks raise together: if one raised alone, the others would hang.
        if any(synced for (synced,) in all_gather_ints([self._synced], group)):
            raise RuntimeError(
                f"{type(self).__name__}: call reset() before another sync(), which already gathered the samples of all ranks."
            )

    def _start_load(self, state_dict: dict[str, Any], prefix: str, device: torch.device) -> None:
        """Empty the store before loading a state whose tensors are on `device`."""
        self.reset()
        self._synced = bool(state_dict.get(prefix + "synced", False))
        if not self._is_placed:
            self._move(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "synced"] = torch.tensor(self._synced)
