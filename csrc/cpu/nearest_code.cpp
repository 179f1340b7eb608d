// SPDX-License-Identifier: Apache-2.0
//
// The index of the nearest code of each vector, exactly as float64 arithmetic gives it. The search
// itself is in cpu/search.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/search/search.h"

namespace genperf {
namespace {

Tensor nearest_code(const Tensor& x,
                    const Tensor& codebook,
                    std::optional<Tensor> mask,
                    bool cosine) {
  const bool heads = x.dim() == 4;
  const int64_t count = heads ? x.size(0) : 1;
  STD_TORCH_CHECK(heads ? codebook.dim() == 3 && codebook.size(0) == count : x.dim() == 3,
                  "x and codebook must be [outer, D, inner] and [K, D], or both with heads first");
  Tensor indices =
      heads ? torch::stable::new_empty(x, {count, x.size(1), x.size(3)}, ScalarType::Long)
            : torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long);
  Tensor contiguous_mask;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == indices.numel(),
                    "mask must be bool, one for each position");
    contiguous_mask = torch::stable::contiguous(*mask);
  }
  // Packing and rescoring read the components of a code contiguously.
  const Tensor rows =
      codebook.stride(codebook.dim() - 1) == 1 ? codebook : torch::stable::contiguous(codebook);
  for (int64_t head = 0; head < count; ++head) {
    const Tensor vectors = heads ? torch::stable::select(x, 0, head) : x;
    const Tensor codes = heads ? torch::stable::select(rows, 0, head) : rows;
    check_positions(vectors, codes);
    const int64_t positions = vectors.size(0) * vectors.size(2);
    if (positions == 0)
      continue;
    with_types(vectors, codes, [&]<class T, class C>(T*, C*) {
      search(Positions<T>(vectors), Codes<C>(codes),
             mask.has_value()
                 ? static_cast<const bool*>(contiguous_mask.data_ptr()) + head * positions
                 : nullptr,
             cosine, static_cast<int64_t*>(indices.data_ptr()) + head * positions);
    });
  }
  return indices;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&genperf::nearest_code));
}
