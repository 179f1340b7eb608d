# SPDX-License-Identifier: Apache-2.0
"""Joins the parts of the codes, decides between two codes or the corners of a box in float64, and lists the rows left to search."""

import triton
import triton.language as tl

from .rows import position_offsets
from .scan import NONE, NOT_DECIDED


@triton.jit
def distances_in_order(x, codebook, valid, dim, stride_d, stride_code_d, COSINE: tl.constexpr):
    """Distances from vectors to codes, in the arithmetic of the reference. x, codebook: pointers to the first component of each."""
    return distances_of_all(x, codebook, valid, valid, dim, stride_d, stride_code_d, COSINE)


@triton.jit
def distances_of_all(x, codebook, x_valid, code_valid, dim, stride_d, stride_code_d, COSINE: tl.constexpr):
    """The same with the validity of vectors and codes apart; the shapes of x and codebook are broadcast against each other."""
    valid = x_valid & code_valid
    distance = tl.zeros(valid.shape, tl.float64)
    norm = tl.zeros(code_valid.shape, tl.float64)
    for _ in range(dim):
        a = tl.load(x, mask=x_valid, other=0).to(tl.float64)
        b = tl.load(codebook, mask=code_valid, other=0).to(tl.float64)
        x += stride_d
        codebook += stride_code_d
        if COSINE:
            distance -= a * b
            norm += b * b
        else:
            distance += (a - b) * (a - b)
    if COSINE:
        distance *= tl.abs(distance) / tl.where(norm > 0, norm, 1.0)  # has the order of the similarity
    return tl.where(valid & (distance == distance), distance, float("inf"))


@triton.jit
def box_corners(first, last, corner, BLOCK_K: tl.constexpr):
    """The codes at corners 0 ... 7 of the box that `first` and `last` name, and which exist. A pair is the corners 0 and 7."""
    box = last < 0
    last = tl.where(box, -2 - last, last)
    k = tl.where(corner & 1 == 0, first & 9, last & 9) | (first & 6)
    k |= tl.where(corner & 2 == 0, first, last) & (BLOCK_K - 16)
    k |= tl.where(corner & 4 == 0, first, last) & -BLOCK_K
    return tl.where(box, k, tl.where(corner == 0, first, last)), box | (corner == 0) | (corner == 7)


@triton.jit(
    do_not_specialize=["positions", "inner", "num_codes", "splits", "dim", "stride_head", "stride_outer", "stride_codebook", "num_counts"]
)  # fmt: skip
def nearest_code_settle_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    mask,  # [heads, outer, inner]
    lower,  # [heads, splits, positions]; the first split gets the threshold of all
    upper,  # [heads, splits, positions]
    first,  # [heads, splits, positions]
    last,  # [heads, splits, positions]
    indices,  # [heads, outer, inner]
    rows,  # [heads, positions] the positions left to search
    counts,  # [heads, num_counts] how many of them there are
    num_counts,
    positions,
    inner,
    num_codes,
    splits,
    dim,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    stride_codebook,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BATCH: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    x += head * stride_head
    codebook += head * stride_codebook
    rows += head * positions
    position = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    place = head * splits * positions + position
    one = tl.load(first + place, mask=inside, other=0)
    two = tl.load(last + place, mask=inside, other=NONE)
    if SPLITS:
        threshold = tl.full([BLOCK_N], float("-inf"), tl.float32)
        for split in range(splits):
            threshold = tl.maximum(threshold, tl.load(lower + place + split * positions, mask=inside, other=0))
        one = tl.full([BLOCK_N], NOT_DECIDED, tl.int32)
        two = tl.full([BLOCK_N], NONE, tl.int32)
        parts = tl.zeros([BLOCK_N], tl.int32)
        for split in range(splits):
            part = place + split * positions
            reaches = tl.load(upper + part, mask=inside, other=0) >= threshold
            a = tl.load(first + part, mask=inside, other=0)
            b = tl.load(last + part, mask=inside, other=NONE)
            single = (one >= 0) & (two == NONE) & (a >= 0) & (b == NONE)
            two = tl.where(reaches, tl.where(parts == 0, b, tl.where((parts == 1) & single, a, NONE)), two)
            one = tl.where(reaches, tl.where(parts == 0, a, tl.where((parts == 1) & single, one, NOT_DECIDED)), one)
            parts += reaches.to(tl.int32)
        tl.store(lower + place, threshold, mask=inside)
    unmasked = inside
    if HAS_MASK:
        unmasked &= tl.load(mask + head * positions + position, mask=inside, other=0) != 0
    tl.store(indices + head * positions + position, tl.where(unmasked, one, -1).to(tl.int64), mask=inside)

    listed = unmasked & (one == NOT_DECIDED)
    number = tl.sum(listed.to(tl.int32))
    if number > 0:
        begin = tl.atomic_add(counts + head * num_counts, number)
        tl.store(rows + begin + tl.cumsum(listed.to(tl.int32), axis=0) - 1, position, mask=listed)

    # The undecided rows BATCH at a time, with a corner of its box for each of 8 lanes; a pair is the first and the last corner.
    open_rows = unmasked & (one >= 0) & (two != NONE)
    order = tl.cumsum(open_rows.to(tl.int32), axis=0) - 1
    corner = tl.arange(0, 8)[None, :]
    for start in range(0, tl.sum(open_rows.to(tl.int32)), BATCH):
        chosen = (start + tl.arange(0, BATCH))[:, None] == tl.where(open_rows, order, -1)[None, :]
        present = tl.max(chosen.to(tl.int32), axis=1) > 0
        current = tl.sum(tl.where(chosen, position[None, :], 0), axis=1)
        a = tl.sum(tl.where(chosen, one[None, :], 0), axis=1)[:, None]
        b = tl.sum(tl.where(chosen, two[None, :], 0), axis=1)[:, None]
        k, exists = box_corners(a, b, corner, BLOCK_K)
        k = k.to(tl.int64)
        valid = present[:, None] & exists & (k < num_codes)
        base = position_offsets(current, inner, stride_outer, stride_inner)
        query = x + base[:, None] + tl.zeros([BATCH, 8], tl.int64)
        distance = distances_in_order(query, codebook + k * stride_k, valid, dim, stride_d, stride_code_d, COSINE)
        smallest = tl.min(distance, axis=1)
        nearest = tl.min(tl.where((distance == smallest[:, None]) & valid, k, 0x7FFFFFFFFFFFFFFF), axis=1)
        tl.store(indices + head * positions + current, nearest, mask=present)
