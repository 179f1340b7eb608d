// SPDX-License-Identifier: Apache-2.0
//
// The indices and distances of the k nearest codes of each vector, exactly as float64 arithmetic
// gives them. The search itself is in cpu/search.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/search/top_k.h"

namespace genperf {
namespace {

std::tuple<Tensor, Tensor> nearest_codes(const Tensor& x,
                                         const Tensor& codebook,
                                         int64_t k,
                                         bool cosine,
                                         bool with_distances) {
  const bool heads = x.dim() == 4;
  const int64_t count = heads ? x.size(0) : 1;
  STD_TORCH_CHECK(heads ? codebook.dim() == 3 && codebook.size(0) == count : x.dim() == 3,
                  "x and codebook must be [outer, D, inner] and [K, D], or both with heads first");
  STD_TORCH_CHECK(k >= 1 && k <= 64 && k <= codebook.size(codebook.dim() - 2),
                  "k must lie between 1 and 64, and be at most the number of codes");
  const auto new_output = [&](ScalarType type) {
    return heads ? torch::stable::new_empty(x, {count, x.size(1), x.size(3), k}, type)
                 : torch::stable::new_empty(x, {x.size(0), x.size(2), k}, type);
  };
  Tensor indices = new_output(ScalarType::Long);
  Tensor distances = with_distances ? new_output(accumulator_type(x))
                                    : torch::stable::new_empty(x, {0}, accumulator_type(x));
  // Packing and rescoring read the components of a code contiguously.
  const Tensor rows =
      codebook.stride(codebook.dim() - 1) == 1 ? codebook : torch::stable::contiguous(codebook);
  for (int64_t head = 0; head < count; ++head) {
    const Tensor vectors = heads ? torch::stable::select(x, 0, head) : x;
    const Tensor codes = heads ? torch::stable::select(rows, 0, head) : rows;
    check_positions(vectors, codes);
    const int64_t first = head * vectors.size(0) * vectors.size(2) * k;
    if (vectors.size(0) * vectors.size(2) == 0)
      continue;
    with_types(vectors, codes, [&]<class T, class C>(T*, C*) {
      search_top_k(
          Positions<T>(vectors), Codes<C>(codes), k, cosine,
          static_cast<int64_t*>(indices.data_ptr()) + first,
          with_distances ? static_cast<OpMath<T>*>(distances.data_ptr()) + first : nullptr);
    });
  }
  return {indices, distances};
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("nearest_codes", TORCH_BOX(&genperf::nearest_codes));
}
