// SPDX-License-Identifier: Apache-2.0
//
// Shared by finite scalar and lookup-free quantization on the CPU. A tile has kLanes positions,
// hence as many vectors as there are channels. If the positions are contiguous with channels
// innermost, a tile is read in memory order and each vector mixes channels, with matching
// constants; otherwise the lanes are positions.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"
#include "implicit_levels.h"

namespace genperf {

constexpr int64_t kGrain = 16384;  // elements per task

// Positions in rows with a constant stride. A tile does not cross rows.
template <class T>
struct Lines {
  T* data;
  int64_t rows, columns, dim;
  int64_t row_stride, column_stride, stride;

  explicit Lines(const Tensor& t) {
    const Positions<T> x(t);
    const bool one_row = x.count() == 0 || x.inner == 1 || x.outer == 1 ||
                         x.outer_stride == x.inner * x.inner_stride;
    data = x.data;
    dim = x.dim;
    stride = x.stride;
    rows = one_row ? 1 : x.outer;
    columns = one_row ? x.count() : x.inner;
    row_stride = x.outer_stride;
    column_stride = x.inner == 1 ? x.outer_stride : x.inner_stride;
  }

  bool is_contiguous() const {
    return rows == 1 && (dim == 1 || stride == 1) && (columns == 1 || column_stride == dim);
  }

  // The same positions in `into` rows, at least as many as now.
  Lines split(int64_t into) const {
    Lines lines = *this;
    if (rows != into) {
      lines.rows = into;
      lines.columns = columns / into;
      lines.row_stride = lines.columns * column_stride;
    }
    return lines;
  }
};

// One vector of a tile, to be read from or written to any tensor of the tile's shape.
struct TileVector {
  bool flat;
  int64_t row, column;
  int index, count;

  template <class T>
  T* at(const Lines<T>& x) const {
    return flat ? x.data + column * x.dim + index * kLanes
                : x.data + row * x.row_stride + column * x.column_stride + index * x.stride;
  }

  template <class T>
  Vec get(const Lines<T>& x) const {
    const int64_t step = flat ? 1 : x.column_stride;
    return count == kLanes && step == 1 ? load(at(x)) : read(at(x), step, count);
  }

  template <class T>
  void set(const Lines<T>& x, Vec v) const {
    const int64_t step = flat ? 1 : x.column_stride;
    if (count == kLanes && step == 1)
      store(at(x), v);
    else
      write(at(x), step, count, v);
  }
};

// Calls vector(TileVector, digits) for every vector of a tile, then tile(first position, count,
// digits).
template <class F, class G>
void for_each_tile(bool flat,
                   int64_t rows,
                   int64_t columns,
                   int64_t dim,
                   const F& vector,
                   const G& tile) {
  if (rows * columns == 0)
    return;
  const int64_t tiles = (columns + kLanes - 1) / kLanes;
  const int64_t grain = std::max<int64_t>(1, kGrain / (dim * kLanes));
  torch::stable::parallel_for(0, rows * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> digits(dim * kLanes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / tiles, column = t % tiles * kLanes;
      const int count = int(std::min<int64_t>(kLanes, columns - column));
      for (int j = 0; j < int(dim); ++j) {
        const int64_t elements = flat ? count * dim - j * kLanes : count;
        if (elements > 0)
          vector(TileVector{flat, row, column, j, int(std::min<int64_t>(elements, kLanes))},
                 digits.data() + j * kLanes);
      }
      tile(row * columns + column, count, digits.data());
    }
  });
}

// A constant of every channel, laid out like the vectors of a tile.
class ChannelConstants {
 public:
  template <class F>
  ChannelConstants(bool flat, int64_t dim, const F& constant) : values_(dim * kLanes) {
    for (int64_t i = 0; i < dim * kLanes; ++i)
      values_[i] = constant(flat ? i % dim : i / kLanes);
  }
  Vec operator[](int vector) const { return load(values_.get() + vector * kLanes); }

 private:
  Buffer<float> values_;
};

// Applies code(vector index, x), which returns a Coded, to all elements.
template <class T, class F>
void quantize(const Lines<T>& x,
              const Lines<T>& out,
              bool flat,
              const std::vector<int64_t>& basis,
              int64_t* indices,
              const F& code) {
  const int64_t dim = x.dim;
  for_each_tile(
      flat, x.rows, x.columns, dim,
      [&](const TileVector& vector, int32_t* digits) {
        const Coded<Simd> coded = code(vector.index, vector.get(x));
        vector.set(out, coded.value);
        const IVec integers = __builtin_convertvector(coded.digit, IVec);
        std::memcpy(digits, &integers, sizeof(integers));
      },
      [&](int64_t first, int count, const int32_t* digits) {
        if (!indices)
          return;
        int64_t sums[kLanes] = {};
        for (int64_t d = 0; d < dim; ++d) {
          const int64_t step = basis[d];
          if (flat)
            for (int lane = 0; lane < kLanes; ++lane)
              sums[lane] += digits[lane * dim + d] * step;
          else
            for (int lane = 0; lane < kLanes; ++lane)
              sums[lane] += digits[d * kLanes + lane] * step;
        }
        std::copy_n(sums, count, indices + first);
      });
}

inline void check_channels(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1 && x.size(1) <= kMaxChannels,
                  "x must be [outer, D, inner] with 1 to 64 channels");
}

// Both tensors with the larger number of rows of the two.
template <class T>
std::pair<Lines<T>, Lines<T>> lines_of(const Tensor& a, const Tensor& b) {
  const Lines<T> x(a), y(b);
  const int64_t rows = std::max(x.rows, y.rows);
  return {x.split(rows), y.split(rows)};
}

}  // namespace genperf
