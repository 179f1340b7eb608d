# SPDX-License-Identifier: Apache-2.0
"""Rounds the codes to float16, tabulates the norms that the bound needs for each tile of codes, and finds repeated codes."""

import torch
import triton
import triton.language as tl

from .bound import (
    FIRST_FINITE,
    LENGTH,
    MAX_CODE_LENGTH,
    NO_CODE,
    OF_TILE,
    RESIDUAL,
    SCALE,
    SHORTEST,
    TILE_COLUMNS,
    scale_for_float16,
)
from .plan import Buffer, Plan
from .shape import Shape


def reserve_prepared(plan: Plan, shape: Shape, heads: int, num_codes: int) -> tuple[Buffer, dict[str, int]]:
    """Add the buffers of the kernel below to a plan. Returns that of the rounded codes, and the arguments that go with them."""
    num_slots = triton.next_power_of_2(2 * num_codes)
    plan.buffer("center", torch.float32, heads, shape.dim + 1)
    plan.buffer("sampled", torch.float32, heads, shape.dim)
    plan.buffer("bias", torch.float32, heads, shape.tiles * shape.block_k)
    plan.buffer("norms", torch.float32, heads, shape.tiles * shape.block_k)
    plan.buffer("table", torch.float32, heads, shape.tiles, TILE_COLUMNS.value)
    plan.buffer("slots", torch.int64, heads, num_slots)
    codes = plan.buffer("codes", torch.float16, heads, shape.tiles * shape.block_k, shape.depth)
    return codes, {"num_codes": num_codes, "num_slots": num_slots, "tiles": shape.tiles, "dim": shape.dim, "depth": shape.depth}


@triton.jit
def _hash(value, d):
    """A hash of float32 components d of vectors. The sum over all components is that of the vectors."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)  # zeros of both signs are equal
    bits = (bits ^ (d.to(tl.uint32) * 0x9E3779B9)[None, :]) * 0x85EBCA6B
    bits = (bits ^ (bits >> 15)) * 0xC2B2AE35
    return bits ^ (bits >> 13)


@triton.jit
def _drop_repeated(
    codebook, bias, norms, slots, hashed, tag, k, is_code, num_codes, num_slots, dim, stride_k, stride_d, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Mark each code that equals one of a lower index as never the nearest. A few may be missed, which costs time only.

    A slot of the hash table names the lowest code seen so far with the hash that leads there. Nothing initializes the table: a slot
    that holds anything else, from an earlier call or another code, is overwritten. A program stores what describes its codes
    before it names them, so that another program that finds one of them to be repeated may mark it.
    """
    slot = slots + (hashed & (num_slots - 1).to(tl.uint32)).to(tl.int64)
    high = tag.to(tl.int64) << 32
    entry = high | k
    seen = tl.load(slot)
    active = is_code.to(tl.int32)
    tl.debug_barrier()
    while tl.max(active) > 0:
        other = seen & 0x7FFFFFFF
        equal = (active > 0) & ((seen ^ high) >> 32 == 0) & (other < num_codes) & (other != k)
        if tl.max(equal.to(tl.int32)) > 0:
            different = tl.zeros(equal.shape, tl.int32)
            for start in range(0, dim, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                column = d.to(tl.int64)[None, :] * stride_d
                keep = equal[:, None] & (d < dim)[None, :]
                a = tl.load(codebook + k[:, None] * stride_k + column, mask=keep, other=0)
                b = tl.load(codebook + other[:, None] * stride_k + column, mask=keep, other=0)
                different += tl.sum((a != b).to(tl.int32), axis=1)
            equal = equal & (different == 0)
        repeated = equal & (other < k)
        tl.store(bias + k, float("-inf"), mask=repeated)
        tl.store(norms + k, float("inf"), mask=repeated)
        replace = (active > 0) & (repeated == 0) & (seen != entry)
        found = tl.atomic_cas(slot, tl.where(replace, seen, entry), entry)
        replaced = replace & (found == seen)
        tl.store(bias + other, float("-inf"), mask=replaced & equal)
        tl.store(norms + other, float("inf"), mask=replaced & equal)
        active = (replace & (replaced == 0)).to(tl.int32)
        seen = tl.where(active > 0, found, seen)


@triton.jit(do_not_specialize=["num_codes", "tiles", "num_slots", "stride_head"])
def nearest_code_prepare_kernel(
    codebook,  # [heads, K, D]
    center,  # [heads, D + 1], the last of which is the limit of the lengths of the codes that are scored
    sampled,  # [heads, D] mean of the sampled codes
    codes,  # [heads, tiles * BLOCK_K, depth] rounded
    bias,  # [heads, tiles * BLOCK_K] -|f|^2 / 2, and -inf for what is not scored
    norms,  # [heads, tiles * BLOCK_K] |f|^2 / 2, or for cosine 1 / |code|; inf for what is never the nearest
    table,  # [heads, tiles, TILE_COLUMNS]
    slots,  # [heads, num_slots] a hash table, not initialized
    num_codes,
    tiles,
    num_slots,  # a power of two
    dim,
    depth,
    stride_head,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    SPLIT: tl.constexpr,
    DROP_REPEATED: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of codes.

    Each program computes the center, the mean of SAMPLE codes spread over the codebook, or zero if that is small beside their
    lengths, and the limit, four times the length that all but a sixteenth of these codes have at most. Codes beyond the limit are not
    scored, so that they do not enlarge the bound for the others; scan.py tells which rows they may be nearest to. Both affect the
    speed of a search, not its result.
    """
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    codebook += head * stride_head
    center += head * (dim + 1)
    sampled += head * dim
    codes += head * tiles * BLOCK_K * depth
    bias += head * tiles * BLOCK_K
    norms += head * tiles * BLOCK_K
    table += (head * tiles + tile) * TILE_COLUMNS
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < num_codes

    keep_center = 0.0
    limit = MAX_CODE_LENGTH
    if not COSINE:
        sample = codebook + tl.arange(0, SAMPLE).to(tl.int64) * num_codes // SAMPLE * stride_k
        sample_square = tl.zeros([SAMPLE], tl.float64)
        square_of_mean = tl.sum(sample_square)
        mean_of_square = square_of_mean
        product = tl.zeros([SAMPLE], tl.float64)
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            value = tl.load(sample[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=(d < dim)[None, :], other=0).to(tl.float32)
            usable = tl.abs(value) < 1e18
            count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
            mean = tl.sum(tl.where(usable, value, 0.0), axis=0) / count
            # Every program stores the same and reads what it stored.
            tl.store(sampled + d, mean, mask=d < dim)
            value = tl.where(usable, value, 1e19).to(tl.float64)
            mean = mean.to(tl.float64)
            square_of_mean += tl.sum(mean * mean)
            mean_of_square += tl.sum(tl.sum(tl.where(usable, value * value, 0.0), axis=0) / count.to(tl.float64))
            sample_square += tl.sum(value * value, axis=1)
            product += tl.sum(value * mean[None, :], axis=1)
        tl.debug_barrier()
        keep_center = tl.where(square_of_mean * 16 > mean_of_square, 1.0, 0.0)
        sample_square += keep_center * (square_of_mean - 2 * product)
        sample_length = tl.where(sample_square < 1e38, tl.sqrt(tl.maximum(sample_square, 0.0)), 1e19).to(tl.float32)
        shorter = tl.sum((sample_length[None, :] < sample_length[:, None]).to(tl.int32), axis=1)
        usual = tl.max(tl.where(shorter < SAMPLE * 15 // 16, sample_length, 0.0))
        limit = tl.where(usual > 0, tl.minimum(4 * usual, MAX_CODE_LENGTH), MAX_CODE_LENGTH)
    if tile == 0:
        tl.store(center + dim, limit)

    square = tl.zeros([BLOCK_K], tl.float64)
    largest = tl.zeros([BLOCK_K], tl.float64)
    hashed = tl.zeros([BLOCK_K], tl.uint32)
    tag = tl.zeros([BLOCK_K], tl.uint32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mean = tl.zeros([BLOCK_D], tl.float32)
        if not COSINE:
            mean = tl.load(sampled + d, mask=d < dim, other=0) * keep_center
        if tile == 0:
            tl.store(center + d, mean, mask=d < dim)
        keep = inside[:, None] & (d < dim)[None, :]
        code = tl.load(codebook + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float32)
        if DROP_REPEATED:
            of_code = tl.where((d < dim)[None, :], _hash(code, d), 0)
            hashed += tl.sum(of_code, axis=1)
            tag += tl.sum((of_code ^ (of_code >> 16)) * 0x27D4EB2F, axis=1)
        f = tl.where(keep, code.to(tl.float64) - mean[None, :].to(tl.float64), 0.0)
        square += tl.sum(f * f, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(f), axis=1))
    finite = inside & (square < float("inf"))
    length = tl.where(finite, tl.sqrt(square), 0.0)
    factor = tl.full([BLOCK_K], 1.0, tl.float64)
    if COSINE:
        factor = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        norm = tl.where(square > 0, factor, 1.0)
        length = length * factor
        half_square = tl.zeros([BLOCK_K], tl.float64)
    else:
        half_square = tl.where(finite, square * 0.5, 0.0)
        norm = half_square
    tl.store(norms + k, tl.where(finite, tl.minimum(norm, 3e38), float("inf")).to(tl.float32))
    possible = finite & (length < limit)
    unscored = finite & (possible == 0)
    tl.store(table + SHORTEST, tl.min(tl.where(unscored, tl.minimum(length * (1 - 1e-6), 3e38), float("inf"))).to(tl.float32))
    tl.store(table + FIRST_FINITE, tl.min(tl.where(finite, k, NO_CODE)).to(tl.int32).to(tl.float32, bitcast=True))
    length = tl.where(possible, length, 0.0)
    half_square = tl.where(possible, half_square, 0.0)
    scale, back = scale_for_float16(tl.max(tl.where(possible, largest * factor, 0.0)).to(tl.float32))
    factor *= scale.to(tl.float64)

    width = dim
    if SPLIT:
        width = 3 * dim
    error = tl.zeros([BLOCK_K], tl.float64)
    low_square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, depth, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        valid = column < width
        d = column
        if SPLIT:
            d = column % dim
        mean = tl.zeros([BLOCK_D], tl.float32)
        if not COSINE:
            mean = tl.load(sampled + d, mask=valid, other=0) * keep_center
        keep = possible[:, None] & valid[None, :]
        f = tl.load(codebook + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        f = tl.where(keep, (f - mean[None, :].to(tl.float64)) * factor[:, None], 0.0)
        high = f.to(tl.float32).to(tl.float16)
        residual = f - high.to(tl.float64)
        if SPLIT:
            low = residual.to(tl.float32).to(tl.float16)
            # The columns repeat each dimension; norms count the first copy.
            low_once = tl.where((column < dim)[None, :], low.to(tl.float64), 0.0)
            low_square += tl.sum(low_once * low_once, axis=1)
            residual -= low.to(tl.float64)
            high = tl.where((column >= 2 * dim)[None, :], low, high)
            residual = tl.where((column < dim)[None, :], residual, 0.0)
        error += tl.sum(residual * residual, axis=1)
        tl.store(codes + k[:, None] * depth + column[None, :], high, mask=(column < depth)[None, :] & (k >= 0)[:, None])
    tl.store(bias + k, tl.where(possible, -half_square, float("-inf")).to(tl.float32))

    # Norms are rounded up.
    up = 1.0 + 1e-6
    most = tl.max(length)
    float64_rounding = (dim + 4) * 2.220446049250313e-16
    of_tile = 4.76837158203125e-07 * tl.max(half_square)
    if not COSINE:
        of_tile += float64_rounding * most * most
    most = tl.maximum(most, 2048 * tl.sqrt(tl.max(low_square)) * back.to(tl.float64))
    tl.store(table + LENGTH, (most * up).to(tl.float32))
    tl.store(table + RESIDUAL, (tl.sqrt(tl.max(error)) * back.to(tl.float64) * up + 1e-36).to(tl.float32))
    tl.store(table + OF_TILE, (1.01 * of_tile).to(tl.float32))
    tl.store(table + SCALE, back)

    if DROP_REPEATED:
        slots += head * num_slots
        _drop_repeated(
            codebook, bias, norms, slots, hashed, tag, k, finite, num_codes, num_slots, dim, stride_k, stride_d, BLOCK_D
        )  # fmt: skip
