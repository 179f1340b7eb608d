// SPDX-License-Identifier: Apache-2.0
//
// Counts and sums per code, in float64 and in ascending order of the positions, for every layout
// and number of threads. Channels-last data are sorted by code (a counting sort) and summed code by
// code. Channels-first data are summed for eight channels at a time: each thread transposes tiles
// of its channels and adds them to the codes that have a vector.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/common/code_gradient.h"
#include "cpu/common/code_order.h"
#include "cpu/common/outputs.h"
#include "cpu/common/planes.h"

namespace genperf {
namespace {

constexpr int kChannels = 8;  // of channels-first data, summed at a time

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

  void compute() const {
    std::vector<double> totals(num_codes);
    std::vector<int32_t> slots(num_codes);  // whether a code has a vector
    for (int64_t p = 0; p < x.count(); ++p)
      if (indices[p] >= 0) {
        totals[indices[p]] += weight(p);
        slots[indices[p]] = 1;
      }
    std::copy(totals.begin(), totals.end(), counts);
    x.channels_last() ? sum_by_code() : sum_by_channel(slots);
  }

  void sum_by_code() const {
    const CodeOrder order(indices, x.count(), num_codes);
    torch::stable::parallel_for(0, num_codes, 16, [&](int64_t begin, int64_t end) {
      const Buffer<double> total(x.dim);
      for (int64_t k = begin; k < end; ++k) {
        std::fill_n(total.get(), x.dim, 0.0);
        for (int64_t i = order.starts[k]; i < order.starts[k + 1]; ++i) {
          const int64_t position = order.positions[i];
          add(position, k, x.data + x.offset(position), 0, x.dim, total.get());
        }
        std::copy_n(total.get(), x.dim, sums + k * x.dim);
      }
    });
  }

  // The slot of a code says whether it has a vector.
  void sum_by_channel(std::vector<int32_t>& slots) const {
    torch::stable::parallel_for(0, num_codes, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        if (!slots[k])
          std::fill_n(sums + k * x.dim, x.dim, OpMath<T>(0));
    });
    int32_t used = 0;
    for (int32_t& slot : slots)
      slot = slot ? used++ : -1;
    const Positions<T> in = x.merged();
    torch::stable::parallel_for(
        0, (x.dim + kChannels - 1) / kChannels, 1, [&](int64_t begin, int64_t end) {
          const Buffer<double> totals(used * kChannels);
          alignas(64) OpMath<T> rows[kRows * kChannels] = {};
          for (int64_t first = begin * kChannels; first < std::min(x.dim, end * kChannels);
               first += kChannels) {
            const int channels = int(std::min<int64_t>(kChannels, x.dim - first));
            std::fill_n(totals.get(), used * kChannels, 0.0);
            in.for_each_run(0, in.count(), kRows, [&](int64_t p, int n, int64_t o, int64_t i) {
              read_channels(in.at(o, i) + first * in.stride, in, n, channels, rows);
              for (int lane = 0; lane < n; ++lane) {
                const int64_t k = indices[p + lane];
                if (k < 0)
                  continue;
                const OpMath<T>* const row = rows + lane * kChannels;
                double* const total = totals.get() + slots[k] * kChannels;
                if (channels == kChannels || !origins)  // the rest of the row is zeros
                  add(p + lane, k, row, first, std::integral_constant<int, kChannels>(), total);
                else
                  add(p + lane, k, row, first, channels, total);
              }
            });
            for (int64_t k = 0; k < num_codes; ++k)
              if (slots[k] >= 0)
                std::copy_n(totals.get() + slots[k] * kChannels, channels,
                            sums + k * x.dim + first);
          }
        });
  }

  // rows [count, kChannels] = components of adjacent vectors, the first at p.
  static void read_channels(const T* p,
                            const Positions<T>& x,
                            int count,
                            int channels,
                            OpMath<T>* rows) {
    if constexpr (!std::is_same_v<T, double>)
      if (x.inner_stride == 1) {
        // A block of kLanes rows, each a component at kLanes positions.
        constexpr int kWidth = std::min(kLanes, kChannels), kParts = kLanes / kWidth;
        for (int at = 0; at < count; at += kParts * kLanes)
          for (int d = 0; d < channels; d += kWidth) {
            Vec block[kLanes];
#pragma GCC unroll 16
            for (int row = 0; row < kLanes; ++row) {
              const int c = d + row % kWidth, lane = at + row / kWidth * kLanes;
              block[row] = c < channels && lane < count
                               ? get_lanes(p + c * x.stride + lane, std::min(kLanes, count - lane))
                               : Vec{};
            }
            transpose(block);
            for (int row = 0; row < kLanes; ++row)
              for (int part = 0; part < kParts; ++part)
                std::memcpy(rows + (at + part * kLanes + row) * kChannels + d,
                            reinterpret_cast<const float*>(block + row) + part * kWidth,
                            kWidth * sizeof(float));
          }
        return;
      }
    for (int lane = 0; lane < count; ++lane)
      for (int c = 0; c < channels; ++c)
        rows[lane * kChannels + c] = OpMath<T>(p[lane * x.inner_stride + c * x.stride]);
  }

  // total[d] += weight * (vector[d] - origin[first + d]) for d < n.
  template <class E, class N>
  void add(int64_t position,
           int64_t code,
           const E* vector,
           int64_t first,
           N n,
           double* __restrict total) const {
    if (!weights && !origins) {
      for (int64_t d = 0; d < n; ++d)
        total[d] += double(OpMath<T>(vector[d]));
      return;
    }
    const double mass = weight(position);
    const C* const origin =
        origins ? origins->data + code * origins->code_stride + first * origins->stride : nullptr;
    for (int64_t d = 0; d < n; ++d)
      total[d] += mass * (double(OpMath<T>(vector[d])) -
                          (origin ? double(OpMath<C>(origin[d * origins->stride])) : 0.0));
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
  use_huge_pages(sums);
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
    statistics.compute();
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
  use_huge_pages(gradient);
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
