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
def rounded_rows(
    x,
    center,  # [D]
    base,  # offsets of the rows
    inside,
    dim,
    stride_d,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Read and round rows of at most DEPTH columns. Returns the operand [rows, DEPTH], the factor that undoes its scale, the bound."""
    column = tl.arange(0, DEPTH)
    if SPLIT:
        valid = column < 3 * dim
        d = column % dim
    else:
        valid = column < dim
        d = column
    z = _centered(x, center, base, inside, d, valid, stride_d, PLANAR)
    scale, back = scale_for_float16(tl.max(tl.abs(z), axis=1))
    z *= scale[:, None]
    high = z.to(tl.float16)
    residual = z - high.to(tl.float32)
    low_square = tl.zeros([inside.shape[0]], tl.float32)
    if SPLIT:
        once = (column < dim)[None, :]  # split operands repeat each dimension; norms count the first copy
        low = residual.to(tl.float16)
        residual -= low.to(tl.float32)
        low_square = tl.sum(tl.where(once, low.to(tl.float32) * low.to(tl.float32), 0.0), axis=1)
        high = tl.where(((column >= dim) & (column < 2 * dim))[None, :], low, high)
        residual = tl.where(once, residual, 0.0)
        z = tl.where(once, z, 0.0)
    square = tl.sum(z * z, axis=1)
    error = tl.sum(residual * residual, axis=1)
    bound = row_bound(square, error, low_square, back, dim, DEPTH, COSINE)
    return high, back, bound


@triton.jit
def stored_rows(
    x,
    center,  # [D]
    target,  # pointers [rows] to rows of [depth]
    base,
    inside,
    dim,
    depth,
    stride_d,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Read and round rows, and store them for this program. Returns the factor that undoes their scale, and the bound."""
    column = tl.arange(0, BLOCK_D)
    largest = tl.zeros([inside.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + column
        z = _centered(x, center, base, inside, d, d < dim, stride_d, PLANAR)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=1))
    scale, back = scale_for_float16(largest)
    square = tl.zeros([inside.shape[0]], tl.float32)
    error = tl.zeros([inside.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + column
        z = _centered(x, center, base, inside, d, d < dim, stride_d, PLANAR) * scale[:, None]
        high = z.to(tl.float16)
        residual = z - high.to(tl.float32)
        square += tl.sum(z * z, axis=1)
        error += tl.sum(residual * residual, axis=1)
        tl.store(target[:, None] + d[None, :], high, mask=inside[:, None])
    tl.debug_barrier()  # other threads of the program read what this one stored
    bound = row_bound(square, error, tl.zeros([inside.shape[0]], tl.float32), back, dim, depth, COSINE)
    return back, bound
