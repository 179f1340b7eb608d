# SPDX-License-Identifier: Apache-2.0
"""Kernels of the search of the k nearest codes; top_k.py explains how it works."""

import triton
import triton.language as tl

from .bound import TILE_COLUMNS
from .rows import position_offsets, round_rows, row_offsets
from .scan import shortest_unscored, tile_scores, unscored_bound
from .settle import distances_in_order

NO_CODE = tl.constexpr(0x3FFFFFFFFFFFFFFF)
CHUNK = tl.constexpr(256)  # codes compared at a time with a row that is compared with all of them


@triton.jit
def kth_largest(values, k, COLUMNS: tl.constexpr):
    """The k-th largest of each row of values [rows, COLUMNS], equal ones counted each."""
    column = tl.arange(0, COLUMNS)[None, :]
    largest = tl.max(values, axis=1)
    for _ in range(k - 1):
        place = tl.min(tl.where(values == largest[:, None], column, COLUMNS), axis=1)
        values = tl.where(column == place[:, None], float("-inf"), values)
        largest = tl.max(values, axis=1)
    return largest


@triton.jit
def start_rows(
    x,
    center,
    queries,  # [BLOCK_N, depth] for this program alone
    held,  # [3, BLOCK_N] for this program alone
    base,
    inside,
    dim,
    depth,
    stride_d,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    STREAM: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The operand of `tile_scores`, the coefficients of the bound in the registers of the threads with the scores, and the rest of it."""
    row = tl.arange(0, BLOCK_N)
    back, bound = round_rows(x, center, queries, base, inside, dim, depth, stride_d, COSINE, PLANAR, SPLIT, BLOCK_D)
    at_length, at_residual, at_zero, length = bound
    tl.store(held + row, at_length)
    tl.store(held + BLOCK_N + row, at_residual)
    tl.store(held + 2 * BLOCK_N + row, back)
    tl.debug_barrier()
    at_length = tl.load(held + row)
    at_residual = tl.load(held + BLOCK_N + row)
    back = tl.load(held + 2 * BLOCK_N + row)
    operand = queries + row * depth
    if not STREAM:
        operand = tl.load(operand[:, None] + tl.arange(0, DEPTH)[None, :])
    return operand, back, at_length, at_residual, at_zero, length


@triton.jit(do_not_specialize=["k", "positions", "inner", "tiles", "tiles_per_program"])
def nearest_codes_threshold_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D + 1]
    codes,  # [heads * tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [heads, tiles * BLOCK_K]
    table,  # [heads, tiles, TILE_COLUMNS]
    queries,  # [programs, BLOCK_N, depth]
    held,  # [programs, 3, BLOCK_N]
    lower,  # [heads, splits, positions, CLASSES] if SPLITS, or [heads, positions] the threshold
    k,
    positions,
    inner,
    tiles,
    tiles_per_program,
    dim,
    depth,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    STREAM: tl.constexpr,
    TMA: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs [rows, splits, heads]: largest lower bounds of each class of codes, and the k-th largest of them."""
    head = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    program = (head * tl.num_programs(1) + split) * tl.num_programs(0) + tl.program_id(0)
    x += head * stride_head
    center += head * (dim + 1)
    queries += program * BLOCK_N * depth
    held += program * 3 * BLOCK_N
    first_tile = tl.program_id(2) * tiles
    begin = split * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tiles)
    row = tl.arange(0, BLOCK_N)

    for start_row in range(tl.program_id(0).to(tl.int64) * BLOCK_N, positions, tl.num_programs(0) * BLOCK_N):
        inside = start_row + row < positions
        base = row_offsets(start_row, row, inner, stride_outer, stride_inner)
        operand, back, at_length, at_residual, at_zero, _ = start_rows(
            x, center, queries, held, base, inside, dim, depth, stride_d, COSINE, PLANAR, SPLIT, STREAM, DEPTH, BLOCK_N, BLOCK_D
        )
        largest = tl.full([BLOCK_N, CLASSES], float("-inf"), tl.float32)
        for tile in range(begin, end):
            score, margin = tile_scores(
                operand, back, at_length, at_residual, codes, bias, table, first_tile + tile, depth,
                STREAM, TMA, BLOCK_K, BLOCK_D if STREAM else DEPTH,
            )  # fmt: skip
            if CLASSES < BLOCK_K:
                score = tl.max(tl.reshape(score, [BLOCK_N, BLOCK_K // CLASSES, CLASSES]), axis=1)
            largest = tl.maximum(largest, score - margin[:, None])
        if SPLITS:
            place = (head * tl.num_programs(1) + split) * positions + start_row + row
            tl.store(lower + place[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :], largest, mask=inside[:, None])
        else:
            threshold = kth_largest(largest, k, CLASSES) - 2 * at_zero
            tl.store(lower + head * positions + start_row + row, threshold, mask=inside)


@triton.jit(do_not_specialize=["k", "positions", "inner", "tiles", "tiles_per_program"])
def nearest_codes_collect_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D + 1]
    codes,  # [heads * tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [heads, tiles * BLOCK_K]
    table,  # [heads, tiles, TILE_COLUMNS]
    queries,  # [programs, BLOCK_N, depth]
    held,  # [programs, 3, BLOCK_N]
    lower,  # [heads, splits, positions, CLASSES] if SPLITS, or [heads, positions]
    listed,  # [heads, splits, positions, SLOTS] the codes that reach the threshold
    counts,  # [heads, splits, positions] how many there are; SLOTS + 1 if there is no threshold
    k,
    positions,
    inner,
    tiles,
    tiles_per_program,
    dim,
    depth,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    STREAM: tl.constexpr,
    TMA: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs [rows, splits, heads]: lists the codes whose upper bound reaches the threshold."""
    head = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    program = (head * splits + split) * tl.num_programs(0) + tl.program_id(0)
    x += head * stride_head
    center += head * (dim + 1)
    queries += program * BLOCK_N * depth
    held += program * 3 * BLOCK_N
    first_tile = tl.program_id(2) * tiles
    begin = split * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tiles)
    shortest = shortest_unscored(table + first_tile * TILE_COLUMNS, tiles)
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)[None, :]

    for start_row in range(tl.program_id(0).to(tl.int64) * BLOCK_N, positions, tl.num_programs(0) * BLOCK_N):
        inside = start_row + row < positions
        base = row_offsets(start_row, row, inner, stride_outer, stride_inner)
        operand, back, at_length, at_residual, at_zero, length = start_rows(
            x, center, queries, held, base, inside, dim, depth, stride_d, COSINE, PLANAR, SPLIT, STREAM, DEPTH, BLOCK_N, BLOCK_D
        )
        if SPLITS:
            largest = tl.full([BLOCK_N, CLASSES], float("-inf"), tl.float32)
            for other in range(splits):
                place = (head * splits + other) * positions + start_row + row
                found = tl.load(lower + place[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :], mask=inside[:, None], other=0)
                largest = tl.maximum(largest, found)
            threshold = kth_largest(largest, k, CLASSES) - 2 * at_zero
        else:
            threshold = tl.load(lower + head * positions + start_row + row, mask=inside, other=0)
        unscored = unscored_bound(length, shortest, COSINE)
        usable = inside & (threshold > float("-inf")) & (unscored < threshold)
        # Through memory, as the coefficients of the bound, since at_length has been read.
        tl.debug_barrier()
        tl.store(held + row, tl.where(usable, threshold, float("inf")))
        tl.debug_barrier()
        threshold = tl.load(held + row)

        place = (head * splits + split) * positions + start_row + row
        number = tl.zeros([BLOCK_N], tl.int32)
        for tile in range(begin, end):
            score, margin = tile_scores(
                operand, back, at_length, at_residual, codes, bias, table, first_tile + tile, depth,
                STREAM, TMA, BLOCK_K, BLOCK_D if STREAM else DEPTH,
            )  # fmt: skip
            # A code of each row at a time: few tiles have more than one that reaches the threshold.
            next_column = tl.where(score + margin[:, None] >= threshold[:, None], column, BLOCK_K)
            in_tile = tl.min(next_column, axis=1)
            while tl.min(in_tile) < BLOCK_K:
                reaches = in_tile < BLOCK_K
                tl.store(listed + place * SLOTS + number, tile * BLOCK_K + in_tile, mask=reaches & (number < SLOTS))
                number += reaches.to(tl.int32)
                # A row with a full list needs no more.
                next_column = tl.where((next_column > in_tile[:, None]) & (number <= SLOTS)[:, None], next_column, BLOCK_K)
                in_tile = tl.min(next_column, axis=1)
        tl.store(counts + place, tl.where(usable, number, SLOTS + 1), mask=inside)


@triton.jit
def distance_of(order, square, COSINE: tl.constexpr):
    """What is returned as the distance: for cosine 1 - similarity, from its signed square times the square of the length."""
    distance = order
    if COSINE:
        similarity = tl.where(square > 0, tl.sqrt(tl.abs(order) / tl.where(square > 0, square, 1.0)), 0.0)
        distance = tl.where(order < 0, 1 - similarity, 1 + similarity)
        distance = tl.where((order < float("inf")) & (distance == distance), distance, float("inf"))
    return distance.to(tl.float32)


@triton.jit(
    do_not_specialize=["k", "positions", "inner", "num_codes", "splits", "dim", "stride_head", "stride_outer", "stride_codebook"]
)  # fmt: skip
def nearest_codes_decide_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    listed,  # [heads, splits, positions, SLOTS]
    counts,  # [heads, splits, positions]
    indices,  # [heads, outer, inner, k]
    distances,  # [heads, outer, inner, k], unless None
    k,
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
    WITH_DISTANCES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Programs [rows, heads]: float64 distances of the listed codes, of which the k smallest are stored in order.

    A row with more codes than a list holds, or without a threshold, is compared with all codes, of which KEPT >= k are held.
    """
    head = tl.program_id(1).to(tl.int64)
    x += head * stride_head
    codebook += head * stride_codebook
    lane = tl.arange(0, BLOCK_N)
    slot = tl.arange(0, SLOTS)[None, :]
    position = tl.program_id(0).to(tl.int64) * BLOCK_N + lane
    inside = position < positions
    base = position_offsets(position, inner, stride_outer, stride_inner)
    to = (head * positions + position) * k

    square = tl.zeros([BLOCK_N], tl.float64)
    if COSINE and WITH_DISTANCES:
        component = x + base
        for _ in range(dim):
            value = tl.load(component, mask=inside, other=0).to(tl.float64)
            component += stride_d
            square += value * value

    # The lists of the splits, one after the other.
    code = tl.full([BLOCK_N, SLOTS], -1, tl.int32)
    number = tl.zeros([BLOCK_N], tl.int32)
    for split in range(splits):
        place = (head * splits + split) * positions + position
        more = tl.load(counts + place, mask=inside, other=0)
        within = slot - number[:, None]
        take = (within >= 0) & (within < more[:, None])
        code = tl.where(take, tl.load(listed + place[:, None] * SLOTS + within, mask=take & (within < SLOTS), other=-1), code)
        number += more
    in_list = inside & (number <= SLOTS)

    code = tl.where((code >= 0) & in_list[:, None], code.to(tl.int64), NO_CODE)
    query = x + base[:, None] + tl.zeros([BLOCK_N, SLOTS], tl.int64)
    present = code < NO_CODE
    order = distances_in_order(query, codebook + tl.where(present, code, 0) * stride_k, present, dim, stride_d, stride_code_d, COSINE)
    for j in range(k):
        smallest = tl.min(tl.where(code < NO_CODE, order, float("inf")), axis=1)
        nearest = tl.min(tl.where(order == smallest[:, None], code, NO_CODE), axis=1)
        tl.store(indices + to + j, nearest, mask=in_list)
        if WITH_DISTANCES:
            tl.store(distances + to + j, distance_of(smallest, square, COSINE), mask=in_list)
        code = tl.where(code == nearest[:, None], NO_CODE, code)

    all_codes = inside & (number > SLOTS)
    current = tl.min(tl.where(all_codes, lane, BLOCK_N))
    while current < BLOCK_N:
        here = lane == current
        base_of_row = tl.sum(tl.where(here, base, 0))
        to_row = tl.sum(tl.where(here, to, 0))
        square_of_row = tl.sum(tl.where(here, square, 0.0))
        # Places without a code are farther than all codes.
        kept = NO_CODE + tl.arange(0, KEPT).to(tl.int64)
        kept = tl.where(tl.arange(0, KEPT) < k, kept, -1)
        kept_order = tl.where(kept >= 0, float("inf"), float("-inf")).to(tl.float64)
        for start in range(0, num_codes, CHUNK):
            each = start + tl.arange(0, CHUNK).to(tl.int64)
            valid = each < num_codes
            query_row = x + base_of_row + tl.zeros([CHUNK], tl.int64)
            away = distances_in_order(query_row, codebook + each * stride_k, valid, dim, stride_d, stride_code_d, COSINE)
            each = tl.where(valid, each, NO_CODE)
            closest = tl.min(away)
            which = tl.min(tl.where(away == closest, each, NO_CODE))
            farthest = tl.max(kept_order)
            last = tl.max(tl.where(kept_order == farthest, kept, -1))
            # An index is above all that are kept, so that an equal distance does not count.
            while (which < NO_CODE) & ((closest < farthest) | (last >= NO_CODE)):
                kept_order = tl.where(kept == last, closest, kept_order)
                kept = tl.where(kept == last, which, kept)
                away = tl.where(each == which, float("inf"), away)
                each = tl.where(each == which, NO_CODE, each)
                closest = tl.min(away)
                which = tl.min(tl.where(away == closest, each, NO_CODE))
                farthest = tl.max(kept_order)
                last = tl.max(tl.where(kept_order == farthest, kept, -1))
        for j in range(k):
            smallest = tl.min(tl.where(kept >= 0, kept_order, float("inf")))
            nearest = tl.min(tl.where((kept >= 0) & (kept_order == smallest), kept, 2 * NO_CODE))
            tl.store(indices + to_row + j, nearest)
            if WITH_DISTANCES:
                tl.store(distances + to_row + j, distance_of(smallest, square_of_row, COSINE))
            kept = tl.where(kept == nearest, -1, kept)
        current = tl.min(tl.where(all_codes & (lane > current), lane, BLOCK_N))
