"""Indices that count only the codes in use, as taming-transformers and diffusers remap them."""

import numpy as np
import torch
from torch import Tensor, nn


class UsedCodes(nn.Module):
    """A layer with indices into `num_codes` codes that can be remapped to those in use.

    Attributes:
        used: with remap, the indices in use; a buffer.
        re_embed: the number of indices there are after remapping.
    """

    used: Tensor

    def use(self, num_codes: int, remap: str | np.ndarray | Tensor | None, unknown_index: str | int) -> None:
        """Set `remap`, a .npy file or the indices in use, and what becomes of others: "random", "extra" or a number."""
        self.remap = remap
        self.re_embed = num_codes
        self.unknown_index = unknown_index
        self._num_codes = num_codes
        if remap is None:
            return
        name = type(self).__name__
        used = torch.as_tensor(remap if isinstance(remap, np.ndarray | Tensor) else np.load(remap))
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
        """Positions of `inds` among the indices in use; of what is not in use, see `unknown_index`."""
        number = len(self.used)
        positions = torch.arange(number, device=inds.device)
        table = positions.new_full((self._num_codes,), number).scatter_reduce(0, self.used.to(inds.device), positions, "amin")
        found = table[inds]
        unknown = torch.randint_like(found, self.re_embed) if self.unknown_index == "random" else self.unknown_index
        return torch.where(found < number, found, unknown).to(inds.dtype)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The inverse of `remap_to_used`; the extra index becomes the first in use."""
        return self.used.to(inds)[torch.where(inds < len(self.used), inds, 0)]
