# SPDX-License-Identifier: Apache-2.0
"""A certified bound on the error of the scores of the tensor cores.

Let z~ and f~ be the operands as rounded, and l(z) and l(f) their low parts if they are split (whose product is left out). Then
    |s~ - s| <= |z - z~| |f| + |z~| |f - f~| + |l(z)| |l(f)| + accumulation + rounding,
with the actual norms of the residuals, and for a tile of codes with the largest norms in the tile. Products of float16 are exact
in float32. The tensor cores add k >= 2 of them at a time to the running sum, in any order, and truncate each addend and the
result at 2^-23 of the largest. For n columns this errs by at most n (k + 2) / k 2^-23 <= n 2^-22 times the sum of magnitudes,
which is at most |z||f|. Rounding is that of x - c, of |f|^2 / 2, of the score, of the score plus or minus its bound, and of the
float64 distances that decide in the end.

The bound is linear in the norms of a tile, so that it takes a few operations for each row and tile:
    bound = at_length |f| + at_residual |f - f~| + of_tile + at_zero
where |l(f)| is taken as 2^-11 |f|, and |f| in the table of tiles is large enough for that.
"""

import triton
import triton.language as tl

# Columns of the table of tiles.
LENGTH = tl.constexpr(0)  # largest |f|
RESIDUAL = tl.constexpr(1)  # largest |f - f~|
OF_TILE = tl.constexpr(2)  # the part of the bound that no row has an influence on
SCALE = tl.constexpr(3)  # the codes of the tile are stored divided by this power of two
SHORTEST = tl.constexpr(4)  # least |f| of the codes that are not scored because of their length, or inf
FIRST_FINITE = tl.constexpr(5)  # the bits of an int32: the lowest code without NaN or infinity, or NO_CODE
TILE_COLUMNS = tl.constexpr(8)
NO_CODE = tl.constexpr(0x7FFFFFFF)

MAX_LENGTH = tl.constexpr(1e18)  # of a query; float64 decides for longer ones
MAX_CODE_LENGTH = tl.constexpr(1e19)


@triton.jit
def scale_for_float16(largest):
    """The powers of two that bring components of at most `largest` below 2^13, and back. Both are normal numbers."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    scale = tl.minimum(tl.maximum(266 - exponent, 27), 227)
    return (scale << 23).to(tl.float32, bitcast=True), ((254 - scale) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _slack(dim):
    return 1.005 * (1.0 + dim * 2.4e-7)


@triton.jit
def bound_at_residual(length, dim):
    """The coefficient of |f - f~| for rows of at most a length, or 0 if it is not a number."""
    return tl.where(length < float("inf"), _slack(dim) * length, 0.0)


@triton.jit
def bound_at_zero(length, dim, COSINE: tl.constexpr):
    """The part of the bound that no code has an influence on."""
    bound = tl.full(length.shape, 1e-30, tl.float32)
    if not COSINE:
        bound += _slack(dim) * ((dim + 4) * 2.220446049250313e-16 * length * length)
    return tl.where(length < float("inf"), bound, 0.0)


@triton.jit
def row_bound(square, error, low_square, back, dim, columns, COSINE: tl.constexpr):
    """Coefficients of a row's bound from squared norms of z, z - z~ and l(z), all divided by back^2: at |f|, |f - f~|, and 1.

    The last result is the length |z|, rounded up, or infinity if the bound is of no use. It is NaN if all distances are infinite
    by rule, since z has a NaN, or in the Euclidean metric an infinity. It is zero if z is, in the cosine metric.
    """
    # Squares below 2^-126 may underflow in the sums.
    underflow = dim * 2.168404344971009e-19
    length = (tl.sqrt(square) + underflow) * back
    residual = (tl.sqrt(error) + underflow) * back
    low = (tl.sqrt(low_square) + underflow) * back * 4.8828125e-04  # 2^-11
    accumulation = (columns + 32) * 2.455637346e-07 * length  # 1.03 2^-22
    float64_rounding = (dim + 4) * 2.220446049250313e-16
    if not COSINE:
        float64_rounding *= 2
    at_length = _slack(dim) * (residual + low + accumulation + float64_rounding * length)
    usable = (length < MAX_LENGTH) & (at_length < 1e18)
    at_most = tl.where(usable, 1.01 * length, float("inf"))
    if COSINE:
        at_most = tl.where(square == square, tl.where(square > 0, at_most, 0.0), float("nan"))
    else:
        at_most = tl.where(square < float("inf"), at_most, float("nan"))
    return tl.where(usable, at_length, 0.0), bound_at_residual(at_most, dim), bound_at_zero(at_most, dim, COSINE), at_most
