// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/error_bounds.h"

#include <cmath>

namespace genperf {
namespace {

constexpr float kUnit = 0x1p-24f;    // half an ulp of 1 in float32
constexpr float kUnit64 = 0x1p-53f;  // ... in float64
constexpr float kTiny = 0x1p-100f;   // covers underflow

}  // namespace

// The derivation. Let f be a code and z a query as they are packed, |f| <= F (panel.norm), B the
// largest |b|, u = 2^-24.
//
// Packing. z and f are off by u of their lengths at most, b by u B and what |f|^2 / 2 is off
// itself, 2 u B: in all 2 u |z| F + 3 u B, and adding b rounds once more, u (|z| F + B).
//
// Products in float32, in any order: n terms are off by n u |z| F; where the sum starts at b, every
// addition rounds at that magnitude, D u B more.
//
// Products in bfloat16. With z = zh + zl + zr and f = fh + fl + fr (zl = fl = 0 unless split),
//   z.f = (zh.fh + zh.fl + zl.fh) + zl.fl + (zh + zl).fr + zr.f,
// and with the lengths that were measured when packing the last three are at most
//   |zl| max|fl| + (|z| + |zr|) max|fr| + |zr| F.
// A sum of n of the products is off by 2 u n |z| F (1 + 2^-6) for any order and for the matrix
// unit's separate roundings.
//
// The last word is the float64 distances', which are off by (D + 4) 2^-53 |x - code|^2 at most, so
// that codes closer than that may be told apart by them alone.
//
// A block is left out if its maximum is below the largest one less twice the sum of all that: its
// codes' true scores are then below that of the code with the largest, by more than float64 can
// confuse. Norms and bounds are themselves computed in float32, for which `slack` makes up.
// Anything that is not finite makes the bound infinite; no comparison then excludes a code.
void ErrorBounds::set(int first, const QuerySquares& squares, const CodePanel& panel) {
  const int64_t dim = panel.dim;
  const float slack = 1.002f + dim * 4 * kUnit;
  // Squares below 2^-126 are lost from the sums.
  const float underflow = std::sqrt(float(dim)) * 0x1p-62f;
  const float length = float(panel.norm) * slack;
  const float low_length = float(panel.low_norm) * slack;
  const float residual = float(panel.residual) * slack;
  const float max_bias = float(panel.max_bias) * slack;
  const auto root = [&](Vec v) { return (sqrt(v) + underflow) * slack; };
  const Vec norm = root(squares.whole);
  const Vec product = norm * length;
  const Vec distance = norm + length;
  const Vec float64_error =
      (panel.cosine ? product : distance * distance) * ((dim + 4) * 2 * kUnit64);
  const Vec rounding = 6 * kUnit * (product + max_bias) + float64_error + kTiny;
  const Vec products = rounding + (dim + 2) * 2 * kUnit * product;
  Vec scores = products + dim * 2 * kUnit * max_bias;
  if (panel.bf16) {
    const Vec rest = root(squares.rest);
    scores = rounding + root(squares.low) * low_length + (norm + rest) * residual + rest * length +
             (panel.depth * kDepth + 2) * 2.2f * kUnit * product;
  }
  const auto twice = [&](Vec bound) {
    return product < 1e30f ? bound * (2.001f * slack) : broadcast(INFINITY);
  };
  store(coarse + first, twice(scores));
  store(fine + first, twice(products));
  for (int lane = 0; lane < kLanes; ++lane)
    has_nan[first + lane] = std::isnan(squares.whole[lane]);
}

}  // namespace genperf
