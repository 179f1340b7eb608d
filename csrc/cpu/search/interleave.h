// SPDX-License-Identifier: Apache-2.0
//
// From rows of components to groups of 16 codes or queries along the lanes.
#pragma once

#include <algorithm>

#include "cpu/common/simd.h"
#include "cpu/search/code_panel.h"

namespace genperf {

// [16, depth * 32] -> [depth, 16 pairs, 16, 2]
inline void interleave_pairs(const uint16_t* rows, int64_t depth, uint16_t* values) {
  for (int64_t t = 0; t < depth; ++t)
    for (int first = 0; first < kGroup; first += kLanes)
      for (int pair = 0; pair < kGroup; pair += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          std::memcpy(&block[i], rows + (first + i) * depth * kDepth + t * kDepth + 2 * pair,
                      sizeof(Vec));
        transpose(block);
        for (int i = 0; i < kLanes; ++i)
          std::memcpy(values + ((t * kGroup + pair + i) * kGroup + first) * 2, &block[i],
                      sizeof(Vec));
      }
}

// [16, row_length] -> [D, 16]
inline void interleave(const float* rows, int64_t row_length, int64_t dim, float* values) {
  for (int lane = 0; lane < kGroup; lane += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = load(rows + (lane + i) * row_length + d);
      transpose(block);
      const int count = int(std::min<int64_t>(kLanes, dim - d));
      for (int i = 0; i < count; ++i)
        store(values + (d + i) * kGroup + lane, block[i]);
    }
}

}  // namespace genperf
