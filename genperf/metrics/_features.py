"""Features as rows, and what keeps them: one policy for shapes, devices and dtypes."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import gather_numbers
from ..ops._validate import check_float, check_tensor
from ..ops.covariance_factor import working_dtype


def as_rows(owner: str, x: Tensor, dim: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Features x as rows [N, d], differentiable: spatial ones [B, d, H, W] are averaged over positions, in `dtype` or at least float32.

    Raises:
        ValueError: another shape, or d other than `dim`.
        TypeError: no floating-point tensor.
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
    """What an extractor returned, out of a list or tuple of one.

    Raises:
        ValueError: several outputs, or none.
    """
    if not isinstance(output, list | tuple):
        return output
    if len(output) != 1:
        raise ValueError(f"{owner} must return one tensor of features, got {len(output)} outputs.")
    return output[0]


def feature_rows(owner: str, x: Tensor, dim: int | None) -> Tensor:
    """As `as_rows`, without gradient, averaged in float64, and finite.

    Raises:
        ValueError: also NaN or infinity.
    """
    check_tensor(owner, "features", x)
    rows = as_rows(owner, x.detach(), dim, working_dtype(x.device))
    finite = rows.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"{owner}: features must be finite, got NaN or infinity in {int((~finite).sum())} of {len(rows)} samples.")
    return rows


def whole_number(owner: str, name: str, value: Any, least: int) -> int:
    """An int of any kind, numpy's too.

    Raises:
        ValueError: no whole number, or less than `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{owner}: {name} must be a whole number of at least {least}, got {value!r}.")
    return number


class FeatureStore(nn.Module):
    """What `FeatureMoments` and `FeatureRows` share: the dimension of features, the device they are kept on, reset and merge.

    Buffers keep their dtype: `.half()` or `.to(dtype)` of a module around moves them, and no more.
    """

    def __init__(self, dim: int | None, device: torch.device | str | None) -> None:
        super().__init__()
        self._given_dim = None if dim is None else whole_number(type(self).__name__, "dim", dim, 1)
        # Without a device the store is where its first features are.
        self._is_placed = device is not None
        self._device = self._device_for(torch.device("cpu" if device is None else device))
        self._synced = False

    @property
    def device(self) -> torch.device:
        """Where features are kept."""
        return self._device

    @property
    def is_synced(self) -> bool:
        """Whether the samples of all processes are in here."""
        return self._synced

    def _device_for(self, device: torch.device) -> torch.device:
        """The device to keep features on, for those that are on `device`."""
        return device

    def _place(self, device: torch.device) -> None:
        """Move what is kept to `device`."""
        raise NotImplementedError

    def _take_rows(self, features: Tensor, dim: int | None) -> Tensor:
        """Features as rows on the store's device."""
        rows = feature_rows(type(self).__name__, features, dim)
        self.check_not_synced()
        if not self._is_placed and not self.count:
            self._move(rows.device)
        return rows.to(self._device)

    def _move(self, device: torch.device) -> None:
        device = self._device_for(device)
        if device != self._device:
            self._place(device)
            self._device = device

    def _apply(self, fn: Callable, recurse: bool = True) -> "FeatureStore":
        device = fn(torch.empty(0, device=self._device)).device
        if device != self._device:
            self._is_placed = True
            self._move(device)
        return self

    def check_not_synced(self) -> None:
        """Samples that came after a sync would be in one process alone."""
        if self._synced:
            raise RuntimeError(f"{type(self).__name__}: it holds the samples of all processes; reset() before it takes in others.")

    def _start_sync(self, group: Any) -> None:
        # Of all processes: where one stopped alone, the others would wait for it.
        if any(synced for (synced,) in gather_numbers([self._synced], group)):
            raise RuntimeError(f"{type(self).__name__}: the samples of all processes are in here already; reset() before the next round.")

    def _start_load(self, state_dict: dict[str, Any], prefix: str, device: torch.device) -> None:
        """Empty the store for a state that lies on `device`."""
        self.reset()
        self._synced = bool(state_dict.get(prefix + "synced", False))
        if not self._is_placed:
            self._move(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "synced"] = torch.tensor(self._synced)
