// SPDX-License-Identifier: Apache-2.0
//
// Similarities exp(-|f_i - f_j|_1) of all pairs of samples, one kernel at a time. The lanes are
// samples. Every pair is computed once and counts for both samples, four rows at a time to reuse
// what is loaded.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"
#include "elementary.h"

namespace genperf {
namespace {

constexpr int kRows = 4;

// Features of one kernel, as [C, padded N].
struct Columns {
  int64_t samples, dims, padded;
  Buffer<float> values;

  Columns(int64_t samples, int64_t dims)
      : samples(samples),
        dims(dims),
        padded((samples + kLanes - 1) / kLanes * kLanes + kRows),
        values(padded * dims) {
    std::memset(values.get(), 0, padded * dims * sizeof(float));
  }

  float* row(int64_t c) const { return values.get() + c * padded; }

  template <class T>
  void fill(const T* features, int64_t stride) const {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = 0; c < dims; ++c)
        row(c)[n] = float(features[n * stride + c]);
  }
};

inline Vec magnitude(Vec v) {
  return Vec(UVec(v) & 0x7fffffffu);
}

// part = L1 distances of kRows samples, those from i on, to samples j ... j + kLanes - 1, in the
// dimensions from c on: four of them as a tree, or if fewer are left, these.
inline void distances_of_four(const Columns& features,
                              int64_t i,
                              int64_t j,
                              int64_t c,
                              Vec (&part)[kRows]) {
  const auto difference = [&](int64_t c, int r) __attribute__((always_inline)) {
    return magnitude(load(features.row(c) + j) - features.row(c)[i + r]);
  };
  if (c + 4 <= features.dims) {
    for (int r = 0; r < kRows; ++r)
      part[r] =
          (difference(c, r) + difference(c + 1, r)) + (difference(c + 2, r) + difference(c + 3, r));
    return;
  }
  std::fill_n(part, kRows, Vec{});
  for (; c < features.dims; ++c)
    for (int r = 0; r < kRows; ++r)
      part[r] += difference(c, r);
}

// The same in all dimensions. If there are more than two sums of eight, what rounding takes from
// their sum is kept, so that the error does not grow with the number of dimensions.
inline void distances(const Columns& features, int64_t i, int64_t j, Vec (&distance)[kRows]) {
  constexpr int kStep = 8;
  const bool compensated = features.dims > 2 * kStep;
  Vec lost[kRows] = {};
  std::fill_n(distance, kRows, Vec{});
  for (int64_t c = 0; c < features.dims; c += kStep) {
    Vec part[kRows];
    distances_of_four(features, i, j, c, part);
    if (c + kStep / 2 < features.dims) {
      Vec second[kRows];
      distances_of_four(features, i, j, c + kStep / 2, second);
      for (int r = 0; r < kRows; ++r)
        part[r] += second[r];
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec total = distance[r] + part[r];
      if (compensated) {
        const Vec added = total - distance[r];
        lost[r] += (distance[r] - (total - added)) + (part[r] - added);
      }
      distance[r] = total;
    }
  }
  if (compensated)
    for (int r = 0; r < kRows; ++r)  // that of an infinite sum is NaN
      distance[r] += lost[r] == lost[r] ? lost[r] : Vec{};
}

// Calls f(j, similarities of samples i + r to samples j ... j + kLanes - 1), r < kRows, with zeros
// where the column is not after the row or either is past the end; begin(i) before and end(i) after
// the calls for the same rows.
template <class Begin, class F, class End>
void for_each_pair(const Columns& features, const Begin& begin, const F& f, const End& end) {
  UVec lanes{};
  for (int lane = 0; lane < kLanes; ++lane)
    lanes[lane] = uint32_t(lane);
  for (int64_t i = 0; i < features.samples; i += kRows) {
    begin(i);
    for (int64_t j = i / kLanes * kLanes; j < features.samples; j += kLanes) {
      Vec distance[kRows], similarity[kRows];
      distances(features, i, j, distance);
      for (int r = 0; r < kRows; ++r) {
        similarity[r] = exp_or_zero<Simd>(-distance[r]);
        if (j <= i + r || i + r >= features.samples || j + kLanes > features.samples) {
          const UVec column = lanes + uint32_t(j);
          const IVec counted = (column > uint32_t(i + r)) & (column < uint32_t(features.samples));
          similarity[r] = counted && i + r < features.samples ? similarity[r] : Vec{};
        }
      }
      f(j, similarity);
    }
    end(i);
  }
}

void check_features(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 3 && features.is_contiguous(),
                  "features must be contiguous [N, B, C]");
  STD_TORCH_CHECK(features.size(0) < int64_t{1} << 31,
                  "features must hold fewer than 2^31 samples");
}

Tensor minibatch_similarity(const Tensor& features) {
  check_features(features);
  const int64_t samples = features.size(0), kernels = features.size(1), dims = features.size(2);
  Tensor similarity = torch::stable::new_empty(features, {samples, kernels});
  with_type(features, [&]<class T>(T*) {
    const T* const in = static_cast<const T*>(features.const_data_ptr());
    T* const out = static_cast<T*>(similarity.mutable_data_ptr());
    torch::stable::parallel_for(0, kernels, 1, [&](int64_t begin, int64_t end) {
      const Columns columns(samples, dims);
      const Buffer<float> sums(columns.padded);
      for (int64_t b = begin; b < end; ++b) {
        columns.fill(in + b * dims, kernels * dims);
        std::memset(sums.get(), 0, columns.padded * sizeof(float));
        Vec own[kRows];
        for_each_pair(
            columns, [&](int64_t) { std::fill_n(own, kRows, Vec{}); },
            [&](int64_t j, const Vec(&e)[kRows]) {
              store(sums.get() + j, load(sums.get() + j) + ((e[0] + e[1]) + (e[2] + e[3])));
              for (int r = 0; r < kRows; ++r)
                own[r] += e[r];
            },
            [&](int64_t i) {
              for (int r = 0; r < kRows; ++r)
                sums[i + r] += float(sum(own[r]));
            });
        for (int64_t n = 0; n < samples; ++n)
          out[n * kernels + b] = T(sums[n]);
      }
    });
  });
  return similarity;
}

Tensor minibatch_similarity_backward(const Tensor& grad_similarity, const Tensor& features) {
  check_features(features);
  const int64_t samples = features.size(0), kernels = features.size(1), dims = features.size(2);
  STD_TORCH_CHECK(grad_similarity.scalar_type() == features.scalar_type() &&
                      grad_similarity.dim() == 2 && grad_similarity.size(0) == samples &&
                      grad_similarity.size(1) == kernels && grad_similarity.is_contiguous(),
                  "grad_similarity must be contiguous [N, B] of the features' dtype");
  Tensor grad_features = torch::stable::empty_like(features);
  with_type(features, [&]<class T>(T*) {
    const T* const in = static_cast<const T*>(features.const_data_ptr());
    const T* const upstream = static_cast<const T*>(grad_similarity.const_data_ptr());
    T* const out = static_cast<T*>(grad_features.mutable_data_ptr());
    torch::stable::parallel_for(0, kernels, 1, [&](int64_t begin, int64_t end) {
      const Columns columns(samples, dims), gradients(samples, dims);
      const Buffer<float> weights(columns.padded);
      const Buffer<Vec> own(dims * kRows);
      int64_t i = 0;
      std::memset(weights.get(), 0, columns.padded * sizeof(float));
      for (int64_t b = begin; b < end; ++b) {
        columns.fill(in + b * dims, kernels * dims);
        std::memset(gradients.values.get(), 0, columns.padded * dims * sizeof(float));
        for (int64_t n = 0; n < samples; ++n)
          weights[n] = float(upstream[n * kernels + b]);
        for_each_pair(
            columns,
            [&](int64_t first) {
              i = first;
              std::memset(own.get(), 0, dims * kRows * sizeof(Vec));
            },
            [&](int64_t j, const Vec(&e)[kRows]) {
              Vec slope[kRows];
              for (int r = 0; r < kRows; ++r)
                slope[r] = (load(weights.get() + j) + weights[i + r]) * e[r];
              for (int64_t c = 0; c < dims; ++c) {
                const float* const row = columns.row(c);
                float* const gradient = gradients.row(c) + j;
                const Vec column = load(row + j);
                Vec other = load(gradient);
                for (int r = 0; r < kRows; ++r) {
                  // The similarity decreases with the distance.
                  const Vec difference = column - row[i + r];
                  const Vec signed_slope = Vec(UVec(slope[r]) ^ (UVec(difference) & 0x80000000u));
                  const Vec step = difference == 0.0f ? Vec{} : signed_slope;
                  other -= step;
                  own[c * kRows + r] += step;
                }
                store(gradient, other);
              }
            },
            [&](int64_t) {
              for (int64_t c = 0; c < dims; ++c)
                for (int r = 0; r < kRows; ++r)
                  gradients.row(c)[i + r] += float(sum(own[c * kRows + r]));
            });
        for (int64_t n = 0; n < samples; ++n)
          for (int64_t c = 0; c < dims; ++c)
            out[(n * kernels + b) * dims + c] = T(gradients.row(c)[n]);
      }
    });
  });
  return grad_features;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("minibatch_similarity", TORCH_BOX(&genperf::minibatch_similarity));
  m.impl("minibatch_similarity_backward", TORCH_BOX(&genperf::minibatch_similarity_backward));
}
