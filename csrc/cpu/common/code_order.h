// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/common/positions.h"

namespace genperf {

// The positions of each code in ascending order, by a counting sort. Negative indices are left out.
struct CodeOrder {
  std::vector<int64_t> starts;  // [K + 1], of each code in `positions`
  Buffer<int64_t> positions;

  CodeOrder(const int64_t* indices, int64_t count, int64_t num_codes) : starts(num_codes + 1) {
    for (int64_t p = 0; p < count; ++p)
      if (indices[p] >= 0)
        ++starts[indices[p] + 1];
    for (int64_t k = 0; k < num_codes; ++k)
      starts[k + 1] += starts[k];
    positions = Buffer<int64_t>(starts[num_codes]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t p = 0; p < count; ++p)
      if (indices[p] >= 0)
        positions[next[indices[p]]++] = p;
  }
};

}  // namespace genperf
