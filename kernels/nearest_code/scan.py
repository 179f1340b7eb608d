# SPDX-License-Identifier: Apache-2.0
"""The pass: float16 scores on the tensor cores, of which each row keeps what tells the nearest code or the few that can be it.

A score plus its bound is an upper bound of the exact score. A code can be the nearest only if its upper bound reaches the row's
threshold, the largest of all lower bounds. Largest upper bounds are kept over three partitions of the codes, so that there is
no index to carry along with each score: a code k = tile BLOCK_K + group 16 + offset belongs to its tile, of which the three
best are kept, to its group of 16 columns, and to its offset. If a single tile, group and offset reach the threshold, they name
the nearest code.

In the accumulators of the tensor cores a thread holds the columns 8i + 2j and 8i + 2j + 1 of a row, for one j of 4. So the
offsets are split by j, and everything is kept for each j apart (a lane): nothing is exchanged between threads before the end.
"""

import triton
import triton.language as tl

from .bound import FIRST_FINITE, LENGTH, NO_CODE, OF_TILE, RESIDUAL, SCALE, SHORTEST, TILE_COLUMNS, bound_at_residual, bound_at_zero
from .rows import round_rows, row_offsets

NOT_DECIDED = tl.constexpr(-1)  # in `first`: more codes than a pair or a box can be the nearest
NONE = tl.constexpr(-1)  # in `last`: the first is the only one


@triton.jit
def tile_scores(
    queries,  # [BLOCK_N, DEPTH] values, or if STREAM pointers [BLOCK_N] to rows of [depth]
    back,  # [BLOCK_N]
    at_length,  # [BLOCK_N]
    at_residual,  # [BLOCK_N]
    codes,  # [heads * tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [heads * tiles * BLOCK_K]
    table,  # [heads * tiles, TILE_COLUMNS]
    tile,  # among the tiles of all heads
    depth,
    STREAM: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores [BLOCK_N, BLOCK_K] of one tile of codes, and their bound for each row but for `at_zero`.

    BLOCK_D columns are multiplied at a time.
    """
    column = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    row = tile.to(tl.int64) * BLOCK_K
    # These loads come first, since none that follows a product is started before it ends.
    of_tile = table + tile.to(tl.int64) * TILE_COLUMNS
    factor = back * tl.load(of_tile + SCALE)
    margin = at_length * tl.load(of_tile + LENGTH) + (at_residual * tl.load(of_tile + RESIDUAL) + tl.load(of_tile + OF_TILE))
    if STREAM:
        score = tl.zeros([back.shape[0], BLOCK_K], tl.float32)
        for start in range(0, depth, BLOCK_D):
            a = tl.load(queries[:, None] + (start + column)[None, :])
            b = (
                codes.load([tile * BLOCK_K, start])
                if TMA
                else tl.load((codes + row * depth + start) + (k[:, None] * depth + column[None, :]))
            )
            score = tl.dot(a, tl.trans(b), score)
    else:
        b = codes.load([tile * BLOCK_K, 0]) if TMA else tl.load((codes + row * BLOCK_D) + (k[:, None] * BLOCK_D + column[None, :]))
        score = tl.dot(queries, tl.trans(b))
    # Explicitly, for kernels that are compiled without fused multiply-adds.
    return tl.fma(score, factor[:, None], tl.load((bias + row) + k)[None, :]), margin


@triton.jit
def shortest_unscored(table, tiles):
    """The least length of the codes of a head that are not scored because of their length, or inf."""
    shortest = tl.full([], float("inf"), tl.float32)
    for start in range(0, tiles, 64):
        tile = start + tl.arange(0, 64)
        shortest = tl.minimum(shortest, tl.min(tl.load(table + SHORTEST + tile * TILE_COLUMNS, mask=tile < tiles, other=float("inf"))))
    return shortest


@triton.jit
def first_finite_code(table, tiles):
    """The lowest code of a head without NaN or infinity, or 0 if there is none."""
    first = tl.full([], NO_CODE, tl.int32)
    for start in range(0, tiles, 64):
        tile = start + tl.arange(0, 64)
        bits = tl.load(table + FIRST_FINITE + tile * TILE_COLUMNS, mask=tile < tiles, other=0).to(tl.int32, bitcast=True)
        first = tl.minimum(first, tl.min(tl.where(tile < tiles, bits, NO_CODE)))
    return tl.where(first == NO_CODE, 0, first)


@triton.jit
def unscored_bound(length, shortest, COSINE: tl.constexpr):
    """An upper bound of the scores f (|z| - f / 2) of the codes that are not scored, of lengths f >= shortest; inf if there is none."""
    if COSINE:
        bound = tl.where(length < float("inf"), float("-inf"), float("inf"))
    else:
        highest = tl.maximum(length, shortest)
        bound = tl.where(length < float("inf"), highest * (length - 0.499 * highest) + 1e-30, float("inf"))
    return bound


@triton.jit
def pass_over_codes(
    operand,  # [BLOCK_N, DEPTH] values, or if STREAM pointers [BLOCK_N] to rows of [depth]
    back,
    at_length,
    at_residual,
    codes,
    bias,
    table,
    first_tile,
    begin,
    end,
    depth,
    STREAM: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the tiles begin ... end - 1 of a head leave of each row: the largest upper bounds, and the largest lower bound."""
    GROUPS: tl.constexpr = BLOCK_K // 16
    of_group = tl.full([BLOCK_N, GROUPS, 4], float("-inf"), tl.float32)
    of_offset = tl.full([BLOCK_N, 2, 4, 2], float("-inf"), tl.float32)
    best = tl.full([BLOCK_N, 4], float("-inf"), tl.float32)
    second = best
    third = best
    largest_lower = best
    best_tile = tl.zeros([BLOCK_N, 4], tl.int32)
    second_tile = best_tile
    for tile in range(begin, end):
        score, margin = tile_scores(
            operand, back, at_length, at_residual, codes, bias, table, first_tile + tile, depth,
            STREAM, TMA, BLOCK_K, BLOCK_D if STREAM else DEPTH,
        )  # fmt: skip
        score = tl.reshape(score, [BLOCK_N, GROUPS, 2, 4, 2])
        group = tl.max(tl.max(score, axis=4), axis=2)
        of_group = tl.maximum(of_group, group + margin[:, None, None])
        of_offset = tl.maximum(of_offset, tl.max(score, axis=1) + margin[:, None, None, None])
        highest = tl.max(group, axis=1)
        largest_lower = tl.maximum(largest_lower, highest - margin[:, None])
        highest += margin[:, None]
        second_tile = tl.where(highest > best, best_tile, tl.where(highest > second, tile, second_tile))
        best_tile = tl.where(highest > best, tile, best_tile)
        rest = tl.minimum(best, highest)
        best = tl.maximum(best, highest)
        third = tl.maximum(third, tl.minimum(second, rest))
        second = tl.maximum(second, rest)
    return of_group, of_offset, best, second, third, largest_lower, best_tile, second_tile


@triton.jit
def nearest_of_pass(passed, threshold, usable, BLOCK_K: tl.constexpr):
    """`first` and `last` of the kernel below: the codes that reach the threshold, of which there is one, two, or a box."""
    GROUPS: tl.constexpr = BLOCK_K // 16
    of_group, of_offset, best, second, third, _, best_tile, second_tile = passed
    lane = 2 * tl.arange(0, 4)[None, :]
    reached = threshold[:, None]
    active = best >= reached
    other = second >= reached
    num = active.to(tl.int32) + other.to(tl.int32)
    too_many = third >= reached
    low = tl.minimum(best_tile, tl.where(other, second_tile, best_tile)) * BLOCK_K + lane
    high = tl.maximum(best_tile, tl.where(other, second_tile, best_tile)) * BLOCK_K + lane

    group = 16 * tl.arange(0, GROUPS)[None, :, None]
    reaches = of_group >= threshold[:, None, None]
    num_groups = tl.sum(reaches.to(tl.int32), axis=1)
    low += tl.min(tl.where(reaches, group, BLOCK_K), axis=1)
    high += tl.max(tl.where(reaches, group, 0), axis=1)

    offset = 8 * tl.arange(0, 2)[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    reaches = of_offset >= threshold[:, None, None, None]
    num_offsets = tl.sum(tl.sum(reaches.to(tl.int32), axis=3), axis=1)
    low += tl.min(tl.min(tl.where(reaches, offset, BLOCK_K), axis=3), axis=1)
    high += tl.max(tl.max(tl.where(reaches, offset, 0), axis=3), axis=1)

    lanes = tl.sum(active.to(tl.int32), axis=1)
    total = tl.sum(tl.where(active, num * num_groups * num_offsets, 0), axis=1)
    too_many = too_many | (num_groups > 2) | (num_offsets > 2)
    box = (lanes == 1) & (tl.max((active & too_many).to(tl.int32), axis=1) == 0)
    few = (total <= 2) & (tl.max((active & (third >= reached)).to(tl.int32), axis=1) == 0)
    lowest = tl.min(tl.where(active, low, 0x7FFFFFFF), axis=1)
    highest = tl.max(tl.where(active, high, 0), axis=1)
    first = tl.where(usable & (few | box), lowest, NOT_DECIDED)
    return first, tl.where(few, tl.where(lowest == highest, NONE, highest), -2 - highest)


@triton.jit(do_not_specialize=["num_counts", "positions", "inner", "tiles", "tiles_per_program"])
def nearest_code_scan_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D + 1]
    codes,  # [heads * tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [heads, tiles * BLOCK_K]
    table,  # [heads, tiles, TILE_COLUMNS]
    queries,  # [programs, BLOCK_N, depth]
    lower,  # [heads, splits, positions] the threshold
    upper,  # [heads, splits, positions] the largest upper bound, or unused with one split
    first,  # [heads, splits, positions] the lowest code that can be the nearest, or NOT_DECIDED
    last,  # [heads, splits, positions] NONE; or the other of a pair; or -2 - code, the opposite corner of a box
    counts,  # [heads, 1 + programs of the search] set to zero
    num_counts,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs [rows, splits, heads]: each passes over its share of the codes for one tile of rows after the other."""
    head = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    program = (head * tl.num_programs(1) + split) * tl.num_programs(0) + tl.program_id(0)
    x += head * stride_head
    center += head * (dim + 1)
    queries += program * BLOCK_N * depth
    first_tile = tl.program_id(2) * tiles
    begin = split * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tiles)
    row = tl.arange(0, BLOCK_N)
    shortest = shortest_unscored(table + first_tile * TILE_COLUMNS, tiles)
    if (tl.program_id(0) == 0) & (split == 0):
        for start in range(0, num_counts, 256):
            number = start + tl.arange(0, 256)
            tl.store(counts + head * num_counts + number, tl.zeros([256], tl.int32), mask=number < num_counts)

    for start_row in range(tl.program_id(0).to(tl.int64) * BLOCK_N, positions, tl.num_programs(0) * BLOCK_N):
        inside = start_row + row < positions
        base = row_offsets(start_row, row, inner, stride_outer, stride_inner)
        place = (head * tl.num_programs(1) + split) * positions + start_row + row
        once: tl.constexpr = DEPTH <= BLOCK_D and not SPLIT and not PLANAR  # transposed they do not fit in the registers
        back, bound = round_rows(x, center, queries, base, inside, dim, depth, stride_d, COSINE, PLANAR, SPLIT, BLOCK_D, once)
        at_length, _, _, length = bound
        # Through memory into the registers of the threads that have the scores of these rows, once instead of for every tile.
        tl.store(lower + place, at_length, mask=inside)
        tl.store(first + place, length.to(tl.int32, bitcast=True), mask=inside)
        tl.store(last + place, back.to(tl.int32, bitcast=True), mask=inside)
        tl.debug_barrier()
        at_length = tl.load(lower + place, mask=inside, other=0)
        at_residual = bound_at_residual(tl.load(first + place, mask=inside, other=0).to(tl.float32, bitcast=True), dim)
        back = tl.load(last + place, mask=inside, other=0).to(tl.float32, bitcast=True)
        operand = queries + row * depth
        if not STREAM:
            operand = tl.load(operand[:, None] + tl.arange(0, DEPTH)[None, :])

        passed = pass_over_codes(
            operand, back, at_length, at_residual, codes, bias, table, first_tile, begin, end, depth,
            STREAM, TMA, DEPTH, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        tl.debug_barrier()
        length = tl.load(first + place, mask=inside, other=0).to(tl.float32, bitcast=True)  # not held in registers over the pass
        threshold = tl.max(passed[5], axis=1) - 2 * bound_at_zero(length, dim, COSINE)
        unscored = unscored_bound(length, shortest, COSINE)
        usable = (threshold > float("-inf")) & (unscored < threshold)
        threshold = tl.where(unscored < float("inf"), threshold, float("-inf"))
        first_code, last_code = nearest_of_pass(passed, threshold, usable, BLOCK_K)
        highest = tl.maximum(tl.max(passed[2], axis=1), unscored)
        # All distances are infinite, or all to finite codes are zero: the first program over the codes says so.
        by_rule = length != length
        index = 0
        if COSINE:
            by_rule = by_rule | (length == 0)
            index = tl.where(length == 0, first_finite_code(table + first_tile * TILE_COLUMNS, tiles), 0)
        first_code = tl.where(by_rule, index, first_code)
        last_code = tl.where(by_rule, NONE, last_code)
        threshold = tl.where(by_rule, 0.0, threshold)
        highest = tl.where(by_rule, tl.where(split == 0, 1.0, -1.0), highest)
        tl.debug_barrier()
        tl.store(first + place, first_code, mask=inside)
        tl.store(last + place, last_code, mask=inside)
        tl.store(lower + place, threshold, mask=inside)
        if SPLITS:
            tl.store(upper + place, highest, mask=inside)
