// SPDX-License-Identifier: Apache-2.0
//
// Products of small float32 matrices, which take less time than a call of a library. The terms of
// an element are added in the order of `step`, so that the result does not depend on the number of
// threads or on the other rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/common/simd.h"

namespace genperf {

constexpr int64_t padded(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// A matrix with any strides.
struct Strided {
  const float* data;
  int64_t row_stride, stride;

  Strided transposed() const { return {data, stride, row_stride}; }
};

namespace product {

constexpr int64_t kSteps = 64;  // terms per float32 partial sum
constexpr int kRows = 4;        // of a tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

template <int R, int V>
inline void tile(const Strided& a, int64_t steps, const float* b, float* c, int64_t stride) {
  int64_t first = 0;
  do {
    Vec sums[R][V] = {};
    for (int64_t step = first; step < std::min(steps, first + kSteps); ++step) {
      Vec right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        right[v] = load(b + step * stride + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec left = broadcast(a.data[r * a.row_stride + step * a.stride]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          sums[r][v] = fma(left, right[v], sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        float* const to = c + r * stride + v * kLanes;
        store(to, first ? load(to) + sums[r][v] : sums[r][v]);
      }
    first += kSteps;
  } while (first < steps);
}

template <int R>
inline void band(const Strided& a, int64_t steps, const float* b, int64_t width, float* c) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= width; column += kVectors * kLanes)
    tile<R, kVectors>(a, steps, b + column, c + column, width);
  for (; column < width; column += kLanes)
    tile<R, 1>(a, steps, b + column, c + column, width);
}

}  // namespace product

// c [rows, width] = a [rows, steps] times b [steps, width]; b and c are contiguous, and width is a
// multiple of kLanes.
inline void multiply(const Strided& a,
                     int64_t rows,
                     int64_t steps,
                     const float* b,
                     int64_t width,
                     float* c) {
  constexpr int64_t kTask = 1 << 17;  // products of numbers
  const int64_t bands = (rows + product::kRows - 1) / product::kRows;
  const int64_t cost = product::kRows * std::max<int64_t>(1, steps) * std::max<int64_t>(1, width);
  torch::stable::parallel_for(
      0, bands, std::max<int64_t>(1, kTask / cost), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * product::kRows; row < std::min(rows, end * product::kRows);) {
          const Strided part{a.data + row * a.row_stride, a.row_stride, a.stride};
          float* const to = c + row * width;
          if (rows - row >= product::kRows) {
            product::band<product::kRows>(part, steps, b, width, to);
            row += product::kRows;
          } else {
            product::band<1>(part, steps, b, width, to);
            ++row;
          }
        }
      });
}

}  // namespace genperf
