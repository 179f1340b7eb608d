# SPDX-License-Identifier: Apache-2.0
"""Storage of all features, for metrics that need more than moments."""

from typing import Any

import torch
from torch import Tensor

from .._distributed import all_gather_ints, all_gather_rows, world_size
from ._features import FeatureStore


class FeatureRows(FeatureStore):
    """All features of a stream of batches, in their own dtype. The methods are those of `FeatureMoments`.

    Args:
        dim: d; None for that of the first features.
        device: device of the stored features; None for that of the first features.

    Attributes:
        features: [N, d], of the widest dtype among the batches.
        count: N.
    """

    def __init__(self, dim: int | None = None, *, device: torch.device | str | None = None) -> None:
        super().__init__(dim, device)
        self.reset()

    @property
    def count(self) -> int:
        return sum(len(batch) for batch in self._batches)

    @property
    def dim(self) -> int | None:
        return self._batches[0].shape[1] if self._batches else self._given_dim

    @property
    def features(self) -> Tensor:
        if not self._batches:
            return torch.empty(0, self._given_dim or 0, device=self._device)
        if len(self._batches) > 1:
            self._batches = [torch.cat(self._batches)]
        return self._batches[0]

    def update(self, features: Tensor) -> "FeatureRows":
        with torch.inference_mode(False), torch.no_grad():
            rows = self._take_rows(features, self.dim)
            if len(rows):
                self._batches.append(rows.clone())
        return self

    def merge(self, other: "FeatureRows") -> "FeatureRows":
        return self.update(other.features) if other.count else self

    def sync(self, group: Any = None) -> "FeatureRows":
        if world_size(group) == 1:
            return self
        self._start_sync(group)
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        gathered = all_gather_ints([self.count, self.dim or 0, dtypes.index(self.features.dtype)], group)
        kinds = sorted({(dim, dtype) for count, dim, dtype in gathered if count})
        if len(kinds) > 1:
            found = ", ".join(f"{dim} of {dtypes[dtype]}" for dim, dtype in kinds)
            raise ValueError(f"FeatureRows: features must have the same dimension and dtype on all ranks, got {found}.")
        self._synced = True
        if kinds:
            dim, dtype = kinds[0]
            local = self.features if self.count else torch.empty(0, dim, dtype=dtypes[dtype], device=self._device)
            self._batches = [all_gather_rows(local, [count for count, *_ in gathered], group)]
        return self

    def reset(self) -> None:
        self._synced = False
        self._batches: list[Tensor] = []

    def _place(self, device: torch.device) -> None:
        self._batches = [batch.to(device) for batch in self._batches]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "features"] = self.features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing_keys, errors = args[2], args[4]
        features = state_dict.get(prefix + "features")
        if features is None:
            missing_keys.append(prefix + "features")
        elif features.dim() != 2 or (len(features) and self._given_dim not in (None, features.shape[1])):
            errors.append(f"FeatureRows: features of the state must have shape [N, {self._given_dim or 'd'}], got {list(features.shape)}.")
        else:
            self._start_load(state_dict, prefix, features.device)
            if len(features):
                self._batches = [features.detach().to(self._device, copy=True)]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, count={self.count}"
