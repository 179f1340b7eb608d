# SPDX-License-Identifier: Apache-2.0
"""What a program that holds its rows does about those that the pass over the codes leaves undecided."""

import triton
import triton.language as tl

from .bound import NO_CODE
from .scan import tile_scores
from .search import candidates_in_float32, nearest_in_float64, nearest_in_order
from .settle import distances_in_order, distances_of_all

SLOTS = tl.constexpr(8)  # codes of a row that are compared in float64: those that a second pass collects, or the corners of a box


@triton.jit
def collect_codes(
    operand,  # these as of tile_scores, for queries that are held
    back,
    at_length,
    at_residual,
    threshold,  # [BLOCK_N], infinite for rows that need none
    codes,
    bias,
    table,
    first_tile,
    tiles,
    depth,
    nothing,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The codes [BLOCK_N, SLOTS] that can reach the threshold, -1 where there are fewer, and their number, up to SLOTS + 1."""
    slot = tl.arange(0, SLOTS)[None, :]
    column = tl.arange(0, BLOCK_K)[None, :] + nothing
    found = tl.full([BLOCK_N, SLOTS], -1, tl.int32)
    number = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(tiles):
        score, margin = tile_scores(
            operand, back, at_length, at_residual, codes, bias, table, first_tile + tile, depth, False, TMA, BLOCK_K, DEPTH
        )
        reached = tl.where(score + margin[:, None] >= threshold[:, None], column, BLOCK_K)
        next_column = tl.min(reached, axis=1)
        while tl.min(next_column) < BLOCK_K:
            has = (next_column < BLOCK_K)[:, None]
            found = tl.where((slot == number[:, None]) & has, tile * BLOCK_K + next_column[:, None], found)
            number += (next_column < BLOCK_K).to(tl.int32)
            # A row with more than SLOTS needs no more.
            reached = tl.where((reached > next_column[:, None]) & (number <= SLOTS)[:, None], reached, BLOCK_K)
            next_column = tl.min(reached, axis=1)
    return found, number


@triton.jit
def candidate_distances(
    flat,  # [2, BLOCK_N SLOTS] rows and codes of the candidates of all rows, one after the other
    distances,  # [BLOCK_N SLOTS] the result
    number,
    residual,
    codebook,
    dim,
    stride_k,
    stride_code_d,
    IN_ORDER: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Distances in float64: those of the reference if IN_ORDER, and otherwise sums in any order."""
    for start in range(0, number, CANDIDATES):
        place = start + tl.arange(0, CANDIDATES)
        inside = place < number
        query = residual + tl.load(flat + place, mask=inside, other=0) * dim
        code = codebook + tl.load(flat + BLOCK_N * SLOTS + place, mask=inside, other=0).to(tl.int64) * stride_k
        if IN_ORDER:
            distance = distances_in_order(query, code, inside, dim, 1, stride_code_d, COSINE)
        else:
            square = tl.zeros([CANDIDATES, BLOCK_D], tl.float64)
            for first in range(0, dim, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                keep = inside[:, None] & (d < dim)[None, :]
                a = tl.load(query[:, None] + d[None, :], mask=keep, other=0).to(tl.float64)
                b = tl.load(code[:, None] + d.to(tl.int64)[None, :] * stride_code_d, mask=keep, other=0).to(tl.float64)
                square += (a - b) * (a - b)
            distance = tl.sum(square, axis=1)
        tl.store(distances + place, distance, mask=inside)
    tl.debug_barrier()


@triton.jit
def decide_candidates(
    found,  # [BLOCK_N, SLOTS] codes, negative where there is none
    chosen,  # [BLOCK_N] the result
    flat,
    distances,
    residual,
    codebook,
    dim,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Choose the nearest of a few codes for the rows that have any, by the distances of the reference.

    Sums in any order tell it, unless two distances are so near that the order of the additions decides.
    """
    row = tl.arange(0, BLOCK_N)
    valid = found >= 0
    count = tl.sum(valid.to(tl.int32), axis=1)
    number = tl.sum(count)
    if number > 0:
        place = (tl.cumsum(count, axis=0) - count)[:, None] + tl.cumsum(valid.to(tl.int32), axis=1) - 1
        tl.debug_barrier()  # others may still be reading what lay here
        tl.store(flat + place, row[:, None] + tl.zeros([BLOCK_N, SLOTS], tl.int32), mask=valid)
        tl.store(flat + BLOCK_N * SLOTS + place, found, mask=valid)
        tl.debug_barrier()
        candidate_distances(
            flat, distances, number, residual, codebook, dim, stride_k, stride_code_d, COSINE, COSINE, BLOCK_N, CANDIDATES, BLOCK_D
        )
        distance = tl.load(distances + place, mask=valid, other=float("inf"))
        if not COSINE:
            # Both sums err by less than (D + 2) 2^-53 of a distance.
            near = tl.min(distance, axis=1) * (1.0 + (dim + 4) * 8.881784197001252e-16)
            if tl.max(tl.sum((valid & (distance <= near[:, None])).to(tl.int32), axis=1)) > 1:
                tl.debug_barrier()
                candidate_distances(
                    flat, distances, number, residual, codebook, dim, stride_k, stride_code_d, True, COSINE, BLOCK_N, CANDIDATES, BLOCK_D
                )
                distance = tl.load(distances + place, mask=valid, other=float("inf"))
        nearest = tl.min(tl.where(valid & (distance == tl.min(distance, axis=1)[:, None]), found, 0x7FFFFFFF), axis=1)
        tl.store(chosen + row, nearest, mask=count > 0)


@triton.jit
def nearest_of_all(
    residual,
    row,  # [ROWS] of the program
    present,
    length,  # [ROWS] at least |z|; inf if there is no bound
    center,
    codebook,
    norms,
    num_codes,
    dim,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    CODES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The nearest of all codes: in float32 with its bound, and in float64 among those that this leaves."""
    base = row.to(tl.int64) * dim
    query = residual + base
    which, complete = candidates_in_float32(
        residual, base, present, length, center, codebook, norms, 0, num_codes, dim, 1, stride_k, stride_code_d, COSINE, CODES, DIMS
    )  # fmt: skip
    is_code = which != NO_CODE
    of_candidate = codebook + tl.where(is_code, which, 0).to(tl.int64) * stride_k
    distance = distances_of_all(query[:, None], of_candidate, present[:, None], is_code, dim, 1, stride_code_d, COSINE)
    least, nearest = nearest_in_order(distance, which, is_code)
    left = present & (complete == 0)
    if tl.max(left.to(tl.int32)) > 0:
        least_of_all, nearest_of_left = nearest_in_float64(
            query, left, codebook, norms, 0, num_codes, dim, 1, stride_k, stride_code_d, COSINE, CODES
        )  # fmt: skip
        least = tl.where(left, least_of_all, least)
        nearest = tl.where(left, nearest_of_left, nearest)
    # Where no distance is finite, all of them are equal.
    return tl.where(least < float("inf"), nearest, 0)
