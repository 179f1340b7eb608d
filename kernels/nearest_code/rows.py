"""Reading vectors of x [heads, outer, D, inner] by row, the position of a vector in a chunk of queries."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner):
    """Offsets of the vectors `row` positions after the position [first_outer, first_inner]."""
    size = inner.to(tl.uint32)
    within = (row + first_inner).to(tl.uint32)
    return (first_outer + within // size).to(tl.int64) * stride_outer + (within % size).to(tl.int64) * stride_inner


@triton.jit
def load_rows(x, base, inside, d, valid, stride_d, PLANAR: tl.constexpr):
    """Load x [rows, d] as float32. PLANAR: rows, not dimensions, are adjacent in memory, so threads run along the rows."""
    if PLANAR:
        value = tl.trans(tl.load(x + base[None, :] + d.to(tl.int64)[:, None] * stride_d, mask=inside[None, :] & valid[:, None], other=0))
    else:
        value = tl.load(x + base[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=inside[:, None] & valid[None, :], other=0)
    return value.to(tl.float32)
