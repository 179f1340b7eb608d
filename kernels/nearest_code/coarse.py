"""Coarse pass: bfloat16 scores on the tensor cores, of which only the maximum over each block of codes is stored.

In the accumulators of the tensor cores a thread holds the columns 8i + 2j and 8i + 2j + 1 of a row, for one j of 4. The codes
of four blocks are therefore interleaved (by nearest_code_prepare_codes_kernel): block j of such a group has the columns
8i + 2j and 8i + 2j + 1 for all i, and its maximum needs no exchange between threads.
"""

import triton
import triton.language as tl

from .bound import double_error_bound, round_to_bfloat16
from .rows import load_rows, row_offsets


@triton.jit
def _block_maxima(score, BLOCK_CODES: tl.constexpr):
    """Maxima [N, groups, 4] of scores [N, K] over blocks of codes, or over the parts of larger blocks that lie in the tile."""
    n: tl.constexpr = score.shape[0]
    k: tl.constexpr = score.shape[1]
    part: tl.constexpr = min(BLOCK_CODES, k // 4)
    pairs = tl.max(tl.reshape(score, [n, k // (4 * part), part // 2, 4, 2]), axis=4)
    return tl.max(pairs, axis=2)


@triton.jit
def _store_maxima(maxima, tile, block_maxima, row, inside, rows, TILES: tl.constexpr):
    """Store the maxima [N, groups, 4] of blocks that end with this tile, where a group of four blocks spreads over TILES tiles."""
    groups: tl.constexpr = block_maxima.shape[1]
    group = tile // TILES * groups + tl.arange(0, groups)
    place = group.to(tl.int64)[None, :, None] * rows + row[:, None, None]
    last = tile % TILES == TILES - 1
    tl.store(maxima + place * 4 + tl.arange(0, 4)[None, None, :], block_maxima, mask=inside[:, None, None] & last)


@triton.jit
def _search_tiles(
    queries,  # [BLOCK_N, depth] values, or if STREAM pointers [BLOCK_N, 1] to rows of [depth]
    codes,  # [padded, depth]
    bias,  # [padded, BIAS_DEPTH]
    maxima,  # [blocks / 4, rows, 4]
    best,  # [rows]
    row,
    inside,
    rows,
    padded,
    tiles,
    depth,
    STREAM: tl.constexpr,
    BIAS_DEPTH: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the block maxima and the largest score of each row over the program's tiles of codes.

    BLOCK_D columns are multiplied at a time: all of them, unless queries stream.
    """
    column = tl.arange(0, BLOCK_D)
    if BIAS_DEPTH > 0:
        bias_column = tl.arange(0, BIAS_DEPTH)
        ones = tl.where((bias_column < 3)[None, :] & (row >= 0)[:, None], 1.0, 0.0).to(codes.dtype.element_ty)

    TILES: tl.constexpr = max(4 * BLOCK_CODES // BLOCK_K, 1)  # that a group of four blocks spreads over
    part: tl.constexpr = min(BLOCK_CODES, BLOCK_K // 4)
    block_maxima = tl.full([BLOCK_N, BLOCK_K // (4 * part), 4], float("-inf"), tl.float32)
    largest = block_maxima
    begin = tl.program_id(1) * tiles
    end = tl.minimum(begin + tiles, padded // BLOCK_K)
    for tile in range(begin, end):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
        code = codes + k[:, None] * depth
        if STREAM:
            score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for start in range(0, depth, BLOCK_D):
                a = tl.load(queries + (start + column)[None, :])
                b = tl.load(code + (start + column)[None, :])
                score = tl.dot(a, tl.trans(b), score)
        else:
            score = tl.dot(queries, tl.trans(tl.load(code + column[None, :])))
        if BIAS_DEPTH > 0:
            score = tl.dot(ones, tl.trans(tl.load(bias + k[:, None] * BIAS_DEPTH + bias_column[None, :])), score)
        found = _block_maxima(score, BLOCK_CODES)
        block_maxima = tl.where(tile % TILES == 0, found, tl.maximum(block_maxima, found))
        largest = tl.maximum(largest, found)
        _store_maxima(maxima, tile, block_maxima, row, inside, rows, TILES)
    tl.store(best + row, tl.max(tl.max(largest, axis=2), axis=1), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_outer", "first_inner", "count", "rows", "inner", "padded", "tiles", "blocks", "dim", "stride_head", "stride_outer",
    ]
)  # fmt: skip
def nearest_code_coarse_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D]
    codes,  # [heads, padded, DEPTH]
    bias,  # [heads, padded, BIAS_DEPTH]
    max_norms,  # [heads, 4]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows] largest score
    margin,  # [heads, rows] twice the error bound of the scores
    first_outer,
    first_inner,
    count,
    rows,
    inner,
    padded,
    tiles,
    blocks,
    dim,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS_DEPTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """D <= 128: round a tile of queries, compute its margins, and search the program's share of the codes."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    base = head * stride_head + row_offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    codes += head * padded * DEPTH
    bias += head * padded * BIAS_DEPTH
    maxima += head * blocks * rows
    best += (head * tl.num_programs(1) + tl.program_id(1)) * rows

    width = dim
    if SPLIT:
        width = 3 * dim
    column = tl.arange(0, DEPTH)
    valid = column < width
    d = column % dim
    z = load_rows(x, base, inside, d, valid, stride_d, PLANAR) - tl.load(center + head * dim + d, mask=valid, other=0)[None, :]
    z = tl.where(valid[None, :] & inside[:, None], z, 0.0)
    high = round_to_bfloat16(z)
    once = (column < dim)[None, :]  # split operands repeat each dimension; norms count the first copy
    residual = z - high
    low_square = tl.zeros([BLOCK_N], tl.float32)
    if SPLIT:
        low = round_to_bfloat16(residual)
        residual -= low
        low_square = tl.sum(tl.where(once, low * low, 0.0), axis=1)
        high = tl.where(((column >= dim) & (column < 2 * dim))[None, :], low, high)
    if tl.program_id(1) == 0:
        square = tl.sum(tl.where(once, z * z, 0.0), axis=1)
        error = tl.sum(tl.where(once, residual * residual, 0.0), axis=1)
        twice = double_error_bound(square, error, low_square, max_norms + head * 4, dim, DEPTH + BIAS_DEPTH, COSINE)
        tl.store(margin + head * rows + row, twice, mask=inside)
    if BIAS_DEPTH == 0:
        high = tl.where(((column >= width) & (column < width + 3))[None, :], 1.0, high)
    queries = high.to(codes.dtype.element_ty)
    _search_tiles(
        queries, codes, bias, maxima, best, row, inside, rows, padded, tiles, DEPTH,
        False, BIAS_DEPTH, BLOCK_CODES, BLOCK_N, BLOCK_K, DEPTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "rows", "padded", "tiles", "blocks"])
def nearest_code_stream_kernel(
    queries,  # [heads, rows, depth]
    codes,  # [heads, padded, depth]
    bias,  # [heads, padded, BIAS_DEPTH]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows] largest score
    count,
    rows,
    padded,
    tiles,
    blocks,
    depth,
    BIAS_DEPTH: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """D > 128: search the program's share of the codes, with queries rounded beforehand."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    maxima += head * blocks * rows
    best += (head * tl.num_programs(1) + tl.program_id(1)) * rows
    codes += head * padded * depth
    bias += head * padded * BIAS_DEPTH
    queries += (head * rows + tl.minimum(row, count - 1))[:, None] * depth
    _search_tiles(
        queries, codes, bias, maxima, best, row, inside, rows, padded, tiles, depth,
        True, BIAS_DEPTH, BLOCK_CODES, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
