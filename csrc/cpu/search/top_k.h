// SPDX-License-Identifier: Apache-2.0
//
// Exact search of the k nearest codes.
#pragma once

#include "cpu/common/positions.h"

namespace genperf {

// Writes indices [positions, k] of the k nearest codes in float64, nearest first and the lowest
// index first on ties; and, unless `distances` is null, their distances [positions, k]: squared, or
// for cosine 1 minus the similarity. The codebook has at least k codes of contiguous components.
template <class T, class C>
void search_top_k(const Positions<T>& x,
                  const Codes<C>& codebook,
                  int64_t k,
                  bool cosine,
                  int64_t* indices,
                  OpMath<T>* distances);

}  // namespace genperf
