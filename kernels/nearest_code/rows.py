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
def _centered(x, center, base, inside, d, valid, stride_d, PLANAR: tl.constexpr):
    z = load_rows(x, base, inside, d, valid, stride_d, PLANAR) - tl.load(center + d, mask=valid, other=0)[None, :]
    return tl.where(valid[None, :] & inside[:, None], z, 0.0)


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
):
    """Read rows, round them to float16 and store them in `target`. Returns the factor that undoes their scale, and the bound.

    They go through memory, a few hundred kilobytes that stay in the L2 cache, so that the tensor cores read them from shared memory:
    values that come from registers would be held in registers. BLOCK_D columns are in registers at a time, all of them if SPLIT.
    """
    column = tl.arange(0, BLOCK_D)
    largest = tl.zeros([inside.shape[0]], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + column
        z = _centered(x, center, base, inside, d, d < dim, stride_d, PLANAR)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=1))
    scale, back = scale_for_float16(largest)
    square = tl.zeros([inside.shape[0]], tl.float32)
    error = tl.zeros([inside.shape[0]], tl.float32)
    low_square = tl.zeros([inside.shape[0]], tl.float32)
    tl.debug_barrier()  # the program may still be reading the rows before these
    for start in range(0, depth, BLOCK_D):
        d = start + column
        valid = d < dim
        if SPLIT:
            valid = d < 3 * dim
            d = d % dim
        z = _centered(x, center, base, inside, d, valid, stride_d, PLANAR) * scale[:, None]
        high = z.to(tl.float16)
        residual = z - high.to(tl.float32)
        if SPLIT:
            once = (column < dim)[None, :]  # split operands repeat each dimension; norms count the first copy
            low = residual.to(tl.float16)
            residual = tl.where(once, residual - low.to(tl.float32), 0.0)
            low_once = tl.where(once, low.to(tl.float32), 0.0)
            low_square += tl.sum(low_once * low_once, axis=1)
            high = tl.where(((column >= dim) & (column < 2 * dim))[None, :], low, high)
            z = tl.where(once, z, 0.0)
        square += tl.sum(z * z, axis=1)
        error += tl.sum(residual * residual, axis=1)
        tl.store(target + tl.arange(0, inside.shape[0])[:, None] * depth + (start + column)[None, :], high)
    tl.debug_barrier()  # other threads of the program read what this one stored
    return back, row_bound(square, error, low_square, back, dim, depth, COSINE)
