"""Rounding to bfloat16, and a certified bound on the error that it causes in a score.

For z~ and f~, the operands as rounded, and l(z) and l(f), their low parts if they are split (whose product is left out),
    |s~ - s| <= |z - z~| max|f| + |z~| max|f - f~| + |l(z)| max|l(f)| + accumulation,
computed from the actual norms of the residuals. Products of bfloat16 are exact in float32. The tensor cores add k >= 2 of
them at a time to the running sum, in any order, and truncate each addend and the result at 2^-23 of the largest. For n columns
this errs by at most n (k + 2) / k 2^-23 <= n 2^-22 times the sum of magnitudes, |z||f| + |f|^2 / 2. The rounding of x - c, of
the three parts of |f|^2 / 2, and of the float64 distances that decide in the end, is added.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_bfloat16(value):
    """Round float32 to the 8 significant bits of bfloat16, ties to even; the result is float32."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def double_error_bound(square, error, low_square, max_norms, dim, columns, COSINE: tl.constexpr):
    """Twice the error bound of a row's scores, from the squared norms of z, z - z~ and l(z); inf if it is too large to be of use."""
    max_f = tl.load(max_norms).to(tl.float32, bitcast=True)
    max_residual = tl.load(max_norms + 1).to(tl.float32, bitcast=True)
    max_low = tl.load(max_norms + 2).to(tl.float32, bitcast=True)
    max_bias = tl.load(max_norms + 3).to(tl.float32, bitcast=True)
    # Squares below 2^-126 may underflow in the sums.
    underflow = tl.sqrt(dim.to(tl.float32)) * 2.168404344971009e-19
    length = tl.sqrt(square) + underflow
    product = length * max_f
    accumulation = (columns + 32) * 2.384185791015625e-07 * (1.03 * product + max_bias)
    distance = length + max_f
    float64_rounding = (dim + 4) * 2.220446049250313e-16 * (product if COSINE else distance * distance)
    residuals = (tl.sqrt(error) + underflow) * max_f + 1.01 * length * max_residual + (tl.sqrt(low_square) + underflow) * max_low
    twice = 2.01 * (residuals + accumulation + float64_rounding) * (1.0 + dim * 2.4e-7) + 1e-30
    return tl.where((product < 1e30) & (twice == twice), twice, float("inf"))
