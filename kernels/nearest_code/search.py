# SPDX-License-Identifier: Apache-2.0
"""Searches the listed rows: the codes that reach a row's threshold are collected and compared in float64.

Rows are taken 64 at a time, or 16 if they are few, and their codes are divided among as many programs as are idle, of which the last
one to end takes the nearest of all. A row with more codes than the list of a program holds, or without a bound, is compared with
all codes of the program in float32, whose error is bounded too, and then with those that this leaves in float64. If float32 leaves
more than one in a column, or the row is beyond its range, float64 decides among all of them.
"""

import triton
import triton.language as tl

from .bound import NO_CODE, TILE_COLUMNS
from .rows import position_offsets, round_rows
from .scan import shortest_unscored, tile_scores, unscored_bound
from .settle import distances_of_all


@triton.jit
def nearest_in_order(distance, k, valid):
    """The least distance of each row and the lowest of its codes, or NO_CODE."""
    least = tl.min(distance, axis=1)
    return least, tl.min(tl.where(valid & (distance == least[:, None]), k, NO_CODE), axis=1)


@triton.jit
def candidates_in_float32(
    x,
    base,  # offsets of the rows
    present,
    length,  # at least |z|; inf or NaN if there is no bound
    center,
    codebook,
    norms,
    begin,
    end,
    dim,
    stride_d,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The codes begin ... end - 1 that can be the nearest, at most one in each of BLOCK_K columns, or NO_CODE; and whether that is all.

    The scores z.f - |f|^2 / 2 and z.f / |f|, in float32, differ from the exact ones by at most the rounding of z and f, that of
    the sum in any order, and that of the norm: (D + 8) 2^-24 |z| |f|, with 5 % to spare for what is of second order, and
    3 2^-24 |f|^2 / 2. The float64 distances that decide in the end differ by what (D + 4) 2^-52 |z|^2 and these cover.
    """
    rows: tl.constexpr = base.shape[0]
    error = (dim + 8) * 6.26e-08 * (1.0 + dim * 1.2e-7) * length
    usable = present & (length < 1e18)
    if COSINE:
        usable = usable & (length < 1e15) & (length > 1e-15)
        of_float64 = tl.zeros([rows], tl.float32)
    else:
        of_float64 = tl.where(usable, (dim + 4) * 2.3e-16 * length * length, 0.0) + 1e-30
    error = tl.where(usable, error, 0.0)
    best = tl.full([rows, BLOCK_K], float("-inf"), tl.float32)
    second = best
    lower = best
    which = tl.full([rows, BLOCK_K], NO_CODE, tl.int32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        norm = tl.load(norms + k, mask=k < end, other=float("inf"))
        valid = norm < float("inf")
        product = tl.zeros([rows, BLOCK_K], tl.float32)
        for first in range(0, dim, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            offset = d.to(tl.int64)
            keep = usable[:, None] & (d < dim)[None, :]
            z = tl.load(x + base[:, None] + offset[None, :] * stride_d, mask=keep, other=0).to(tl.float32)
            keep = valid[:, None] & (d < dim)[None, :]
            f = tl.load(codebook + k.to(tl.int64)[:, None] * stride_k + offset[None, :] * stride_code_d, mask=keep, other=0).to(tl.float32)
            if not COSINE:
                c = tl.load(center + d, mask=d < dim, other=0)[None, :]
                z = tl.where(usable[:, None], z - c, 0.0)
                f = tl.where(valid[:, None], f - c, 0.0)
            product = tl.dot(z, tl.trans(f), product, input_precision="ieee")
        if COSINE:
            score = product * norm[None, :]
            margin = error[:, None] + tl.zeros([rows, BLOCK_K], tl.float32)
            known = (norm > 1e-15) & (norm < 1e15)
        else:
            score = product - norm[None, :]
            margin = error[:, None] * (tl.sqrt(2 * norm) * 1.000001)[None, :] + (1.8e-07 * norm)[None, :] + of_float64[:, None]
            known = norm < 1e37
        # What is not known may be any score, and leaves the row to float64.
        upper = tl.where(known[None, :], score + margin, float("inf"))
        lower = tl.maximum(lower, tl.where((known & valid)[None, :], score - margin, float("-inf")))
        upper = tl.where(valid[None, :], upper, float("-inf"))
        second = tl.maximum(second, tl.minimum(best, upper))
        which = tl.where(upper > best, k[None, :], which)
        best = tl.maximum(best, upper)
    threshold = tl.max(lower, axis=1)[:, None]
    complete = usable & (tl.max((second >= threshold).to(tl.int32) * (second > float("-inf")).to(tl.int32), axis=1) == 0)
    return tl.where(complete[:, None] & (best >= threshold), which, NO_CODE), complete


@triton.jit
def nearest_in_float64(
    x,  # pointers to rows
    present,
    codebook,
    norms,
    begin,
    end,
    dim,
    stride_d,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The least distance to the codes begin ... end - 1 in the arithmetic of the reference, and the lowest such code."""
    rows: tl.constexpr = present.shape[0]
    best = tl.full([rows, BLOCK_K], float("inf"), tl.float64)
    which = tl.full([rows, BLOCK_K], NO_CODE, tl.int32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        norm = tl.load(norms + k, mask=k < end, other=float("inf"))
        of_code = (norm < float("inf"))[None, :]
        code = (codebook + k.to(tl.int64) * stride_k)[None, :]
        distance = distances_of_all(x[:, None], code, present[:, None], of_code, dim, stride_d, stride_code_d, COSINE)
        nearer = present[:, None] & of_code & ((distance < best) | (which == NO_CODE))
        which = tl.where(nearer, k[None, :], which)
        best = tl.where(nearer, distance, best)
    return nearest_in_order(best, which, which != NO_CODE)


@triton.jit(do_not_specialize=["num_counts", "positions", "inner", "num_codes", "tiles", "splits"])
def nearest_code_search_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    center,  # [heads, D + 1]
    codes,  # [heads * tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [heads, tiles * BLOCK_K]
    norms,  # [heads, tiles * BLOCK_K]
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
    ALL_ROWS: tl.constexpr,
    ALL_CODES: tl.constexpr,
    ALL_DIMS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    x += head * stride_head
    codebook += head * stride_codebook
    center += head * (dim + 1)
    norms += head * tiles * BLOCK_K
    first_tile = tl.program_id(1) * tiles
    rows += head * positions
    counts += head * num_counts
    queries += (head * programs + tl.program_id(0)) * BLOCK_N * depth
    part_distance += head * programs * BLOCK_N
    part_index += head * programs * BLOCK_N
    count = tl.load(counts)
    # Codes are divided in units of ALL_CODES; if that leaves programs idle, rows too.
    units = tl.cdiv(num_codes, ALL_CODES)
    size = tl.where(tl.cdiv(count, BLOCK_N // 4).to(tl.int64) * units <= programs, BLOCK_N // 4, BLOCK_N)
    batches = tl.cdiv(count, size)
    parts = tl.minimum(tl.maximum(programs // tl.maximum(batches, 1), 1), units)
    per_part = tl.cdiv(units, parts) * ALL_CODES
    lane = tl.arange(0, BLOCK_N)
    slot = tl.arange(0, SLOTS)[None, :]
    shortest = shortest_unscored(table + first_tile * TILE_COLUMNS, tiles)

    for item in range(tl.program_id(0), batches * parts, programs):
        batch = item // parts
        part = item % parts
        begin = tl.minimum(part * per_part, num_codes)
        end = tl.minimum(begin + per_part, num_codes)
        inside = (lane < size) & (batch * size + lane < count)
        position = tl.load(rows + batch * size + lane, mask=inside, other=0)
        base = position_offsets(position, inner, stride_outer, stride_inner)
        place = head * splits * positions + position
        back, bound = round_rows(x, center, queries, base, inside, dim, depth, stride_d, COSINE, False, SPLIT, BLOCK_D)
        operand = queries + lane * depth
        if not STREAM:
            operand = tl.load(operand[:, None] + tl.arange(0, DEPTH)[None, :])
        at_length, at_residual, _, length = bound
        threshold = tl.load(lower + place, mask=inside, other=float("inf"))
        bounded = inside & (threshold > float("-inf")) & (length < float("inf"))
        threshold = tl.where(bounded, threshold, float("inf"))
        # Rows that codes which are not scored may be nearest to.
        open_rows = bounded & ((unscored_bound(length, shortest, COSINE) < threshold) == 0)

        found = tl.full([BLOCK_N, SLOTS], -1, tl.int32)
        number = tl.zeros([BLOCK_N], tl.int32)
        last = tl.where(tl.max(bounded.to(tl.int32)) > 0, tl.cdiv(end, BLOCK_K), 0)
        any_open = tl.max(open_rows.to(tl.int32)) > 0
        for tile in range(begin // BLOCK_K, last):
            score, margin = tile_scores(
                operand, back, at_length, at_residual, codes, bias, table, first_tile + tile, depth,
                STREAM, TMA, BLOCK_K, BLOCK_D if STREAM else DEPTH,
            )  # fmt: skip
            column = tl.arange(0, BLOCK_K)
            k = tile * BLOCK_K + column
            reaches = score + margin[:, None] >= threshold[:, None]
            if any_open:
                norm = tl.load(norms + k)
                is_unscored = (tl.load(bias + first_tile.to(tl.int64) * BLOCK_K + k) == float("-inf")) & (norm < float("inf"))
                f = tl.sqrt(2 * tl.where(is_unscored, norm, 0.0))[None, :]
                highest = f * (length[:, None] - 0.499 * f) + 1e-30
                reaches = reaches | (open_rows[:, None] & is_unscored[None, :] & (highest >= threshold[:, None]))
            next_column = tl.where(reaches & ((k >= begin) & (k < end))[None, :], column[None, :], BLOCK_K)
            place_in_tile = tl.min(next_column, axis=1)
            while tl.min(place_in_tile) < BLOCK_K:
                has = (place_in_tile < BLOCK_K)[:, None]
                found = tl.where((slot == number[:, None]) & has, tile * BLOCK_K + place_in_tile[:, None], found)
                number += (place_in_tile < BLOCK_K).to(tl.int32)
                # A row with a full list needs no more.
                next_column = tl.where((next_column > place_in_tile[:, None]) & (number <= SLOTS)[:, None], next_column, BLOCK_K)
                place_in_tile = tl.min(next_column, axis=1)

        listed = (found >= 0) & (number <= SLOTS)[:, None]
        distance = distances_of_all(
            (x + base)[:, None], codebook + found.to(tl.int64) * stride_k, inside[:, None], listed, dim, stride_d, stride_code_d, COSINE
        )  # fmt: skip
        smallest, nearest = nearest_in_order(distance, found, listed)

        # The other rows ALL_ROWS at a time.
        compared = inside & ((bounded == 0) | (number > SLOTS))
        order = tl.where(compared, tl.cumsum(compared.to(tl.int32), axis=0) - 1, -1)
        for start in range(0, tl.sum(compared.to(tl.int32)), ALL_ROWS):
            chosen = (start + tl.arange(0, ALL_ROWS))[:, None] == order[None, :]
            present = tl.max(chosen.to(tl.int32), axis=1) > 0
            of_chosen = tl.sum(tl.where(chosen, base[None, :], 0), axis=1)
            # NaN is a length too.
            length_of_chosen = tl.sum(tl.where(chosen, length[None, :], 0.0), axis=1)
            which, complete = candidates_in_float32(
                x, of_chosen, present, length_of_chosen, center, codebook, norms, begin, end, dim, stride_d, stride_k, stride_code_d,
                COSINE, ALL_CODES, ALL_DIMS,
            )  # fmt: skip
            is_code = which != NO_CODE
            pointers = x + of_chosen
            candidates = codebook + tl.where(is_code, which, 0).to(tl.int64) * stride_k
            away = distances_of_all(pointers[:, None], candidates, present[:, None], is_code, dim, stride_d, stride_code_d, COSINE)
            least, closest = nearest_in_order(away, which, is_code)
            left = present & (complete == 0)
            if tl.max(left.to(tl.int32)) > 0:
                least_of_all, closest_of_all = nearest_in_float64(
                    pointers, left, codebook, norms, begin, end, dim, stride_d, stride_k, stride_code_d, COSINE, ALL_CODES
                )  # fmt: skip
                least = tl.where(left, least_of_all, least)
                closest = tl.where(left, closest_of_all, closest)
            back_to = tl.max(chosen.to(tl.int32), axis=0) > 0
            smallest = tl.where(back_to, tl.sum(tl.where(chosen, least[:, None], 0.0), axis=0), smallest)
            nearest = tl.where(back_to, tl.sum(tl.where(chosen, closest[:, None], 0), axis=0), nearest)

        # The program that ends last takes the nearest of all parts, each of which has codes above those of the parts before it.
        tl.store(part_distance + item % programs * BLOCK_N + lane, smallest)
        tl.store(part_index + item % programs * BLOCK_N + lane, nearest)
        tl.debug_barrier()
        ended = 0
        if parts > 1:
            ended = tl.atomic_add(counts + 1 + batch, 1)
        if ended == parts - 1:
            smallest = tl.full([BLOCK_N], float("inf"), tl.float64)
            nearest = tl.full([BLOCK_N], NO_CODE, tl.int32)
            for other in range(parts):
                at = (batch * parts + other) % programs * BLOCK_N + lane
                of_part = tl.load(part_distance + at, cache_modifier=".cg")
                code_of_part = tl.load(part_index + at, cache_modifier=".cg")
                nearer = (code_of_part != NO_CODE) & ((of_part < smallest) | (nearest == NO_CODE))
                smallest = tl.where(nearer, of_part, smallest)
                nearest = tl.where(nearer, code_of_part, nearest)
            # Where no distance is finite, all of them are equal.
            nearest = tl.where(smallest < float("inf"), nearest, 0)
            tl.store(indices + head * positions + position, nearest.to(tl.int64), mask=inside)
