# SPDX-License-Identifier: Apache-2.0
"""Views of tensors as positions and channels, or as rows, without a copy where strides allow it."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def positions_shape(x: Tensor, channel: int) -> list[int]:
    """Shape of x without its channel dimension."""
    return [*x.shape[:channel], *x.shape[channel + 1 :]]


class Positions:
    """A tensor x [..., D, ...] viewed as vectors at positions, with methods that restore x's shape.

    Attributes:
        vectors: [outer, D, inner], a view of x; a copy only where no such view exists. outer * inner counts the positions in
            row-major order of x's other dimensions. A channels-last tensor has inner = 1; a channels-first tensor, even a
            permuted one, has its pixels in `inner`.
        channel: the dimension of x that holds a vector, not negative.
        shape: that of x.
        sizes: shape of x without its channel dimension.
        split: how many of those dimensions `outer` covers.
        outer, inner: the positions before and after the split.
    """

    __slots__ = ("channel", "inner", "outer", "shape", "sizes", "split", "vectors")

    def __init__(self, x: Tensor, channel: int) -> None:
        self.channel = channel
        self.shape = shape = tuple(x.shape)
        self.sizes = sizes = [*shape[:channel], *shape[channel + 1 :]]
        self.split = split = channel if x.is_contiguous() else _viewable_split(x, channel, sizes)
        self.outer, self.inner = math.prod(sizes[:split]), math.prod(sizes[split:])
        moved = x if split == channel else x.movedim(channel, split)
        self.vectors = moved.reshape(self.outer, shape[channel], self.inner)

    def view_mask(self, mask: Tensor | None) -> Tensor | None:
        """View a mask or indices of x's positions as [outer, inner]."""
        return None if mask is None else mask.reshape(self.outer, self.inner)

    def view_like(self, t: Tensor) -> Tensor:
        """View t, of x's shape, as [outer, D, inner]; a copy only where no such view exists."""
        return t.movedim(self.channel, self.split).reshape(self.vectors.shape)

    def restore(self, y: Tensor) -> Tensor:
        """View y in the shape of x, with the channels that y has: [outer, D', inner], or [positions, D', 1]."""
        outer, channels, _ = y.shape
        split = self.split if outer == self.outer else len(self.sizes)
        y = y.reshape(*self.sizes[:split], channels, *self.sizes[split:])
        return for_inductor(y if split == self.channel else y.movedim(split, self.channel))

    def restore_indices(self, indices: Tensor, *last: int) -> Tensor:
        """View indices [outer, inner] in the shape of x without its channels, with further dimensions `last`."""
        shape = [*self.sizes, *last]
        return indices.reshape(*shape) if shape else indices.reshape(shape)  # numbers are read faster than a list


def _viewable_split(x: Tensor, channel: int, sizes: list[int]) -> int:
    """The first split, `channel` before all others, with which x is viewed without a copy; `channel` if there is none."""
    strides = [*x.stride()[:channel], *x.stride()[channel + 1 :]]
    for split in (channel, *range(len(sizes) + 1)):
        if _collapses(sizes[:split], strides[:split]) and _collapses(sizes[split:], strides[split:]):
            return split
    return channel


def as_positions(x: Tensor, channel: int) -> Tensor:
    """View x as [outer, D, inner] (see `Positions`); a copy only where no such view exists."""
    return Positions(x, channel).vectors


def fold_codebooks(t: Tensor) -> Tensor:
    """View vectors or indices [codebooks, outer, ...] as [outer * codebooks, ...]."""
    return t.squeeze(0) if t.shape[0] == 1 else t.transpose(0, 1).flatten(0, 1)


def as_one_codebook(vectors: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Fold vectors [codebooks, outer, D, inner] and indices [codebooks, outer, inner] for the flattened codebooks.

    Code k of codebook c becomes c * num_codes + k; -1 stays.
    """
    codebooks = indices.shape[0]
    if codebooks > 1:
        first = torch.arange(codebooks, device=indices.device).view(-1, 1, 1) * num_codes
        indices = torch.where(indices < 0, -1, indices + first)
    return fold_codebooks(vectors), fold_codebooks(indices)


def for_inductor(image: Tensor) -> Tensor:
    """Copy an image that is a view, within a torch.compile with dynamic shapes; otherwise return it.

    Inductor (torch 2.13) cannot compile a convolution of a view whose sizes are symbolic: to save it for backward, it sorts the strides,
    and "cannot determine truth value of Relational". It removes a `clone`, but not a product with 1, which is bitwise the same.
    """
    if not torch.compiler.is_dynamo_compiling() or image.dim() != 4 or not image.is_floating_point():
        return image
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return image if all(has_static_value(size) for size in image.shape) else image * 1


def as_rows(read: Sequence[Tensor | None], written: Sequence[Tensor | None] = ()) -> list[Tensor | None]:
    """View tensors of one shape [B, ...] as [B, rows, columns], elements in row-major order.

    If no view fits all tensors, those that are only read are copied. Tensors that are written must be dense.
    """
    tensors = [t for t in (*read, *written) if t is not None]
    shape = tuple(tensors[0].shape)
    for t in tensors:
        if not t.is_contiguous():
            break
    else:
        batch, columns = shape[0], math.prod(shape[1:])
        return [None if t is None else t.view(batch, 1, columns) for t in (*read, *written)]
    split = _row_split(shape, tensors) or _row_split(shape, [t for t in written if t is not None]) or 1
    sizes = (shape[0], math.prod(shape[1:split]), math.prod(shape[split:]))
    views = [None if t is None else t.reshape(sizes) for t in read]
    return views + [None if t is None else t.view(sizes) for t in written]


def rows_fit(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape [B, ...] can be viewed as [B, rows, columns] together."""
    return _row_split(tensors[0].shape, tensors) is not None


def _row_split(shape: Sequence[int], tensors: Sequence[Tensor]) -> int | None:
    """The dimension at which the columns start in a view of all the tensors as [B, rows, columns]."""
    for split in range(1, max(2, len(shape))):
        if all(_collapses(shape[1:split], t.stride()[1:split]) and _collapses(shape[split:], t.stride()[split:]) for t in tensors):
            return split
    return None


def _collapses(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether dimensions of these sizes and strides are one strided dimension."""
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))
