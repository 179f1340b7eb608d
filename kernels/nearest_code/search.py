"""Searches the listed rows: the codes that reach a row's threshold are collected and compared in float64.

Rows are taken 64 at a time. If they are few, the codes of each 64 are divided among several programs, of which the last one to
end takes the nearest of all. A row with more codes than the list of a program holds, or without a bound, is compared in float64
with all codes of the program.
"""

import triton
import triton.language as tl

from .rows import position_offsets, round_rows
from .scan import tile_scores, unscored_bound
from .settle import distances_in_order

NO_CODE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["num_counts", "positions", "inner", "num_codes", "tiles", "splits"])
def nearest_code_search_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    center,  # [heads, D + 1]
    codes,  # [heads * tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [heads, tiles * BLOCK_K]
    table,  # [heads, tiles, TILE_COLUMNS]
    queries,  # [heads, programs, BLOCK_N, depth]
    lower,  # [heads, splits, positions]
    indices,  # [heads, outer, inner]
    rows,  # [heads, positions]
    counts,  # [heads, 1 + programs]
    part_distance,  # [heads, programs, BLOCK_N]
    part_index,  # [heads, programs, BLOCK_N]
    num_counts,
    positions,
    inner,
    num_codes,
    tiles,
    splits,
    dim,
    depth,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    stride_codebook,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    SPLIT: tl.constexpr,
    STREAM: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    x += head * stride_head
    codebook += head * stride_codebook
    center += head * (dim + 1)
    first_tile = tl.program_id(1) * tiles
    rows += head * positions
    counts += head * num_counts
    queries += (head * programs + tl.program_id(0)) * BLOCK_N * depth
    part_distance += head * programs * BLOCK_N
    part_index += head * programs * BLOCK_N
    count = tl.load(counts)
    batches = tl.cdiv(count, BLOCK_N)
    parts = tl.minimum(tl.maximum(programs // tl.maximum(batches, 1), 1), tiles)
    per_part = tl.cdiv(tiles, parts)
    lane = tl.arange(0, BLOCK_N)
    slot = tl.arange(0, SLOTS)[None, :]

    for item in range(tl.program_id(0), batches * parts, programs):
        batch = item // parts
        part = item % parts
        begin = part * per_part
        end = tl.minimum(begin + per_part, tiles)
        inside = batch * BLOCK_N + lane < count
        position = tl.load(rows + batch * BLOCK_N + lane, mask=inside, other=0)
        base = position_offsets(position, inner, stride_outer, stride_inner)
        place = head * splits * positions + position
        back, bound = round_rows(x, center, queries, base, inside, dim, depth, stride_d, COSINE, False, SPLIT, BLOCK_D)
        operand = queries + lane * depth
        if not STREAM:
            operand = tl.load(operand[:, None] + tl.arange(0, DEPTH)[None, :])
        at_length, at_residual, _, length = bound
        threshold = tl.load(lower + place, mask=inside, other=float("inf"))
        collected = (threshold > float("-inf")) & (unscored_bound(length, tl.load(center + dim), COSINE) < threshold) & inside
        threshold = tl.where(collected, threshold, float("inf"))

        found = tl.full([BLOCK_N, SLOTS], -1, tl.int32)
        number = tl.zeros([BLOCK_N], tl.int32)
        for tile in range(begin, end):
            score, margin = tile_scores(
                operand, back, at_length, at_residual, codes, bias, table, first_tile + tile, depth,
                STREAM, TMA, BLOCK_K, BLOCK_D if STREAM else DEPTH,
            )  # fmt: skip
            column = tl.arange(0, BLOCK_K)[None, :]
            next_column = tl.where(score + margin[:, None] >= threshold[:, None], column, BLOCK_K)
            place_in_tile = tl.min(next_column, axis=1)
            while tl.min(place_in_tile) < BLOCK_K:
                has = (place_in_tile < BLOCK_K)[:, None]
                found = tl.where((slot == number[:, None]) & has, tile * BLOCK_K + place_in_tile[:, None], found)
                number += (place_in_tile < BLOCK_K).to(tl.int32)
                # A row with a full list needs no more.
                next_column = tl.where((next_column > place_in_tile[:, None]) & (number <= SLOTS)[:, None], next_column, BLOCK_K)
                place_in_tile = tl.min(next_column, axis=1)

        k = found.to(tl.int64)
        query = x + base[:, None] + tl.zeros([BLOCK_N, SLOTS], tl.int64)
        listed = (k >= 0) & (number <= SLOTS)[:, None]
        distance = distances_in_order(query, codebook + k * stride_k, listed, dim, stride_d, stride_code_d, COSINE)
        smallest = tl.min(distance, axis=1)
        nearest = tl.min(tl.where(listed & (distance == smallest[:, None]), k, NO_CODE), axis=1)

        all_codes = inside & ((collected == 0) | (number > SLOTS))
        current = tl.min(tl.where(all_codes, lane, BLOCK_N))
        while current < BLOCK_N:
            base_of_row = tl.sum(tl.where(lane == current, base, 0))
            least = tl.full([], float("inf"), tl.float64)
            index = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
            for start in range(begin * BLOCK_K, tl.minimum(end * BLOCK_K, num_codes), 256):
                each = start + tl.arange(0, 256).to(tl.int64)
                valid = (each < num_codes) & (each < end * BLOCK_K)
                query_row = x + base_of_row + tl.zeros([256], tl.int64)
                away = distances_in_order(query_row, codebook + each * stride_k, valid, dim, stride_d, stride_code_d, COSINE)
                closest = tl.min(away)
                which = tl.min(tl.where(valid & (away == closest), each, NO_CODE))
                index = tl.where((closest < least) | (index == NO_CODE), which, index)
                least = tl.minimum(least, closest)
            smallest = tl.where(lane == current, least, smallest)
            nearest = tl.where(lane == current, index, nearest)
            current = tl.min(tl.where(all_codes & (lane > current), lane, BLOCK_N))

        # The program that ends last takes the nearest of all parts, each of which has codes above those of the parts before it.
        tl.store(part_distance + item % programs * BLOCK_N + lane, smallest)
        tl.store(part_index + item % programs * BLOCK_N + lane, nearest)
        tl.debug_barrier()
        ended = 0
        if parts > 1:
            ended = tl.atomic_add(counts + 1 + batch, 1)
        if ended == parts - 1:
            smallest = tl.full([BLOCK_N], float("inf"), tl.float64)
            nearest = tl.full([BLOCK_N], NO_CODE, tl.int64)
            for other in range(parts):
                at = (batch * parts + other) % programs * BLOCK_N + lane
                away = tl.load(part_distance + at, cache_modifier=".cg")
                which = tl.load(part_index + at, cache_modifier=".cg")
                nearer = (which != NO_CODE) & ((away < smallest) | (nearest == NO_CODE))
                smallest = tl.where(nearer, away, smallest)
                nearest = tl.where(nearer, which, nearest)
            tl.store(indices + head * positions + position, nearest, mask=inside)
