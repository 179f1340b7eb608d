"""From the input of a quantizer layer to the vectors that are searched, and back.

The search takes [codebooks, outer, D, inner], the quantizer all codebooks folded into one, [outer * codebooks, D, inner]. Heads
with a codebook each are codebooks; heads that share one are counted in `outer`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._precision import HALF_DTYPES
from ..ops._validate import check, check_channel_dim, check_float, check_mask, check_tensor


def check_input(
    name: str, x: Tensor, mask: Tensor | None, lengths: Tensor | None, *, dim: int, channel_dim: int, dtype: torch.dtype
) -> tuple[int, Tensor | None]:
    """Check the input of a layer whose codebook has `dtype`.

    Returns:
        The channel dimension as a non-negative number, and the mask that `mask` or `lengths` stands for.
    """
    check_tensor(name, "x", x)
    channel = check_channel_dim(name, x, channel_dim)
    check_float(name, "x", x)
    check(name, f"x must have {dim} channels in dimension {channel_dim}", list(x.shape), x.shape[channel] == dim)
    if x.dtype != dtype and not (dtype == torch.float32 and x.dtype in HALF_DTYPES):
        rule = "x must have the dtype of the codebook, or half precision with a float32 codebook"
        raise TypeError(f"{name}: {rule}, got {x.dtype} and {dtype}.")
    if lengths is not None:
        check(name, "only one of mask and lengths can be given", "both", mask is None)
        return channel, _mask_of_lengths(name, x, lengths, channel)
    check_mask(name, mask, x, channel)
    return channel, mask


def _mask_of_lengths(name: str, x: Tensor, lengths: Tensor, channel: int) -> Tensor:
    check_tensor(name, "lengths", lengths)
    check(name, "with lengths, x must be [B, T, D] or [B, D, T]", list(x.shape), x.dim() == 3 and channel != 0)
    fits = lengths.shape == x.shape[:1] and lengths.dtype in (torch.int64, torch.int32)
    check(name, "lengths must hold an integer for each row of x", (list(lengths.shape), lengths.dtype), fits)
    return torch.arange(x.shape[3 - channel], device=x.device) < lengths.unsqueeze(1)


def split_heads(vectors: Tensor, heads: int, codebooks: int) -> Tensor:
    """View [outer, heads * D, inner] as [codebooks, outer * heads / codebooks, D, inner]."""
    outer, channels, inner = vectors.shape
    return _by_codebook(vectors.reshape(outer * heads, channels // heads, inner), codebooks)


def split_mask(mask: Tensor | None, heads: int, codebooks: int) -> Tensor | None:
    """A mask [outer, inner], the same for every head, as [codebooks, outer * heads / codebooks, inner]."""
    if mask is None:
        return None
    outer, inner = mask.shape
    return _by_codebook(mask.unsqueeze(1).expand(-1, heads, -1).reshape(outer * heads, inner), codebooks)


def split_indices(indices: Tensor, heads: int, codebooks: int) -> Tensor:
    """Indices [outer, inner, heads] as [codebooks, outer * heads / codebooks, inner]."""
    return _by_codebook(indices.transpose(1, 2).flatten(0, 1), codebooks)


def _by_codebook(t: Tensor, codebooks: int) -> Tensor:
    return t.unflatten(0, (t.shape[0] // codebooks, codebooks)).transpose(0, 1)


def fold(t: Tensor) -> Tensor:
    """View [codebooks, outer, ...] as [outer * codebooks, ...]."""
    return t.squeeze(0) if len(t) == 1 else t.transpose(0, 1).flatten(0, 1)


def merge_heads(vectors: Tensor, heads: int) -> Tensor:
    """View folded vectors [outer * heads, D, inner] as [outer, heads * D, inner]."""
    return vectors.reshape(vectors.shape[0] // heads, heads * vectors.shape[1], vectors.shape[2])


def merge_indices(indices: Tensor, sizes: list[int], heads: int) -> Tensor:
    """Indices [codebooks, outer, inner] in the shape `sizes` of the positions, with a last dimension of heads if there are several."""
    if heads == 1:
        return indices.reshape(sizes)
    by_head = fold(indices).unflatten(0, (-1, heads)) if indices.numel() else indices
    return by_head.movedim(1, -1).reshape(*sizes, heads)


def number_codes(indices: Tensor, num_codes: int) -> Tensor:
    """Indices [codebooks, outer, inner] into the flattened codebooks [codebooks * K, D]; -1 stays."""
    if len(indices) == 1:
        return indices
    first = torch.arange(len(indices), device=indices.device) * num_codes
    return torch.where(indices < 0, -1, indices + first.view(-1, 1, 1))


def look_up(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes [..., heads * D] of indices [..., heads] in codebooks [codebooks, K, D]; zeros where an index is -1."""
    first = torch.arange(len(codebook), device=indices.device) * codebook.shape[1]
    codes = F.embedding(indices.clamp(min=0) + first, codebook.flatten(0, 1))
    return torch.where(indices.unsqueeze(-1) >= 0, codes, 0).flatten(-2)


def rows_at(vectors: Tensor, row: Tensor) -> Tensor:
    """The vectors [codebooks, K, D] at positions `row` [codebooks, K] of vectors [codebooks, outer, D, inner]."""
    codebook = torch.arange(vectors.shape[0], device=vectors.device).unsqueeze(1)
    inner = vectors.shape[3]
    return vectors.movedim(2, -1)[codebook, row // inner, row % inner]
