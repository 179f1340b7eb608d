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

  // Adds the parts of a value to the sums, or takes them away.
  template <bool kAdd = true>
  void add(double value, double& high, double& low) const {
    const double rounded = (value + coarse) - coarse;
    const double rest = ((value - rounded) + fine) - fine;
    high += kAdd ? rounded : -rounded;
    low += kAdd ? rest : -rest;
  }
};

template <class T>
struct Sums {
  const Positions<T> x;
  const int64_t* indices;  // [outer, inner]
  const int64_t* before;   // codes whose sums hold the vectors, or null if none does
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

  // The codes that vectors come to, and those that they leave; -1 for a vector that stays.
  struct Moves {
    const int64_t *came, *left;
    Buffer<int64_t> came_of_moved, left_of_moved;

    explicit Moves(const Sums& sums) : came(sums.indices), left(nullptr) {
      if (!sums.before)
        return;
      const int64_t count = sums.x.count();
      came_of_moved = Buffer<int64_t>(count);
      left_of_moved = Buffer<int64_t>(count);
      for (int64_t p = 0; p < count; ++p) {
        const bool moved = sums.indices[p] != sums.before[p];
        came_of_moved[p] = moved ? sums.indices[p] : -1;
        left_of_moved[p] = moved ? sums.before[p] : -1;
      }
      came = came_of_moved.get();
      left = left_of_moved.get();
    }
  };

  void add() const {
    const Moves moves(*this);
    for (int64_t p = 0; p < x.count(); ++p) {
      if (moves.came[p] >= 0)
        add_weight<true>(p, moves.came[p]);
      if (moves.left && moves.left[p] >= 0)
        add_weight<false>(p, moves.left[p]);
    }
    x.channels_last() ? add_by_code(moves) : add_by_channel(moves);
  }

  template <bool kAdd>
  void add_weight(int64_t position, int64_t code) const {
    const int64_t place = code * (x.dim + 1) + x.dim;
    masses.template add<kAdd>(weight(position), high[place], low[place]);
  }

  void add_by_code(const Moves& moves) const {
    add_in_order<true>(CodeOrder(moves.came, x.count(), num_codes));
    if (moves.left)
      add_in_order<false>(CodeOrder(moves.left, x.count(), num_codes));
  }

  template <bool kAdd>
  void add_in_order(const CodeOrder& order) const {
    torch::stable::parallel_for(0, num_codes, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double* const to_high = high + k * (x.dim + 1);
        double* const to_low = low + k * (x.dim + 1);
        for (int64_t i = order.starts[k]; i < order.starts[k + 1]; ++i) {
          const T* const vector = x.data + x.offset(order.positions[i]);
          if (weights || scale) {
            const double mass = factor(order.positions[i]);
            for (int64_t d = 0; d < x.dim; ++d)
              values.template add<kAdd>(mass * double(vector[d]), to_high[d], to_low[d]);
          } else {
            for (int64_t d = 0; d < x.dim; ++d)
              values.template add<kAdd>(double(vector[d]), to_high[d], to_low[d]);
          }
        }
      }
    });
  }

  void add_by_channel(const Moves& moves) const {
    std::vector<int64_t> positions;
    for (int64_t p = 0; p < x.count(); ++p)
      if (moves.came[p] >= 0 || (moves.left && moves.left[p] >= 0))
        positions.push_back(p);
    torch::stable::parallel_for(0, x.dim, 4, [&](int64_t begin, int64_t end) {
      std::vector<double> total(2 * num_codes);  // high and low of each code
      for (int64_t d = begin; d < end; ++d) {
        for (int64_t k = 0; k < num_codes; ++k) {
          total[2 * k] = high[k * (x.dim + 1) + d];
          total[2 * k + 1] = low[k * (x.dim + 1) + d];
        }
        for (const int64_t p : positions) {
          const double value = factor(p) * double(x.data[x.offset(p) + d * x.stride]);
          if (const int64_t k = moves.came[p]; k >= 0)
            values.add(value, total[2 * k], total[2 * k + 1]);
          if (const int64_t k = moves.left ? moves.left[p] : -1; k >= 0)
            values.template add<false>(value, total[2 * k], total[2 * k + 1]);
        }
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

void check_sums(const Tensor& sums) {
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) == 2 && sums.size(1) > 0 &&
                      sums.is_contiguous() && sums.scalar_type() == ScalarType::Double,
                  "sums must be [2, K, D + 1] in float64, contiguous");
}

// Sums [2, K, D + 1] in float64, high and low parts, of weight * scale * x for each code, with the
// sum of the weights in the last column. Adds the vectors, or with `before`, where `sums` hold the
// vectors at those codes, moves the ones whose code is another. limits holds the largest magnitudes
// of the summands and of the weights, total the number of all vectors that are ever added.
void cluster_sums_add(Tensor sums,
                      const Tensor& x,
                      const Tensor& indices,
                      std::optional<Tensor> before,
                      std::optional<Tensor> weights,
                      std::optional<Tensor> scale,
                      const Tensor& limits,
                      int64_t total) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  check_sums(sums);
  STD_TORCH_CHECK(sums.size(2) == x.size(1) + 1, "sums must be [2, K, D + 1], with the D of x");
  STD_TORCH_CHECK(
      limits.scalar_type() == ScalarType::Double && limits.numel() == 2 && limits.is_contiguous(),
      "limits must be two float64");
  const int64_t num_codes = sums.size(1);
  check_indices(indices, x);
  check_range(static_cast<const int64_t*>(indices.data_ptr()), indices.numel(), num_codes);
  if (before.has_value()) {
    check_indices(*before, x);
    check_range(static_cast<const int64_t*>(before->data_ptr()), before->numel(), num_codes);
  }
  const auto masses = per_position(weights, x), factors = per_position(scale, x);
  const double* const limit = static_cast<const double*>(limits.data_ptr());
  with_types(x, x, [&]<class T, class C>(T*, C*) {
    double* const high = static_cast<double*>(sums.data_ptr());
    const Sums<T> part{Positions<T>(x),
                       static_cast<const int64_t*>(indices.data_ptr()),
                       data_of<int64_t>(before),
                       num_codes,
                       data_of<OpMath<T>>(masses),
                       data_of<OpMath<T>>(factors),
                       Grids(limit[0], total),
                       Grids(limit[1], total),
                       high,
                       high + sums.numel() / 2};
    part.add();
  });
}

Tensor cluster_sums(const Tensor& x,
                    const Tensor& indices,
                    int64_t num_codes,
                    std::optional<Tensor> weights,
                    std::optional<Tensor> scale,
                    const Tensor& limits,
                    int64_t total) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(num_codes > 0, "num_codes must be positive");
  Tensor sums = torch::stable::new_zeros(x, {2, num_codes, x.size(1) + 1}, ScalarType::Double);
  cluster_sums_add(sums, x, indices, std::nullopt, weights, scale, limits, total);
  return sums;
}

// Means [K, D] of such sums, the code of `otherwise` where a code has no weight.
Tensor cluster_means(const Tensor& sums, const Tensor& otherwise) {
  check_sums(sums);
  const int64_t codes = sums.size(1), dim = sums.size(2) - 1;
  STD_TORCH_CHECK(otherwise.dim() == 2 && otherwise.size(0) == codes && otherwise.size(1) == dim &&
                      otherwise.is_contiguous(),
                  "otherwise must be [K, D], contiguous");
  Tensor means = torch::stable::empty_like(otherwise);
  const double* const high = static_cast<const double*>(sums.data_ptr());
  const double* const low = high + sums.numel() / 2;
  const auto fill = [&]<class T>(T* out, const T* kept) {
    torch::stable::parallel_for(0, codes, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * (dim + 1);
        const double mass = high[first + dim] + low[first + dim];
        for (int64_t d = 0; d < dim; ++d)
          out[k * dim + d] =
              mass == 0 ? kept[k * dim + d] : T((high[first + d] + low[first + d]) / mass);
      }
    });
  };
  if (otherwise.scalar_type() == ScalarType::Double) {
    fill(static_cast<double*>(means.data_ptr()), static_cast<const double*>(otherwise.data_ptr()));
  } else {
    STD_TORCH_CHECK(otherwise.scalar_type() == ScalarType::Float,
                    "otherwise must be float32 or float64");
    fill(static_cast<float*>(means.data_ptr()), static_cast<const float*>(otherwise.data_ptr()));
  }
  return means;
}

constexpr int kParts = 16;

template <class T>
struct Distances {
  const Positions<T> x;
  const OpMath<T>* codebook;  // [K, D], or null for a code of zeros
  const int64_t* indices;     // [outer, inner]
  const OpMath<T>* scale;     // [outer, inner], or null for ones
  const bool* mask;           // [outer, inner], or null
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

// Squared distance [outer, inner] of scale * x to the code of its index, infinity where the mask is
// False; without a codebook, the norm of scale * x.
Tensor cluster_distances(const Tensor& x,
                         std::optional<Tensor> codebook,
                         std::optional<Tensor> indices,
                         std::optional<Tensor> scale,
                         std::optional<Tensor> mask) {
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
  if (mask.has_value())
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == x.size(0) * x.size(2),
                    "mask must be [outer, inner], bool, contiguous");
  const auto factors = per_position(scale, x);
  Tensor distances = torch::stable::new_empty(x, {x.size(0), x.size(2)}, type);
  with_types(x, x, [&]<class T, class C>(T*, C*) {
    const Distances<T> part{
        Positions<T>(x),           data_of<OpMath<T>>(codebook),
        data_of<int64_t>(indices), data_of<OpMath<T>>(factors),
        data_of<bool>(mask),       static_cast<OpMath<T>*>(distances.data_ptr())};
    torch::stable::parallel_for(0, part.x.count(), 256, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        part.out[p] = part.mask && !part.mask[p]
                          ? OpMath<T>(INFINITY)
                          : OpMath<T>(part.codebook ? part.of(p) : std::sqrt(part.of(p)));
    });
  });
  return distances;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("cluster_sums", TORCH_BOX(&genperf::cluster_sums));
  m.impl("cluster_sums_add", TORCH_BOX(&genperf::cluster_sums_add));
  m.impl("cluster_means", TORCH_BOX(&genperf::cluster_means));
  m.impl("cluster_distances", TORCH_BOX(&genperf::cluster_distances));
}
