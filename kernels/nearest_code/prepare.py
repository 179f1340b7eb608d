"""Kernels that round the operands of the coarse pass: the codes and, for D > 128, the queries."""

import triton
import triton.language as tl

from .bound import double_error_bound, round_to_bfloat16
from .rows import load_rows, row_offsets


@triton.jit(do_not_specialize=["num_codes", "stride_head"])
def nearest_code_center_kernel(
    codebook,  # [heads, K, D]
    center,  # [heads, D]
    max_norms,  # [heads, 4] set to zero
    num_codes,
    dim,
    stride_head,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Set the center to the mean of SAMPLE codes, spread over the codebook. It affects the speed of a search, not its result."""
    head = tl.program_id(0).to(tl.int64)
    center += head * dim
    tl.store(max_norms + head * 4 + tl.arange(0, 4), tl.zeros([4], tl.int32))
    codes = codebook + head * stride_head + tl.arange(0, SAMPLE).to(tl.int64) * num_codes // SAMPLE * stride_k
    square_of_mean = 0.0
    mean_of_square = 0.0
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mean = tl.zeros([BLOCK_D], tl.float32)
        if not COSINE:
            value = tl.load(codes[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=(d < dim)[None, :], other=0).to(tl.float32)
            usable = tl.abs(value) < 1e18
            value = tl.where(usable, value, 0.0)
            count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
            mean = tl.sum(value, axis=0) / count
            square_of_mean += tl.sum(mean * mean)
            mean_of_square += tl.sum(tl.sum(value * value, axis=0) / count)
        tl.store(center + d, mean, mask=d < dim)
    if square_of_mean * 16 <= mean_of_square:
        # Orders the zeros after the stores above, which other threads may have made to the same places.
        tl.debug_barrier()
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            tl.store(center + d, tl.zeros([BLOCK_D], tl.float32), mask=d < dim)


@triton.jit
def _atomic_max_nonnegative(target, value):
    """Atomic maximum of nonnegative floats: their bits, as integers, have the same order. The result is deterministic."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    if bits > tl.load(target):
        tl.atomic_max(target, bits)


@triton.jit(do_not_specialize=["num_codes", "padded", "stride_head"])
def nearest_code_prepare_codes_kernel(
    codebook,  # [heads, K, D]
    center,  # [heads, D]
    codes,  # [heads, padded, depth] rounded, in the order of the accumulators (see coarse.py)
    bias,  # [heads, padded, BIAS_DEPTH]
    max_norms,  # [heads, 4] largest |f|, |f - f~|, |l(f)| and |f|^2 / 2, as the bits of float32
    num_codes,
    padded,
    dim,
    depth,
    stride_head,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS_DEPTH: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round the codes (normalized if COSINE) and their biases to bfloat16, and find the largest norms that the bound needs."""
    head = tl.program_id(1).to(tl.int64)
    codebook += head * stride_head
    center += head * dim
    codes += head * padded * depth
    bias += head * padded * BIAS_DEPTH
    max_norms += head * 4
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < num_codes

    square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = inside[:, None] & (d < dim)[None, :]
        f = tl.load(codebook + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        f = tl.where(keep, f - tl.load(center + d, mask=d < dim, other=0)[None, :], 0.0)
        square += tl.sum(f * f, axis=1)
    finite = inside & (square < float("inf"))
    factor = tl.full([BLOCK_K], 1.0, tl.float64)
    if COSINE:
        factor = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    length = tl.where(finite, tl.sqrt(square) * factor, 0.0)
    half_square = length * length / 2
    if COSINE:
        half_square = tl.zeros([BLOCK_K], tl.float64)
    # A longer code makes the bound infinite, unless all queries are very short: then it is not the nearest.
    possible = finite & (half_square < 1e38)
    bias_float32 = tl.where(possible, -half_square, 0.0).to(tl.float32)
    bias_high = round_to_bfloat16(bias_float32)
    bias_middle = round_to_bfloat16(bias_float32 - bias_high)
    bias_low = round_to_bfloat16(bias_float32 - bias_high - bias_middle)
    bias_high = tl.where(possible, bias_high, float("-inf"))

    # In its group of four blocks, code u of block j goes to place 8 (u / 2) + 2 j + u % 2.
    within = k % (4 * BLOCK_CODES)
    u = within % BLOCK_CODES
    place = k - within + u // 2 * 8 + within // BLOCK_CODES * 2 + u % 2
    stored = k < padded

    width = dim
    if SPLIT:
        width = 3 * dim
    error = tl.zeros([BLOCK_K], tl.float64)
    low_square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, depth, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        valid = column < width
        d = column % dim
        keep = finite[:, None] & valid[None, :]
        f = tl.load(codebook + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        f -= tl.load(center + d, mask=valid, other=0)[None, :]
        f = tl.where(keep, f * factor[:, None], 0.0)
        value = f.to(tl.float32)
        high = round_to_bfloat16(value)
        residual = f - high
        if SPLIT:
            low = round_to_bfloat16(value - high)
            # The columns repeat each dimension; norms count the first copy.
            low_once = tl.where((column < dim)[None, :], low, 0.0).to(tl.float64)
            low_square += tl.sum(low_once * low_once, axis=1)
            residual -= low
            high = tl.where((column >= 2 * dim)[None, :], low, high)
        residual = tl.where((column < dim)[None, :], residual, 0.0)
        error += tl.sum(residual * residual, axis=1)
        if BIAS_DEPTH == 0:
            high = tl.where((column == width)[None, :], bias_high[:, None], high)
            high = tl.where((column == width + 1)[None, :], bias_middle[:, None], high)
            high = tl.where((column == width + 2)[None, :], bias_low[:, None], high)
        high = high.to(codes.dtype.element_ty)
        tl.store(codes + place[:, None] * depth + column[None, :], high, mask=stored[:, None] & (column < depth)[None, :])
    if BIAS_DEPTH > 0:
        column = tl.arange(0, BIAS_DEPTH)
        high = tl.where((column == 0)[None, :], bias_high[:, None], 0.0)
        high = tl.where((column == 1)[None, :], bias_middle[:, None], high)
        high = tl.where((column == 2)[None, :], bias_low[:, None], high)
        tl.store(bias + place[:, None] * BIAS_DEPTH + column[None, :], high.to(bias.dtype.element_ty), mask=stored[:, None])

    _atomic_max_nonnegative(max_norms, tl.max(length))
    _atomic_max_nonnegative(max_norms + 1, tl.sqrt(tl.max(error)))
    _atomic_max_nonnegative(max_norms + 2, tl.sqrt(tl.max(low_square)))
    _atomic_max_nonnegative(max_norms + 3, tl.max(-bias_float32))


@triton.jit(do_not_specialize=["first_outer", "first_inner", "count", "rows", "inner", "dim", "stride_head", "stride_outer"])
def nearest_code_prepare_queries_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D]
    max_norms,  # [heads, 4]
    queries,  # [heads, rows, depth] rounded
    margin,  # [heads, rows] twice the error bound of the scores
    first_outer,
    first_inner,
    count,
    rows,
    inner,
    dim,
    depth,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round the queries to bfloat16, with ones in the columns of the bias, and compute their margins."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    base = head * stride_head + row_offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    target = queries + (head * rows + row)[:, None] * depth
    square = tl.zeros([BLOCK_N], tl.float32)
    error = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        valid = d < dim
        z = load_rows(x, base, inside, d, valid, stride_d, PLANAR) - tl.load(center + head * dim + d, mask=valid, other=0)[None, :]
        z = tl.where(valid[None, :] & inside[:, None], z, 0.0)
        high = round_to_bfloat16(z)
        square += tl.sum(z * z, axis=1)
        error += tl.sum((z - high) * (z - high), axis=1)
        if depth >= dim + 3:
            high = tl.where(((d >= dim) & (d < dim + 3))[None, :], 1.0, high)
        tl.store(target + d[None, :], high.to(queries.dtype.element_ty), mask=inside[:, None])
    twice = double_error_bound(square, error, tl.zeros([BLOCK_N], tl.float32), max_norms + head * 4, dim, depth + 16, COSINE)
    tl.store(margin + head * rows + row, twice, mask=inside)
