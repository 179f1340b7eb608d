// SPDX-License-Identifier: Apache-2.0
//
// The codebooks of a residual quantizer, and the arithmetic on residuals.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/common/vector_rows.h"

namespace genperf {

// Codebooks [Q, K, D] with contiguous components.
template <class W>
struct Codebooks {
  explicit Codebooks(const Tensor& codebooks)
      : first(torch::stable::select(codebooks, 0, 0)),
        count(codebooks.size(0)),
        codebook_stride(codebooks.stride(0)) {}

  Codes<W> codes(int64_t stage) const {
    Codes<W> codes = first;
    codes.data += stage * codebook_stride;
    return codes;
  }

  const W* code(int64_t stage, int64_t k) const {
    return first.data + stage * codebook_stride + k * first.code_stride;
  }

  Codes<W> first;
  int64_t count, codebook_stride;
};

// residual -= code; returns |residual|^2.
template <class W>
double subtract(W* residual, const W* code, int64_t dim) {
  using P = Pack<W>;
  typename P::V square{};
  for_each_pack<W>(dim, [&](int64_t d, auto n) {
    const auto difference = P::get(residual + d, n) - P::get(code + d, n);
    square = P::multiply_add(difference, difference, square);
    P::set(residual + d, n, difference);
  });
  return P::total(square);
}

// The sum of a position's codes, in the order of the stages.
template <class W>
void add_codes(const Codebooks<W>& codebooks,
               const int64_t* indices,
               int64_t count,
               int64_t dim,
               W* sum) {
  using P = Pack<W>;
  for_each_pack<W>(dim, [&](int64_t d, auto n) {
    auto total = P::get(codebooks.code(0, indices[0]) + d, n);
    for (int64_t stage = 1; stage < count; ++stage)
      total += P::get(codebooks.code(stage, indices[stage]) + d, n);
    P::set(sum + d, n, total);
  });
}

// The number of stages that a position was quantized with.
inline int64_t stages_of(const int64_t* indices, int64_t num_codebooks) {
  int64_t stages = 0;
  while (stages < num_codebooks && indices[stages] >= 0)
    ++stages;
  return stages;
}

inline int64_t tiles_of(int64_t positions) {
  return (positions + kRows - 1) / kRows;
}

// Calls f(first, count) for every tile of positions first ... last - 1.
template <class F>
void for_each_tile(int64_t first, int64_t last, const F& f) {
  for (; first < last; first += kRows)
    f(first, int(std::min<int64_t>(kRows, last - first)));
}

}  // namespace genperf
