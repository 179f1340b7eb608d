// SPDX-License-Identifier: Apache-2.0
//
// Tensors [B, rows, columns] of one shape, for elementwise work on each sample. Elements are taken
// in memory order, in runs as long as the strides allow, cut into blocks that do not depend on the
// number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/common/elements.h"

namespace genperf {

template <class T, int kCount>
struct FlatRows {
  static constexpr int64_t kBlock = 8192;  // elements per block

  std::array<Rows<T>, kCount> operands;
  int64_t samples, rows, columns;

  // `keep_order` keeps rows and columns as they are, for work that depends on them.
  FlatRows(std::array<Rows<T>, kCount> tensors, const Tensor& shape, bool keep_order)
      : operands(tensors), samples(shape.size(0)), rows(shape.size(1)), columns(shape.size(2)) {
    if (keep_order)
      return;
    if (rows > 1 && operands[0].row_stride < operands[0].stride) {
      for (Rows<T>& x : operands)
        x = x.transposed();
      std::swap(rows, columns);
    }
    for (const Rows<T>& x : operands)
      if (x && rows > 1 && x.row_stride != columns * x.stride)
        return;
    columns *= rows;
    rows = 1;
  }

  int64_t blocks_per_row() const { return (columns + kBlock - 1) / kBlock; }
  int64_t blocks() const { return samples * rows * blocks_per_row(); }
  int64_t block(int64_t sample, int64_t row, int64_t column) const {
    return (sample * rows + row) * blocks_per_row() + column / kBlock;
  }

  // Calls f(sample, row, column, count, operands at that element) for every block.
  template <class F>
  void for_each(const F& f) const {
    const int64_t grain =
        std::max<int64_t>(1, 4 * kBlock / std::max<int64_t>(1, std::min(columns, kBlock)));
    torch::stable::parallel_for(0, blocks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = block % blocks_per_row() * kBlock;
        const int64_t row = block / blocks_per_row() % rows;
        const int64_t sample = block / blocks_per_row() / rows;
        std::array<Rows<T>, kCount> there = operands;
        for (Rows<T>& x : there)
          x = x.at(sample, row, column);
        f(sample, row, column, std::min(kBlock, columns - column), there);
      }
    });
  }

  double sum_of_sample(const std::vector<double>& of_blocks, int64_t sample) const {
    double total = 0;
    for (int64_t i = 0; i < rows * blocks_per_row(); ++i)
      total += of_blocks[sample * rows * blocks_per_row() + i];
    return total;
  }
};

}  // namespace genperf
