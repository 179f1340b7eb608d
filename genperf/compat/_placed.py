# SPDX-License-Identifier: Apache-2.0
"""Device and dtype of a layer that may have no tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Placed(nn.Module):
    """A layer that knows the device and dtype that `.to()` gave it without a buffer, whose value a load from the meta device would lose."""

    _placed: Tensor  # empty

    def __init__(self) -> None:
        super().__init__()
        placed = torch.empty(0)
        self._placed = torch.empty(0, device="cpu") if placed.is_meta else placed

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Placed":
        super()._apply(fn, recurse)
        self._placed = fn(self._placed)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle of an earlier release, which had non-persistent buffers, keep their device and dtype."""
        if "_placed" not in state:
            buffers, computed = dict(state["_buffers"]), state["_non_persistent_buffers_set"]
            removed = [buffers.pop(name) for name in sorted(computed)]
            dtype = next((t.dtype for t in removed if t.is_floating_point()), torch.float32)
            placed = torch.empty(0, dtype=dtype, device=removed[0].device)
            state = {**state, "_buffers": buffers, "_non_persistent_buffers_set": set(), "_placed": placed}
        super().__setstate__(state)
