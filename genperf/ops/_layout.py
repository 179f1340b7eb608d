"""Views of tensors as positions and channels, or as rows, without a copy where strides allow it."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor


def positions_shape(x: Tensor, channel: int) -> list[int]:
    """Shape of x without its channel dimension."""
    return [*x.shape[:channel], *x.shape[channel + 1 :]]


def as_positions(x: Tensor, channel: int) -> Tensor:
    """View x as [outer, D, inner]; a copy only where no such view exists.

    outer * inner counts the positions in row-major order of the other dimensions. Channels-last tensors have inner = 1;
    channels-first tensors, permuted ones among them, have their pixels in `inner`.
    """
    sizes = positions_shape(x, channel)
    strides = [*x.stride()[:channel], *x.stride()[channel + 1 :]]
    for split in (channel, *range(len(sizes) + 1)):
        if _collapses(sizes[:split], strides[:split]) and _collapses(sizes[split:], strides[split:]):
            moved = x.movedim(channel, split)
            return moved.reshape(math.prod(sizes[:split]), x.shape[channel], math.prod(sizes[split:]))
    return x.reshape(math.prod(sizes[:channel]), x.shape[channel], math.prod(sizes[channel:]))


def like_positions(t: Tensor, positions: Tensor, x: Tensor, channel: int) -> Tensor:
    """View t, of x's shape, as [outer, D, inner] with the outer and inner of x's `positions`; a copy where it must be."""
    split = position_split(positions, x, channel)
    return t.movedim(channel, split).reshape(positions.shape)


def from_positions(y: Tensor, x: Tensor, channel: int) -> Tensor:
    """Undo `as_positions`: y [outer, D, inner] in the shape of x, but for its D."""
    sizes = positions_shape(x, channel)
    split = position_split(y, x, channel)
    return y.reshape(*sizes[:split], y.shape[1], *sizes[split:]).movedim(split, channel)


def position_split(positions: Tensor, x: Tensor, channel: int) -> int:
    sizes = positions_shape(x, channel)
    split = 0
    while math.prod(sizes[:split]) != positions.shape[0] or math.prod(sizes[split:]) != positions.shape[2]:
        split += 1
    return split


def as_rows(read: Sequence[Tensor | None], written: Sequence[Tensor | None] = ()) -> list[Tensor | None]:
    """View tensors of one shape [B, ...] as [B, rows, columns], elements in row-major order.

    Where no one view fits all, what is only read is copied; what is written must be dense.
    """
    tensors = [t for t in (*read, *written) if t is not None]
    shape = tensors[0].shape
    if all(t.is_contiguous() for t in tensors):
        sizes = (shape[0], 1, math.prod(shape[1:]))
        return [None if t is None else t.view(sizes) for t in (*read, *written)]
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
