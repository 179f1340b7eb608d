// SPDX-License-Identifier: Apache-2.0
//
// Bounds on the errors of a query's scores.
#pragma once

#include <cmath>

#include "cpu/common/simd.h"
#include "cpu/search/code_panel.h"

namespace genperf {

constexpr float kUnit = 0x1p-24f;    // half an ulp of 1 in float32
constexpr float kUnit64 = 0x1p-53f;  // half an ulp of 1 in float64
constexpr float kTiny = 0x1p-100f;   // covers underflow

// For norms and bounds that are computed in float32.
inline float error_slack(int64_t dim) {
  return 1.002f + dim * 4 * kUnit;
}

// Squares below 2^-126 are lost from a sum: the length that they have at most.
inline float lost_length(int64_t dim) {
  return std::sqrt(float(dim)) * 0x1p-62f;
}

// Squared lengths of kLanes queries z, and of their parts if the panel is in bfloat16.
struct QuerySquares {
  Vec total{};
  Vec low{};   // of zl, if split
  Vec rest{};  // of what bfloat16 leaves out
};

// For a tile of queries: twice the error bounds of the pass over all codes and of float32 sums in
// any order, and which queries have a NaN.
struct ErrorBounds {
  float coarse[32];
  float fine[32];
  bool has_nan[32];

  // For a panel with uneven blocks, half of these bounds for a code of length F:
  //   per_length F + (coarse_square or fine_square) F^2 + constant.
  float per_length[32];
  float constant[32];
  float coarse_square, fine_square;

  // Sets the bounds of kLanes queries.
  void set(int first, const QuerySquares& squares, const CodePanel& panel);

  // Half of the coarse bound of kLanes queries for the codes of a block, of length block_norm.
  Vec coarse_error(int first, float block_norm) const {
    const Vec length = broadcast(block_norm);
    return fma(load(per_length + first), length,
               fma(length * length, broadcast(coarse_square), load(constant + first)));
  }

  // Half of the fine bound of one query for kLanes codes, from their biases -F^2 / 2. That of a
  // code that is not finite is finite, so that its score stays -infinity.
  Vec fine_error(int query, Vec bias) const {
    const Vec doubled = bias * -2.0f;
    const Vec square = doubled < 1e30f ? doubled : broadcast(1e30f);
    return fma(broadcast(per_length[query]), sqrt(square) + 0x1p-62f,
               fma(square, broadcast(fine_square), broadcast(constant[query])));
  }
};

}  // namespace genperf
