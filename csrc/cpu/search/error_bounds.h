// SPDX-License-Identifier: Apache-2.0
//
// How far the scores of a panel can be off for a query.
#pragma once

#include "cpu/common/simd.h"
#include "cpu/search/code_panel.h"

namespace genperf {

// Squared lengths of some queries z, and of their parts if the panel is halved.
struct QuerySquares {
  Vec whole{};
  Vec low{};   // of zl, if split
  Vec rest{};  // of what the halves leave out
};

// For a tile of queries, twice the bound of the pass over all codes, and of sums of float32
// products in any order; and which of the queries have a NaN.
struct ErrorBounds {
  float coarse[32];
  float fine[32];
  bool has_nan[32];

  // Those of kLanes queries.
  void set(int first, const QuerySquares& squares, const CodePanel& panel);
};

}  // namespace genperf
