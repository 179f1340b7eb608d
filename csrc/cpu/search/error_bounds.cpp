// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/error_bounds.h"

#include <cmath>

namespace genperf {

// Derivation. Let f be a packed code and z a packed query, |f| <= F (panel.norm), B the largest |b|
// and u = 2^-24.
//
// Packing: the errors of z and f are at most u times their lengths. The error of b is at most u B,
// plus 2 u B from |f|^2 / 2. Together that is 2 u |z| F + 3 u B; adding b rounds once more, u (|z|
// F + B).
//
// Products in float32, in any order: the error of n terms is at most n u |z| F. If the sum starts
// at b, every addition rounds at that magnitude, another D u B.
//
// Products in bfloat16: with z = zh + zl + zr and f = fh + fl + fr (zl = fl = 0 unless split),
//   z.f = (zh.fh + zh.fl + zl.fh) + zl.fl + (zh + zl).fr + zr.f.
// With the lengths measured during packing, the last three terms are at most
//   |zl| max|fl| + (|z| + |zr|) max|fr| + |zr| F.
// A sum of n products has an error of at most 2 u n |z| F (1 + 2^-6), in any order and with AMX's
// separate roundings.
//
// The float64 distances that decide in the end have an error of at most (D + 4) 2^-53 |x - code|^2,
// and may order codes closer than that either way.
//
// A block is dropped if its maximum is below the largest one by more than twice the sum of these
// errors: the true scores of its codes are then below that of the best code by more than the error
// of float64. Norms and bounds are computed in float32, for which `slack` compensates. Anything
// that is not finite makes the bound infinite, and no comparison then drops a code.
//
// Where the lengths of the codes differ much, one long code would make these bounds large for all.
// Every error above is that of a single code, so its own F and |b| = F^2 / 2 bound it: let e be
// the sum for F of the code, or of the longest code of its block. The error of the float64 distance
// is split by (|z| + F)^2 <= 2 |z|^2 + 2 F^2. If w is the nearest code and j any other one, then
//   score_w + e_w >= score_j - e_j,
// so a code or block with score + e below the largest score - e is dropped. The comparison rounds
// both sides by at most u (|z| F + |b|), which the factor 6 above includes.
void ErrorBounds::set(int first, const QuerySquares& squares, const CodePanel& panel) {
  const int64_t dim = panel.dim;
  const float slack = error_slack(dim), underflow = lost_length(dim);
  const float length = float(panel.norm) * slack;
  const float low_length = float(panel.low_norm) * slack;
  const float residual = float(panel.residual) * slack;
  const float max_bias = float(panel.max_bias) * slack;
  const auto root = [&](Vec v) { return (sqrt(v) + underflow) * slack; };
  const Vec norm = root(squares.total);
  const Vec product = norm * length;
  const Vec distance = norm + length;
  const Vec float64_error =
      (panel.cosine ? product : distance * distance) * ((dim + 4) * 2 * kUnit64);
  const Vec rounding = 6 * kUnit * (product + max_bias) + float64_error + kTiny;
  const Vec products = rounding + (dim + 2) * 2 * kUnit * product;
  Vec scores = products + dim * 2 * kUnit * max_bias;
  if (panel.packing == Packing::kBFloat16) {
    const Vec rest = root(squares.rest);
    scores = rounding + root(squares.low) * low_length + (norm + rest) * residual + rest * length +
             (panel.depth * kDepth + 2) * 2.2f * kUnit * product;
  }
  const auto twice = [&](Vec bound) {
    return product < 1e30f ? bound * (2.001f * slack) : broadcast(INFINITY);
  };
  store(coarse + first, twice(scores));
  store(fine + first, twice(products));
  if (panel.uneven_blocks) {
    const float single = 1.0005f * slack, float64_unit = (dim + 4) * 2 * kUnit64;
    const Vec separate = norm * norm * (2 * float64_unit) + kTiny;
    store(per_length + first, norm * ((2 * dim + 10) * kUnit * slack * single));
    store(constant + first,
          product < 1e30f && broadcast(max_bias) < 1e30f ? separate * single : broadcast(INFINITY));
    fine_square = (3 * kUnit + 2 * float64_unit) * slack * slack * single;
    coarse_square = fine_square + dim * kUnit * slack * slack * single;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    has_nan[first + lane] = std::isnan(squares.total[lane]);
}

}  // namespace genperf
