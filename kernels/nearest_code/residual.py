# SPDX-License-Identifier: Apache-2.0
"""All quantizers of a residual quantizer in one launch: a program takes a tile of rows through one after the other.

For each quantizer the residual is rounded and the codes pass as in scan.py. Rows that the certificate leaves with a few codes, and
those whose codes a second pass collects, are decided in float64; rows with too many codes, or without a bound, are compared with
all codes as in search.py. What a program keeps between these steps lies in memory of its own, small enough for
the L2 cache, and so do the values that are the same for all codes of a pass: its loop needs the registers. For the same reason
addresses are computed from a zero that the compiler does not know, so that it does not compute them long before their use.
"""

import triton
import triton.language as tl

from .bound import TILE_COLUMNS, bound_at_residual, bound_at_zero
from .decide import SLOTS, collect_codes, decide_candidates, nearest_of_all
from .rows import load_rows, round_rows, row_offsets
from .scan import NONE, first_finite_code, nearest_of_pass, pass_over_codes, shortest_unscored, unscored_bound
from .settle import box_corners

# Arrays [BLOCK_N] of a program.
CHOSEN, FLAT = tl.constexpr(0), tl.constexpr(1)
BACK, AT_LENGTH, ROW_LENGTH, THRESHOLD = (tl.constexpr(i) for i in range(4))
INTEGERS, FLOATS = tl.constexpr(1 + 2 * SLOTS.value), tl.constexpr(4)


@triton.jit
def memory_of_program(residual, queries, floats, integers, distances, zero, dim, depth, BLOCK_N: tl.constexpr):
    """Zero, and the arrays of this program, whose addresses are computed here and not before."""
    nothing = tl.load(zero, volatile=True)
    first = (tl.program_id(0) + nothing).to(tl.int64) * BLOCK_N
    return (
        nothing,
        residual + first * dim,
        queries + first * depth,
        floats + first * FLOATS,
        integers + first * INTEGERS,
        distances + first * SLOTS,
    )


@triton.jit
def search_residual(
    residuals,  # [programs, BLOCK_N, D]
    all_queries,  # [programs, BLOCK_N, depth]
    all_floats,  # [programs, FLOATS, BLOCK_N]
    all_integers,  # [programs, INTEGERS, BLOCK_N], of which CHOSEN gets the index of the nearest code
    all_distances,  # [programs, BLOCK_N SLOTS]
    zero,
    kept,  # [BLOCK_N] the rows that are searched
    codebook,  # [K, D]
    center,  # [D + 1]
    codes,
    bias,
    norms,  # [tiles * BLOCK_K]
    table,
    first_tile,
    tiles,
    num_codes,
    dim,
    depth,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The exact search of one quantizer for the rows of a program."""
    lane = tl.arange(0, BLOCK_N)
    nothing, residual, queries, floats, _, _ = memory_of_program(
        residuals, all_queries, all_floats, all_integers, all_distances, zero, dim, depth, BLOCK_N
    )
    row = lane + nothing
    back, bound = round_rows(residual, center, queries, row * dim, kept, dim, depth, 1, COSINE, False, SPLIT, BLOCK_D)
    at_length, _, _, length = bound
    tl.store(floats + BACK * BLOCK_N + row, back)
    tl.store(floats + AT_LENGTH * BLOCK_N + row, at_length)
    tl.store(floats + ROW_LENGTH * BLOCK_N + row, length)
    tl.debug_barrier()
    at_residual = bound_at_residual(tl.load(floats + ROW_LENGTH * BLOCK_N + row), dim)
    passed = pass_over_codes(
        tl.load((queries + row * depth)[:, None] + tl.arange(0, DEPTH)[None, :]), tl.load(floats + BACK * BLOCK_N + row),
        tl.load(floats + AT_LENGTH * BLOCK_N + row), at_residual, codes, bias, table, first_tile,
        0, tiles, depth, False, TMA, DEPTH, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    nothing, residual, queries, floats, integers, distances = memory_of_program(
        residuals, all_queries, all_floats, all_integers, all_distances, zero, dim, depth, BLOCK_N
    )
    row = lane + nothing
    chosen = integers + CHOSEN * BLOCK_N
    flat = integers + FLAT * BLOCK_N
    length = tl.load(floats + ROW_LENGTH * BLOCK_N + row)
    threshold = tl.max(passed[5], axis=1) - 2 * bound_at_zero(length, dim, COSINE)
    unscored = unscored_bound(length, shortest_unscored(table + first_tile * TILE_COLUMNS, tiles), COSINE)
    usable = (threshold > float("-inf")) & (unscored < threshold)
    first, last = nearest_of_pass(passed, threshold, usable, BLOCK_K)
    # All distances are infinite, or all to finite codes are zero.
    by_rule = length != length
    if COSINE:
        by_rule = by_rule | (length == 0)
        first = tl.where(length == 0, first_finite_code(table + first_tile * TILE_COLUMNS, tiles), tl.where(by_rule, 0, first))
    else:
        first = tl.where(by_rule, 0, first)
    last = tl.where(by_rule, NONE, last)
    tl.store(chosen + row, first)
    few = kept & (first >= 0) & (last != NONE)
    found, exists = box_corners(first[:, None], last[:, None], tl.arange(0, SLOTS)[None, :], BLOCK_K)
    found = tl.where(few[:, None] & exists & (found < num_codes), found, -1)
    every = kept & (first < 0)
    collected = every & usable
    if tl.max(collected.to(tl.int32)) > 0:
        tl.store(floats + THRESHOLD * BLOCK_N + row, tl.where(collected, threshold, float("inf")))
        tl.debug_barrier()
        at_residual = bound_at_residual(tl.load(floats + ROW_LENGTH * BLOCK_N + row), dim)
        reaching, number = collect_codes(
            tl.load((queries + row * depth)[:, None] + tl.arange(0, DEPTH)[None, :]), tl.load(floats + BACK * BLOCK_N + row),
            tl.load(floats + AT_LENGTH * BLOCK_N + row), at_residual, tl.load(floats + THRESHOLD * BLOCK_N + row), codes,
            bias + nothing, table + nothing, first_tile, tiles, depth, nothing, TMA, DEPTH, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        every = every & ((collected == 0) | (number > SLOTS))
        found = tl.where((collected & (number <= SLOTS))[:, None], reaching, found)
    decide_candidates(
        found, chosen, flat, distances, residual, codebook, dim, stride_k, stride_code_d, COSINE, BLOCK_N, CANDIDATES,
        BLOCK_D if BLOCK_D < 32 else 32,
    )  # fmt: skip

    if tl.max(every.to(tl.int32)) > 0:
        tl.debug_barrier()
        tl.store(flat + tl.cumsum(every.to(tl.int32), axis=0) - 1, lane, mask=every)
        tl.debug_barrier()
        number_of_rows = tl.sum(every.to(tl.int32))
        for start in range(0, number_of_rows, ROWS):
            place = start + tl.arange(0, ROWS)
            present = place < number_of_rows
            current = tl.load(flat + place, mask=present, other=0)
            length_of_row = tl.load(floats + ROW_LENGTH * BLOCK_N + current)
            nearest = nearest_of_all(
                residual, current, present, length_of_row, center, codebook, norms, num_codes, dim, stride_k, stride_code_d,
                COSINE, CODES, DIMS,
            )  # fmt: skip
            tl.store(chosen + current, nearest, mask=present)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["positions", "inner", "quantizers", "tiles", "num_codes", "prepared_step"])
def residual_quantize_kernel(
    x,  # [outer, D, inner]
    codebook,  # [Q, K, D] float32
    center,  # [Q or 1, D + 1]
    codes,  # [(Q or 1) tiles * BLOCK_K, depth], a tensor descriptor if TMA
    bias,  # [Q or 1, tiles * BLOCK_K]
    norms,  # [Q or 1, tiles * BLOCK_K]
    table,  # [Q or 1, tiles, TILE_COLUMNS]
    mask,  # [outer, inner]
    limit,  # [] the number of quantizers that run
    residuals,  # [programs, BLOCK_N, D] float32
    queries,  # [programs, BLOCK_N, depth]
    floats,  # [programs, FLOATS, BLOCK_N] float32
    integers,  # [programs, INTEGERS, BLOCK_N] int32
    distances,  # [programs, BLOCK_N SLOTS] float64
    zero,  # [] int32, set by every program
    quantized,  # [outer, D, inner]
    indices,  # [outer, inner, Q]
    squares,  # [Q, tiles of rows] float64, of what a quantizer leaves
    valid,  # [tiles of rows] int32, rows that the mask keeps
    positions,
    inner,
    quantizers,
    tiles,
    num_codes,
    prepared_step,  # 1, or 0 if all quantizers share a codebook, which is then prepared once
    dim,
    depth,
    stride_outer,
    stride_d,
    stride_inner,
    stride_out_outer,
    stride_out_d,
    stride_out_inner,
    stride_codebook,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    PLANAR_OUT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DIMS: tl.constexpr,
):
    tl.store(zero, 0)
    tl.debug_barrier()
    lane = tl.arange(0, BLOCK_N)
    levels = quantizers
    if HAS_LIMIT:
        levels = tl.minimum(tl.maximum(tl.load(limit), 1), quantizers).to(tl.int32)

    for start_row in range(tl.program_id(0).to(tl.int64) * BLOCK_N, positions, tl.num_programs(0) * BLOCK_N):
        tile_of_rows = start_row // BLOCK_N
        inside = start_row + lane < positions
        kept = inside
        if HAS_MASK:
            kept &= tl.load(mask + start_row + lane, mask=inside, other=0) != 0
        tl.store(valid + tile_of_rows, tl.sum(kept.to(tl.int32)))
        nothing, residual, _, _, _, _ = memory_of_program(residuals, queries, floats, integers, distances, zero, dim, depth, BLOCK_N)
        row = lane + nothing
        base = row_offsets(start_row, row, inner, stride_outer, stride_inner)
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            value = load_rows(x, base, kept, d, d < dim, stride_d, PLANAR)
            tl.store(residual + row[:, None] * dim + d[None, :], value, mask=(d < dim)[None, :])
        tl.debug_barrier()

        of_quantizer = codebook
        for level in range(levels):
            search_residual(
                residuals, queries, floats, integers, distances, zero, kept, of_quantizer, center + level * prepared_step * (dim + 1),
                codes, bias, norms + level * prepared_step * tiles * BLOCK_K, table, level * prepared_step * tiles, tiles, num_codes,
                dim, depth, stride_k, stride_code_d,
                COSINE, SPLIT, TMA, DEPTH, BLOCK_N, BLOCK_K, BLOCK_D, CANDIDATES, ROWS, CODES, DIMS,
            )  # fmt: skip
            nothing, residual, _, _, own_integers, _ = memory_of_program(
                residuals, queries, floats, integers, distances, zero, dim, depth, BLOCK_N
            )
            row = lane + nothing
            index = tl.load(own_integers + CHOSEN * BLOCK_N + row)
            tl.store(indices + (start_row + row) * quantizers + level, tl.where(kept, index, -1).to(tl.int64), mask=inside)
            square = tl.zeros([BLOCK_N], tl.float32)
            of_code = of_quantizer + index.to(tl.int64) * stride_k
            for start in range(0, dim, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                keep = kept[:, None] & (d < dim)[None, :]
                place = residual + row[:, None] * dim + d[None, :]
                code = tl.load(of_code[:, None] + d.to(tl.int64)[None, :] * stride_code_d, mask=keep, other=0)
                value = tl.load(place, mask=keep, other=0) - code
                tl.store(place, value, mask=keep)
                square += tl.sum(value * value, axis=1)
            tl.store(squares + level * tl.cdiv(positions, BLOCK_N) + tile_of_rows, tl.sum(square.to(tl.float64)))
            of_quantizer += stride_codebook
            tl.debug_barrier()

        row = lane + tl.load(zero, volatile=True)
        of_indices = indices + (start_row + row) * quantizers
        for level in range(levels, quantizers):
            tl.store(of_indices + level, tl.full([BLOCK_N], -1, tl.int64), mask=inside)
        base = row_offsets(start_row, row, inner, stride_out_outer, stride_out_inner)
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            keep = kept[:, None] & (d < dim)[None, :]
            of_component = codebook + d.to(tl.int64)[None, :] * stride_code_d
            first = tl.load(of_indices, mask=kept, other=0)
            total = tl.load(of_component + first[:, None] * stride_k, mask=keep, other=0)
            for level in range(1, levels):
                of_component += stride_codebook
                other = tl.load(of_indices + level, mask=kept, other=0)
                total += tl.load(of_component + other[:, None] * stride_k, mask=keep, other=0)
            result = total.to(quantized.dtype.element_ty)
            to = d.to(tl.int64) * stride_out_d
            if PLANAR_OUT:
                tl.store(quantized + base[None, :] + to[:, None], tl.trans(result), mask=inside[None, :] & (d < dim)[:, None])
            else:
                tl.store(quantized + base[:, None] + to[None, :], result, mask=inside[:, None] & (d < dim)[None, :])
        tl.debug_barrier()


@triton.jit(do_not_specialize=["tiles_of_rows", "quantizers", "dim"])
def residual_finish_kernel(
    squares,  # [Q, tiles of rows]
    valid,  # [tiles of rows]
    limit,  # []
    mse,  # [Q]
    num_valid,  # []
    tiles_of_rows,
    quantizers,
    dim,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean square that a quantizer leaves, 0 if it does not run, summed in an order that sizes alone decide."""
    level = tl.program_id(0)
    levels = quantizers
    if HAS_LIMIT:
        levels = tl.minimum(tl.maximum(tl.load(limit), 1), quantizers).to(tl.int32)
    square = tl.zeros([BLOCK], tl.float64)
    number = tl.zeros([BLOCK], tl.int64)
    for start in range(0, tiles_of_rows, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        inside = tile < tiles_of_rows
        number += tl.load(valid + tile, mask=inside, other=0)
        square += tl.load(squares + level.to(tl.int64) * tiles_of_rows + tile, mask=inside, other=0)
    count = tl.sum(number)
    elements = count.to(tl.float64) * dim
    mean = tl.where((elements > 0) & (level < levels), tl.sum(square) / tl.where(elements > 0, elements, 1.0), 0.0)
    tl.store(mse + level, mean.to(tl.float32))
    if level == 0:
        tl.store(num_valid, count)
