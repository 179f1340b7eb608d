"""Features as rows, and what keeps them: one policy for shapes, devices and dtypes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops._common import check_float, check_tensor


def feature_rows(owner: str, x: Tensor, dim: int | None) -> Tensor:
    """Features x as rows [N, d], without gradient: spatial ones [B, d, H, W] are averaged over their positions.

    Raises:
        ValueError: another shape, d other than `dim`, or numbers that are not finite.
        TypeError: no floating-point tensor.
    """
    check_tensor(owner, "features", x)
    check_float(owner, "features", x)
    if x.dim() not in (2, 4) or x.shape[1] == 0 or (x.dim() == 4 and x.shape[2] * x.shape[3] == 0):
        raise ValueError(f"{owner}: features must have shape [N, d] or [B, d, H, W], got {list(x.shape)}.")
    if dim is not None and x.shape[1] != dim:
        raise ValueError(f"{owner}: features must have {dim} dimensions as those before, got {x.shape[1]} (shape {list(x.shape)}).")
    rows = x.detach()
    if rows.dim() == 4:
        rows = (
            rows.flatten(1)
            if rows.shape[2:].numel() == 1
            else rows.mean((2, 3), dtype=torch.float32 if x.device.type == "mps" else torch.float64)
        )
    finite = rows.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"{owner}: features must be finite, got NaN or infinity in {int((~finite).sum())} of {len(rows)} samples.")
    return rows


class FeatureStore(nn.Module):
    """What `FeatureMoments` and `FeatureRows` share: the dimension of features, the device they are kept on, reset and merge.

    Buffers keep their dtype: `.half()` or `.to(dtype)` of a module around moves them, and no more.
    """

    def __init__(self, dim: int | None, device: torch.device | str | None) -> None:
        super().__init__()
        owner = type(self).__name__
        if dim is not None and (not isinstance(dim, int) or dim < 1):
            raise ValueError(f"{owner}: dim must be None or a positive number, got {dim!r}.")
        self._given_dim = dim
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

    def _start_sync(self) -> None:
        if self._synced:
            raise RuntimeError(f"{type(self).__name__}: the samples of all processes are in here already; reset() before the next round.")
