// SPDX-License-Identifier: Apache-2.0
//
// Counts and sums per code, in float64 and in ascending order of the positions, for every layout
// and number of threads. Channels-last data are sorted by code (a counting sort) and summed code by
// code. Channels-first data are summed channel by channel: each thread owns some channels and
// scatters into their columns.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/code_gradient.h"
#include "cpu/common/code_order.h"

namespace genperf {
namespace {

template <class T, class C>
struct Statistics {
  const Positions<T> x;
  const int64_t* indices;  // [outer, inner]
  int64_t num_codes;
  const OpMath<T>* weights;  // [outer, inner], or null for ones
  const Codes<C>* origins;   // [K, D], or null for zeros
  OpMath<T>* counts;         // [K]
  OpMath<T>* sums;           // [K, D]

  double weight(int64_t position) const { return weights ? double(weights[position]) : 1.0; }

  void count() const {
    std::vector<double> totals(num_codes);
    for (int64_t p = 0; p < x.count(); ++p)
      if (indices[p] >= 0)
        totals[indices[p]] += weight(p);
    std::copy(totals.begin(), totals.end(), counts);
  }

  void sum_by_code() const {
    const CodeOrder order(indices, x.count(), num_codes);
    torch::stable::parallel_for(0, num_codes, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> total(x.dim);
      for (int64_t k = begin; k < end; ++k) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t i = order.starts[k]; i < order.starts[k + 1]; ++i)
          add(order.positions[i], k, 0, x.dim, total.data(), 1);
        std::copy(total.begin(), total.end(), sums + k * x.dim);
      }
    });
  }

  void sum_by_channel() const {
    constexpr int64_t kChannels = 4;
    torch::stable::parallel_for(
        0, (x.dim + kChannels - 1) / kChannels, 1, [&](int64_t begin, int64_t end) {
          std::vector<double> total(kChannels * num_codes);  // [4, K]
          for (int64_t group = begin; group < end; ++group) {
            const int64_t first = group * kChannels, last = std::min(x.dim, first + kChannels);
            std::fill(total.begin(), total.end(), 0.0);
            for (int64_t p = 0; p < x.count(); ++p)
              if (indices[p] >= 0)
                add(p, indices[p], first, last, total.data() + indices[p], num_codes);
            for (int64_t d = first; d < last; ++d)
              for (int64_t k = 0; k < num_codes; ++k)
                sums[k * x.dim + d] = OpMath<T>(total[(d - first) * num_codes + k]);
          }
        });
  }

  // total[(d - first) * stride] += weight * (x - origin) for channels first ... last - 1 of a
  // position.
  void add(int64_t position,
           int64_t code,
           int64_t first,
           int64_t last,
           double* total,
           int64_t stride) const {
    const T* vector = x.data + x.offset(position);
    const double mass = weight(position);
    for (int64_t d = first; d < last; ++d) {
      const double origin =
          origins ? double(origins->data[code * origins->code_stride + d * origins->stride]) : 0.0;
      total[(d - first) * stride] += mass * (double(vector[d * x.stride]) - origin);
    }
  }
};

std::tuple<Tensor, Tensor> code_statistics(const Tensor& x,
                                           const Tensor& indices,
                                           int64_t num_codes,
                                           std::optional<Tensor> weights,
                                           std::optional<Tensor> origins) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(num_codes > 0, "num_codes must be positive");
  check_indices(indices, x);
  const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
  check_range(index, indices.numel(), num_codes);
  const ScalarType type = accumulator_type(x);
  Tensor counts = torch::stable::new_empty(x, {num_codes}, type);
  Tensor sums = torch::stable::new_empty(x, {num_codes, x.size(1)}, type);
  Tensor contiguous_weights;
  if (weights.has_value()) {
    STD_TORCH_CHECK(weights->scalar_type() == type && weights->numel() == indices.numel(),
                    "weights must be [outer, inner] of the sums' dtype");
    contiguous_weights = torch::stable::contiguous(*weights);
  }
  if (origins.has_value())
    STD_TORCH_CHECK(
        origins->dim() == 2 && origins->size(0) == num_codes && origins->size(1) == x.size(1),
        "origins must be [K, D]");
  with_types(x, origins.has_value() ? *origins : x, [&]<class T, class C>(T*, C*) {
    std::optional<Codes<C>> origin;
    if (origins.has_value())
      origin.emplace(*origins);
    const Statistics<T, C> statistics{
        Positions<T>(x),
        index,
        num_codes,
        weights.has_value() ? static_cast<const OpMath<T>*>(contiguous_weights.data_ptr())
                            : nullptr,
        origin ? &*origin : nullptr,
        static_cast<OpMath<T>*>(counts.data_ptr()),
        static_cast<OpMath<T>*>(sums.data_ptr())};
    statistics.count();
    statistics.x.channels_last() ? statistics.sum_by_code() : statistics.sum_by_channel();
  });
  return {counts, sums};
}

// The gradient of the codes of `codebook_weight` times the mean squared error.
Tensor vector_quantize_backward_codebook(const Tensor& grad_mse,
                                         const Tensor& x,
                                         const Tensor& codebook,
                                         const Tensor& indices,
                                         const Tensor& valid,
                                         double codebook_weight) {
  const auto [counts, sums] = code_statistics(x, indices, codebook.size(0), std::nullopt, codebook);
  Tensor gradient = torch::stable::new_empty(codebook, {codebook.size(0), codebook.size(1)});
  with_types(x, codebook, [&]<class T, class C>(T*, C*) {
    scale_code_gradient<OpMath<T>, C>(sums, grad_mse, valid, x.size(1), codebook_weight, gradient);
  });
  return gradient;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("code_statistics", TORCH_BOX(&genperf::code_statistics));
  m.impl("vector_quantize_backward_codebook",
         TORCH_BOX(&genperf::vector_quantize_backward_codebook));
}
