# SPDX-License-Identifier: Apache-2.0
"""Queries: where they lie in x [heads, outer, D, inner], and how they are rounded to float16."""

import triton
import triton.language as tl

from .bound import row_bound, scale_for_float16


@triton.jit
def row_offsets(first, row, inner, stride_outer, stride_inner):
    """Offsets of the vectors `row` positions after the position `first`, an int64 scalar."""
    first_outer = first // inner
    size = inner.to(tl.uint32)
    within = ((first % inner).to(tl.uint32) + row.to(tl.uint32)).to(tl.uint32)
    return (first_outer + (within // size).to(tl.int64)) * stride_outer + (within % size).to(tl.int64) * stride_inner


@triton.jit
def position_offsets(position, inner, stride_outer, stride_inner):
    """Offsets of the vectors at int64 positions."""
    return (position // inner) * stride_outer + (position % inner) * stride_inner


@triton.jit
def load_rows(x, base, inside, d, valid, stride_d, PLANAR: tl.constexpr):
    """Load x [rows, d] as float32. PLANAR: rows, not dimensions, are adjacent in memory, so threads run along the rows."""
    if PLANAR:
        value = tl.trans(tl.load(x + base[None, :] + d.to(tl.int64)[:, None] * stride_d, mask=inside[None, :] & valid[:, None], other=0))
    else:
        value = tl.load(x + base[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=inside[:, None] & valid[None, :], other=0)
    return value.to(tl.float32)


@triton.jit
def _centered(x, center, base, inside, d, valid, stride_d, PLANAR: tl.constexpr, SPLIT: tl.constexpr):
    """What is not valid is zero; rows that are not inside are finite."""
    z = load_rows(x, base, inside, d, valid, stride_d, PLANAR) - tl.load(center + d, mask=valid, other=0)[None, :]
    if SPLIT:  # no other values, but fewer instructions follow
        z = tl.where(valid[None, :] & inside[:, None], z, 0.0)
    return z


@triton.jit
def _store_rounded(z, target, column, dim, depth, SPLIT: tl.constexpr):
    """Store scaled columns of z, rounded to float16. Returns the squares of these, of their residuals, and of low parts."""
    high = z.to(tl.float16)
    residual = z - high.to(tl.float32)
    low_once = tl.zeros(z.shape, tl.float32)
    if SPLIT:
        once = (column < dim)[None, :]  # split operands repeat each dimension; norms count the first copy
        low = residual.to(tl.float16)
        residual = tl.where(once, residual - low.to(tl.float32), 0.0)
        low_once = tl.where(once, low.to(tl.float32), 0.0)
        high = tl.where(((column >= dim) & (column < 2 * dim))[None, :], low, high)
        z = tl.where(once, z, 0.0)
    tl.store(target + tl.arange(0, z.shape[0])[:, None] * depth + column[None, :], high)
    return tl.sum(z * z, axis=1), tl.sum(residual * residual, axis=1), tl.sum(low_once * low_once, axis=1)


@triton.jit
def round_rows(
    x,
    center,  # [D]
    target,  # [rows, depth] for this program alone
    base,  # offsets of the rows
    inside,
    dim,
    depth,
    stride_d,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONCE: tl.constexpr = False,
):
    """Read rows, round them to float16 and store them in `target`. Returns the factor that undoes their scale, and the bound.

    They go through memory, a few hundred kilobytes that stay in the L2 cache, so that the tensor cores read them from shared memory:
    values that come from registers would be held in registers. BLOCK_D columns are in registers at a time, all of them if SPLIT.
    ONCE: these are all, and are read once instead of twice.
    """
    column = tl.arange(0, BLOCK_D)
    if ONCE:
        tl.static_assert(not SPLIT)
        z = _centered(x, center, base, inside, column, column < dim, stride_d, PLANAR, SPLIT)
        scale, back = scale_for_float16(tl.max(tl.abs(z), axis=1))
        tl.debug_barrier()  # the program may still be reading the rows before these
        square, error, low_square = _store_rounded(z * scale[:, None], target, column, dim, depth, SPLIT)
    else:
        largest = tl.zeros([inside.shape[0]], tl.float32)
        for start in range(0, dim, BLOCK_D):
            z = _centered(x, center, base, inside, start + column, start + column < dim, stride_d, PLANAR, SPLIT)
            largest = tl.maximum(largest, tl.max(tl.abs(z), axis=1))
        scale, back = scale_for_float16(largest)
        square = tl.zeros([inside.shape[0]], tl.float32)
        error = square
        low_square = square
        tl.debug_barrier()  # as above
        for start in range(0, depth, BLOCK_D):
            d = start + column
            valid = d < dim
            if SPLIT:
                valid = d < 3 * dim
                d = d % dim
            z = _centered(x, center, base, inside, d, valid, stride_d, PLANAR, SPLIT) * scale[:, None]
            of_block = _store_rounded(z, target, start + column, dim, depth, SPLIT)
            square += of_block[0]
            error += of_block[1]
            low_square += of_block[2]
    tl.debug_barrier()  # other threads of the program read what this one stored
    return back, row_bound(square, error, low_square, back, dim, depth, COSINE)
