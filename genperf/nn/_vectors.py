# SPDX-License-Identifier: Apache-2.0
"""Views of the input of a quantizer layer as the vectors to search, and back.

The search takes [codebooks, outer, D, inner]; the lookup takes all codebooks folded into one, [outer * codebooks, D, inner].
Heads with separate codebooks are the dimension `codebooks`; heads that share a codebook are part of `outer`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._layout import fold_codebooks
from ..ops._validate import check, check_channel_dim, check_index_range, check_tensor


def mask_from_lengths(name: str, x: Tensor, mask: Tensor | None, lengths: Tensor, channel_dim: int) -> Tensor:
    """The mask of the first lengths[i] vectors in row i of x [B, T, D] or [B, D, T]."""
    check(name, "only one of mask and lengths can be given", "both", mask is None)
    check_tensor(name, "x", x)
    check_tensor(name, "lengths", lengths)
    channel = check_channel_dim(name, x, channel_dim)
    check(name, "with lengths, x must be [B, T, D] or [B, D, T]", list(x.shape), x.dim() == 3 and channel != 0)
    fits = lengths.shape == x.shape[:1] and lengths.dtype in (torch.int64, torch.int32)
    check(name, "lengths must hold an integer for each row of x", (list(lengths.shape), lengths.dtype), fits)
    return torch.arange(x.shape[3 - channel], device=x.device) < lengths.unsqueeze(1)


def check_decoded(name: str, indices: Tensor, num_codes: int) -> None:
    """Indices to decode must be int64, -1 ... num_codes - 1; on CUDA the values are not checked."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: indices must be int64, got {indices.dtype}.")
    check_index_range(name, indices, num_codes)


def check_given_codes(name: str, codes: Tensor, counts: Tensor | None, codebook: Tensor) -> None:
    """Codes must have the shape of the codebook, and counts that shape without D; one codebook may have leading dimensions of 1."""
    check_tensor(name, "codes", codes)
    if codes.shape[-2:] != codebook.shape[-2:] or codes.numel() != codebook.numel():
        raise ValueError(f"{name}: codes must have shape {list(codebook.shape)}, got {list(codes.shape)}.")
    if counts is not None:
        check_tensor(name, "counts", counts)
        if counts.shape[-1:] != codebook.shape[-2:-1] or counts.numel() != codebook.shape[:-1].numel():
            raise ValueError(f"{name}: counts must have shape {list(codebook.shape[:-1])}, got {list(counts.shape)}.")


def split_heads(
    vectors: Tensor,  # [outer, heads * D, inner]
    mask: Tensor | None,  # [outer, inner]
    heads: int,
    codebooks: int,
) -> tuple[Tensor, Tensor | None]:
    """View vectors as [codebooks, outer * heads / codebooks, D, inner], and the mask, expanded over heads, without D."""
    if heads == 1:
        return vectors.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    outer, channels, inner = vectors.shape
    vectors = _by_codebook(vectors.reshape(outer * heads, channels // heads, inner), codebooks)
    if mask is not None:
        mask = _by_codebook(mask.unsqueeze(1).expand(-1, heads, -1).reshape(outer * heads, inner), codebooks)
    return vectors, mask


def split_indices(indices: Tensor, heads: int, codebooks: int) -> Tensor:
    """Indices [outer, inner, heads] as [codebooks, outer * heads / codebooks, inner]."""
    return _by_codebook(indices.transpose(1, 2).flatten(0, 1), codebooks)


def _by_codebook(t: Tensor, codebooks: int) -> Tensor:
    # Not `unflatten`, after which torch.onnx.export(dynamo=False) takes every size for a constant.
    return t.reshape(t.shape[0] // codebooks, codebooks, *t.shape[1:]).transpose(0, 1)


def merge_heads(vectors: Tensor, heads: int) -> Tensor:
    """View folded vectors [outer * heads, D, inner] as [outer, heads * D, inner]."""
    return vectors.reshape(vectors.shape[0] // heads, heads * vectors.shape[1], vectors.shape[2])


def merge_indices(indices: Tensor, sizes: list[int], heads: int) -> Tensor:
    """Indices [codebooks, outer, inner] in the shape `sizes` of the positions, with a last dimension of heads if there are several."""
    if heads == 1:
        return indices.reshape(*sizes) if sizes else indices.reshape(sizes)
    folded = fold_codebooks(indices)
    return folded.reshape(folded.shape[0] // heads, heads, folded.shape[1]).transpose(1, 2).reshape(*sizes, heads)


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
