// SPDX-License-Identifier: Apache-2.0
//
// What k-means adds up over its vectors, such that no result depends on how the vectors are split
// over threads, calls and ranks.
//
// Each summand is rounded to the sum of two numbers, a multiple of a grid and a multiple of a finer
// grid below it. The grids follow from the largest summand and the number of summands, so that
// float64 holds every partial sum on either grid exactly, and addition is associative. The finer
// grid is 2^-52 of the largest summand for 2^27 vectors, and finer for fewer.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/common/code_gradient.h"
#include "cpu/common/code_order.h"

namespace genperf {
namespace {

// Splits summands into two parts on grids.
struct Grids {
  double coarse, fine;  // 1.5 * 2^52 times the spacing of a grid: adding them rounds to the grid

  Grids(double limit, int64_t total) {
    int log_total = 1;
    while ((int64_t(1) << log_total) < total)
      ++log_total;
    int exponent = 0;
    std::frexp(limit, &exponent);  // limit < 2^exponent
    exponent = std::min(exponent, 1000 - log_total);
    coarse = std::ldexp(1.5, exponent + log_total);
    fine = std::ldexp(1.5, exponent + log_total - 53 + log_total);
  }

  void add(double value, double& high, double& low) const {
    const double rounded = (value + coarse) - coarse;
    high += rounded;
    low += ((value - rounded) + fine) - fine;
  }
};

template <class T>
struct Sums {
  const Positions<T> x;
  const int64_t* indices;  // [outer, inner]
  int64_t num_codes;
  const OpMath<T>* weights;  // [outer, inner], or null for ones
  const OpMath<T>* scale;    // [outer, inner], or null for ones
  Grids values, masses;
  double* high;  // [K, D + 1], with the total weight in the last column
  double* low;   // the same

  double weight(int64_t position) const { return weights ? double(weights[position]) : 1.0; }

  double factor(int64_t position) const {
    return weight(position) * (scale ? double(scale[position]) : 1.0);
  }

  void count() const {
    for (int64_t p = 0; p < x.count(); ++p)
      if (indices[p] >= 0) {
        const int64_t place = indices[p] * (x.dim + 1) + x.dim;
        masses.add(weight(p), high[place], low[place]);
      }
  }

  void sum_by_code() const {
    const CodeOrder order(indices, x.count(), num_codes);
    torch::stable::parallel_for(0, num_codes, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double* const to_high = high + k * (x.dim + 1);
        double* const to_low = low + k * (x.dim + 1);
        for (int64_t i = order.starts[k]; i < order.starts[k + 1]; ++i) {
          const T* const vector = x.data + x.offset(order.positions[i]);
          if (weights || scale) {
            const double mass = factor(order.positions[i]);
            for (int64_t d = 0; d < x.dim; ++d)
              values.add(mass * double(vector[d]), to_high[d], to_low[d]);
          } else {
            for (int64_t d = 0; d < x.dim; ++d)
              values.add(double(vector[d]), to_high[d], to_low[d]);
          }
        }
      }
    });
  }

  void sum_by_channel() const {
    torch::stable::parallel_for(0, x.dim, 4, [&](int64_t begin, int64_t end) {
      std::vector<double> total(2 * num_codes);  // high and low of each code
      for (int64_t d = begin; d < end; ++d) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t p = 0; p < x.count(); ++p)
          if (const int64_t k = indices[p]; k >= 0)
            values.add(factor(p) * double(x.data[x.offset(p) + d * x.stride]), total[2 * k],
                       total[2 * k + 1]);
        for (int64_t k = 0; k < num_codes; ++k) {
          high[k * (x.dim + 1) + d] = total[2 * k];
          low[k * (x.dim + 1) + d] = total[2 * k + 1];
        }
      }
    });
  }
};

// A tensor [outer, inner] of the accumulator's dtype, contiguous.
std::optional<Tensor> per_position(const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value())
    return std::nullopt;
  STD_TORCH_CHECK(t->scalar_type() == accumulator_type(x) && t->numel() == x.size(0) * x.size(2),
                  "weights and scale must be [outer, inner] of the sums' dtype");
  return torch::stable::contiguous(*t);
}

template <class T>
const T* data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Sums [2, K, D + 1] in float64, high and low parts, of weight * scale * x for each code, with the
// sum of the weights in the last column. limits holds the largest magnitudes of the summands and of
// the weights, total the number of all vectors that are ever added.
Tensor cluster_sums(const Tensor& x,
                    const Tensor& indices,
                    int64_t num_codes,
                    std::optional<Tensor> weights,
                    std::optional<Tensor> scale,
                    const Tensor& limits,
                    int64_t total) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(num_codes > 0, "num_codes must be positive");
  STD_TORCH_CHECK(
      limits.scalar_type() == ScalarType::Double && limits.numel() == 2 && limits.is_contiguous(),
      "limits must be two float64");
  check_indices(indices, x);
  const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
  check_range(index, indices.numel(), num_codes);
  const auto masses = per_position(weights, x), factors = per_position(scale, x);
  Tensor sums = torch::stable::new_zeros(x, {2, num_codes, x.size(1) + 1}, ScalarType::Double);
  const double* const limit = static_cast<const double*>(limits.data_ptr());
  with_types(x, x, [&]<class T, class C>(T*, C*) {
    double* const high = static_cast<double*>(sums.data_ptr());
    const Sums<T> part{Positions<T>(x),
                       index,
                       num_codes,
                       data_of<OpMath<T>>(masses),
                       data_of<OpMath<T>>(factors),
                       Grids(limit[0], total),
                       Grids(limit[1], total),
                       high,
                       high + sums.numel() / 2};
    part.count();
    part.x.channels_last() ? part.sum_by_code() : part.sum_by_channel();
  });
  return sums;
}

constexpr int kParts = 16;

template <class T>
struct Distances {
  const Positions<T> x;
  const OpMath<T>* codebook;  // [K, D], or null for a code of zeros
  const int64_t* indices;     // [outer, inner]
  const OpMath<T>* scale;     // [outer, inner], or null for ones
  OpMath<T>* out;             // [outer, inner]

  // Component d goes to part d % 16, so that the sum is the same for every layout.
  double of(int64_t position) const {
    const T* const vector = x.data + x.offset(position);
    const OpMath<T> factor = scale ? scale[position] : OpMath<T>(1);
    if (scale && factor == 0)
      return 0.0;
    const OpMath<T>* const code = codebook ? codebook + indices[position] * x.dim : nullptr;
    double parts[kParts] = {};
    const auto add = [&](int64_t first, int count, int64_t stride) {
      for (int j = 0; j < count; ++j) {
        const OpMath<T> value = OpMath<T>(vector[(first + j) * stride]) * factor;
        const double difference = double(value) - (code ? double(code[first + j]) : 0.0);
        parts[j] += difference * difference;
      }
    };
    int64_t d = 0;
    if (x.channels_last())
      for (; d + kParts <= x.dim; d += kParts)
        add(d, kParts, 1);
    for (; d < x.dim; d += kParts)
      add(d, int(std::min<int64_t>(kParts, x.dim - d)), x.stride);
    for (int width = kParts / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j)
        parts[j] += parts[j + width];
    return parts[0];
  }
};

// Squared distance [outer, inner] of scale * x to the code of its index; without a codebook, the
// norm of scale * x.
Tensor cluster_distances(const Tensor& x,
                         std::optional<Tensor> codebook,
                         std::optional<Tensor> indices,
                         std::optional<Tensor> scale) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(codebook.has_value() == indices.has_value(), "indices need a codebook");
  const ScalarType type = accumulator_type(x);
  if (codebook.has_value()) {
    STD_TORCH_CHECK(codebook->dim() == 2 && codebook->size(1) == x.size(1) &&
                        codebook->scalar_type() == type && codebook->is_contiguous(),
                    "codebook must be [K, D], contiguous, of the distances' dtype");
    check_indices(*indices, x);
    const int64_t* index = static_cast<const int64_t*>(indices->data_ptr());
    check_range(index, indices->numel(), codebook->size(0));
    STD_TORCH_CHECK(std::all_of(index, index + indices->numel(), [](int64_t i) { return i >= 0; }),
                    "every vector needs a code");
  }
  const auto factors = per_position(scale, x);
  Tensor distances = torch::stable::new_empty(x, {x.size(0), x.size(2)}, type);
  with_types(x, x, [&]<class T, class C>(T*, C*) {
    const Distances<T> part{Positions<T>(x), data_of<OpMath<T>>(codebook),
                            data_of<int64_t>(indices), data_of<OpMath<T>>(factors),
                            static_cast<OpMath<T>*>(distances.data_ptr())};
    torch::stable::parallel_for(0, part.x.count(), 256, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        part.out[p] = OpMath<T>(part.codebook ? part.of(p) : std::sqrt(part.of(p)));
    });
  });
  return distances;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("cluster_sums", TORCH_BOX(&genperf::cluster_sums));
  m.impl("cluster_distances", TORCH_BOX(&genperf::cluster_distances));
}
