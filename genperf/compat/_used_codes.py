# SPDX-License-Identifier: Apache-2.0
"""Remapping of indices to a subset of used codes, as in taming-transformers and diffusers."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

UnknownIndex = Literal["random", "extra"] | int


class UsedCodes(nn.Module):
    """A layer whose indices can be remapped to a subset of used codes.

    Attributes:
        used: with remap, the indices of the used codes, a buffer.
        re_embed: the number of indices after remapping.
    """

    used: Tensor

    def set_remap(self, num_codes: int, remap: str | np.ndarray | Tensor | None, unknown_index: UnknownIndex) -> None:
        """Set the used indices, given as such or as the path of a .npy file, and the index of unused codes: "random", "extra" or an int."""
        self.remap = remap
        self.re_embed = num_codes
        self.unknown_index: UnknownIndex = unknown_index
        self._num_codes = num_codes
        if remap is None:
            return
        name = type(self).__name__
        loaded = remap if isinstance(remap, np.ndarray | Tensor) else np.load(remap)
        used = torch.as_tensor(loaded.copy() if isinstance(loaded, np.ndarray) else loaded)  # torch takes no negative strides
        if used.dim() != 1 or used.dtype.is_floating_point or used.numel() == 0:
            raise ValueError(f"{name}: remap must hold a list of indices, got {used.dtype} of shape {list(used.shape)}.")
        if unknown_index not in ("random", "extra") and not isinstance(unknown_index, int):
            raise ValueError(f"{name}: unknown_index must be 'random', 'extra' or a number, got {unknown_index!r}.")
        self.register_buffer("used", used.long().clone())
        self.re_embed = len(used)
        if unknown_index == "extra":
            self.unknown_index = self.re_embed
            self.re_embed += 1

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Positions of `inds` among the used indices; `unknown_index` for unused codes."""
        count = len(self.used)
        positions = torch.arange(count, device=inds.device)
        table = positions.new_full((self._num_codes,), count).scatter_reduce(0, self.used.to(inds.device), positions, "amin")
        found = table[inds]
        unknown = self.unknown_index if isinstance(self.unknown_index, int) else torch.randint_like(found, self.re_embed)
        return torch.where(found < count, found, unknown).to(inds.dtype)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The inverse of `remap_to_used`; the extra index becomes the first used index."""
        return self.used.to(inds)[torch.where(inds < len(self.used), inds, 0)]
