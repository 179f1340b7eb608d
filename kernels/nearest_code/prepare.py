"""Rounds the codes to float16 and tabulates the norms that the bound needs, for each tile of codes."""

import triton
import triton.language as tl

from .bound import LENGTH, MAX_CODE_LENGTH, OF_TILE, RESIDUAL, SCALE, TILE_COLUMNS, scale_for_float16


@triton.jit
def _sampled_mean(codes, d, dim, stride_d):
    """Mean over sampled codes of the components d, and of their squares."""
    value = tl.load(codes[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=(d < dim)[None, :], other=0).to(tl.float32)
    usable = tl.abs(value) < 1e18
    value = tl.where(usable, value, 0.0)
    count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
    return tl.sum(value, axis=0) / count, tl.sum(value * value, axis=0) / count


@triton.jit(do_not_specialize=["num_codes", "tiles", "stride_head"])
def nearest_code_prepare_kernel(
    codebook,  # [heads, K, D]
    center,  # [heads, D + 1], the last of which is the limit of the lengths of the codes that are scored
    codes,  # [heads, tiles * BLOCK_K, depth] rounded
    bias,  # [heads, tiles * BLOCK_K] -|f|^2 / 2, and -inf for what is never the nearest
    table,  # [heads, tiles, TILE_COLUMNS]
    num_codes,
    tiles,
    dim,
    depth,
    stride_head,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    SPLIT: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of codes.

    Each program computes the center, the mean of SAMPLE codes spread over the codebook, or zero if that is small beside their
    lengths, and the limit, four times the length that three quarters of these codes have at most. Codes beyond the limit are not
    scored, so that they do not enlarge the bound for the others; scan.py tells which rows they may be nearest to. Both affect the
    speed of a search, not its result.
    """
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    codebook += head * stride_head
    center += head * (dim + 1)
    codes += head * tiles * BLOCK_K * depth
    bias += head * tiles * BLOCK_K
    table += (head * tiles + tile) * TILE_COLUMNS
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < num_codes
    sample = codebook + tl.arange(0, SAMPLE).to(tl.int64) * num_codes // SAMPLE * stride_k

    keep_center = 0.0
    if not COSINE:
        square_of_mean = 0.0
        mean_of_square = 0.0
        for start in range(0, dim, BLOCK_D):
            mean, mean_square = _sampled_mean(sample, start + tl.arange(0, BLOCK_D), dim, stride_d)
            square_of_mean += tl.sum(mean * mean)
            mean_of_square += tl.sum(mean_square)
        keep_center = tl.where(square_of_mean * 16 > mean_of_square, 1.0, 0.0)

    limit = MAX_CODE_LENGTH
    if not COSINE:
        sample_square = tl.zeros([SAMPLE], tl.float64)
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mean = _sampled_mean(sample, d, dim, stride_d)[0] * keep_center
            value = tl.load(sample[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=(d < dim)[None, :], other=0).to(tl.float64)
            value = tl.where((d < dim)[None, :], value - mean[None, :].to(tl.float64), 0.0)
            sample_square += tl.sum(value * value, axis=1)
        sample_length = tl.where(sample_square < 1e38, tl.sqrt(sample_square), 1e19).to(tl.float32)
        shorter = tl.sum((sample_length[None, :] < sample_length[:, None]).to(tl.int32), axis=1)
        usual = tl.max(tl.where(shorter < SAMPLE * 3 // 4, sample_length, 0.0))
        limit = tl.where(usual > 0, tl.minimum(4 * usual, MAX_CODE_LENGTH), MAX_CODE_LENGTH)
    if tile == 0:
        tl.store(center + dim, limit)

    square = tl.zeros([BLOCK_K], tl.float64)
    largest = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mean = tl.zeros([BLOCK_D], tl.float32)
        if not COSINE:
            mean = _sampled_mean(sample, d, dim, stride_d)[0] * keep_center
        if tile == 0:
            tl.store(center + d, mean, mask=d < dim)
        keep = inside[:, None] & (d < dim)[None, :]
        f = tl.load(codebook + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        f = tl.where(keep, f - mean[None, :].to(tl.float64), 0.0)
        square += tl.sum(f * f, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(f), axis=1))
    finite = inside & (square < float("inf"))
    factor = tl.full([BLOCK_K], 1.0, tl.float64)
    if COSINE:
        factor = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    length = tl.where(finite, tl.sqrt(square) * factor, 0.0)
    half_square = length * length / 2
    if COSINE:
        half_square = tl.zeros([BLOCK_K], tl.float64)
    possible = finite & (length < limit)
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
            mean = tl.where(valid, _sampled_mean(sample, d, dim, stride_d)[0] * keep_center, 0.0)
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
