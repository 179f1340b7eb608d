// SPDX-License-Identifier: Apache-2.0
//
// Bounds on the errors of a query's scores.
#pragma once

#include "cpu/common/simd.h"
#include "cpu/search/code_panel.h"

namespace genperf {

// Squared lengths of kLanes queries z, and of their parts if the panel is bf16.
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

  // Sets the bounds of kLanes queries.
  void set(int first, const QuerySquares& squares, const CodePanel& panel);
};

}  // namespace genperf
