// SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of the residuals that are assigned to each code.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/residual/codebooks.h"

namespace genperf {

// The positions sorted by code, for every stage.
struct PositionsByCode {
  PositionsByCode(const int64_t* indices, int64_t positions, int64_t num_codebooks, int64_t codes)
      : starts(num_codebooks * (codes + 1)), order(num_codebooks * positions) {
    std::fill_n(starts.get(), num_codebooks * (codes + 1), 0);
    torch::stable::parallel_for(0, num_codebooks, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> next(codes);
      for (int64_t stage = begin; stage < end; ++stage) {
        int64_t* const start = starts.get() + stage * (codes + 1);
        for (int64_t p = 0; p < positions; ++p)
          if (indices[p * num_codebooks + stage] >= 0)
            ++start[indices[p * num_codebooks + stage] + 1];
        for (int64_t k = 0; k < codes; ++k)
          start[k + 1] += start[k];
        std::copy_n(start, codes, next.begin());
        for (int64_t p = 0; p < positions; ++p)
          if (indices[p * num_codebooks + stage] >= 0)
            order[stage * positions + next[indices[p * num_codebooks + stage]]++] = p;
      }
    });
  }

  Buffer<int64_t> starts;  // [Q, K + 1]
  Buffer<int64_t> order;   // [Q, positions]
};

template <class T>
void residual_statistics(const Positions<T>& x,
                         const Codebooks<OpMath<T>>& codebooks,
                         const int64_t* indices,
                         bool after,
                         OpMath<T>* counts,
                         OpMath<T>* sums) {
  using W = OpMath<T>;
  const int64_t dim = x.dim, positions = x.count(), codes = codebooks.first.count;
  const PositionsByCode by_code(indices, positions, codebooks.count, codes);
  Buffer<W> rows(positions * dim);
  torch::stable::parallel_for(0, tiles_of(positions), 8, [&](int64_t begin, int64_t end) {
    for_each_tile(begin * kRows, std::min(positions, end * kRows), [&](int64_t first, int count) {
      Tile(x, first, count).copy(rows.get() + first * dim);
    });
  });
  for (int64_t stage = 0; stage < codebooks.count; ++stage) {
    const int64_t* const start = by_code.starts.get() + stage * (codes + 1);
    const int64_t* const order = by_code.order.get() + stage * positions;
    torch::stable::parallel_for(0, codes, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> totals(dim);
      double* const total = totals.data();
      for (int64_t k = begin; k < end; ++k) {
        std::fill_n(total, dim, 0.0);
        const W* const code = codebooks.code(stage, k);
        for (int64_t i = start[k]; i < start[k + 1]; ++i) {
          W* const row = rows.get() + order[i] * dim;
          if (after)
            for (int64_t d = 0; d < dim; ++d) {
              row[d] -= code[d];
              total[d] += double(row[d]);
            }
          else
            for (int64_t d = 0; d < dim; ++d) {
              total[d] += double(row[d]);
              row[d] -= code[d];
            }
        }
        counts[stage * codes + k] = W(start[k + 1] - start[k]);
        std::copy_n(total, dim, sums + (stage * codes + k) * dim);
      }
    });
  }
}

}  // namespace genperf
