// SPDX-License-Identifier: Apache-2.0
//
// One pass over the moments, with the noise drawn into a buffer that stays in the L1 cache. Samples
// are cut into blocks that do not depend on the number of threads. The KL is summed in float32
// within a segment and in float64 above, so it is the same in every run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/draw.h"
#include "cpu/common/elements.h"
#include "cpu/common/outputs.h"

namespace genperf {
namespace {

constexpr int64_t kSegment = 512;  // elements of one row that are processed at a time
constexpr int64_t kBlock = 4096;   // elements per block, approximately

// The partition of [B, rows, columns] into blocks.
struct Blocks {
  int64_t samples, rows, columns;
  int64_t block_rows, block_columns;
  int64_t per_row, per_sample;  // blocks

  explicit Blocks(const Tensor& x) : samples(x.size(0)), rows(x.size(1)), columns(x.size(2)) {
    // If rows are closer in memory than columns, blocks are narrow, so that all rows are read while
    // their shared cache lines are in cache.
    block_columns = std::min(columns, x.stride(1) < x.stride(2) ? kSegment / 4 : kBlock);
    block_rows = std::min(rows, std::max<int64_t>(1, kBlock / std::max<int64_t>(block_columns, 1)));
    per_row = block_columns ? (columns + block_columns - 1) / block_columns : 0;
    per_sample = block_rows ? (rows + block_rows - 1) / block_rows * per_row : 0;
  }

  // Calls f(block, sample, row, column, count) for every segment, in order within a block.
  template <class F>
  void for_each_segment(const F& f) const {
    const int64_t elements = block_rows * block_columns;
    const int64_t grain = std::max<int64_t>(1, 4 * kBlock / std::max<int64_t>(elements, 1));
    torch::stable::parallel_for(0, samples * per_sample, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t sample = block / per_sample, rest = block % per_sample;
        const int64_t first_row = rest / per_row * block_rows;
        const int64_t first_column = rest % per_row * block_columns;
        const int64_t last_column = std::min(columns, first_column + block_columns);
        for (int64_t row = first_row; row < std::min(rows, first_row + block_rows); ++row)
          for (int64_t c = first_column; c < last_column; c += kSegment)
            f(block, sample, row, c, std::min(kSegment, last_column - c));
      }
    });
  }
};

// The inputs of both passes, or the gradients.
template <class T>
struct Moments {
  Rows<T> mean, logvar, prior_mean, prior_logvar, noise;

  Moments at(int64_t sample, int64_t row, int64_t column) const {
    return {mean.at(sample, row, column), logvar.at(sample, row, column),
            prior_mean.at(sample, row, column), prior_logvar.at(sample, row, column),
            noise.at(sample, row, column)};
  }

  bool vectorizable() const {
    return mean.vectorizable() && logvar.vectorizable() && prior_mean.vectorizable_expanded() &&
           prior_logvar.vectorizable_expanded() && noise.vectorizable();
  }
};

inline Vec clamp(Vec logvar) {
  logvar = logvar < -30.0f ? broadcast(-30.0f) : logvar;
  return logvar > 20.0f ? broadcast(20.0f) : logvar;
}

inline Vec where_inside(Vec logvar, Vec value) {
  return (logvar >= -30.0f) & (logvar <= 20.0f) ? value : Vec{};
}

// The KL of a vector of elements and its derivatives.
template <bool kPrior>
struct Divergence {
  Vec value, mean, logvar,
      prior_logvar;  // the derivative with respect to the prior's mean is -mean

  // lv_expm1 is the variance minus 1, without cancellation where the variance is near 1.
  Divergence(Vec m, Vec lv, Vec lv_expm1, Vec prior_m, Vec prior_lv) {
    if constexpr (kPrior) {
      const Vec difference = m - prior_m, ratio = lv - prior_lv;
      const Vec scaled = difference * exp<Simd>(-prior_lv);
      const Vec ratio_expm1 = ExpParts<Simd>(ratio).expm1();
      value = 0.5f * fma(difference, scaled, ratio_expm1 - ratio);
      mean = scaled;
      logvar = 0.5f * ratio_expm1;
      prior_logvar = -0.5f * fma(difference, scaled, ratio_expm1);
    } else {
      value = 0.5f * fma(m, m, lv_expm1 - lv);
      mean = m;
      logvar = 0.5f * lv_expm1;
    }
  }
};

template <bool kPrior, class T>
void sample_segment(const Moments<T>& in,
                    const float* drawn,
                    float free_bits,
                    const Rows<T>& out,
                    int64_t count,
                    double& kl) {
  Vec sums{};
  for_each_vector(count, in.vectorizable() && out.vectorizable(), [&](int64_t i, auto n) {
    const Vec m = in.mean.get(i, n), lv = clamp(in.logvar.get(i, n));
    const ExpAndRoot<Simd> variance(lv);
    const Vec z = drawn ? load(drawn + i) : in.noise.get(i, n);
    out.set(i, n, fma(variance.root, z, m));
    Vec prior_m{}, prior_lv{};
    if constexpr (kPrior) {
      prior_m = in.prior_mean.get_expanded(i, n);
      prior_lv = clamp(in.prior_logvar.get_expanded(i, n));
    }
    Vec divergence = Divergence<kPrior>(m, lv, variance.expm1, prior_m, prior_lv).value;
    if (free_bits > 0)
      divergence = divergence < free_bits ? broadcast(free_bits) : divergence;
    for (int lane = n; lane < kLanes; ++lane)
      divergence[lane] = 0;
    sums += divergence;
  });
  kl += sum(sums);
}

template <bool kPrior, class T>
void backward_segment(const Moments<T>& in,
                      const float* drawn,
                      float free_bits,
                      const Rows<T>& grad_sample,
                      const float* grad_kl,
                      const Moments<T>& out,
                      int64_t count) {
  const bool vectorizable =
      in.vectorizable() && out.vectorizable() && grad_sample.vectorizable_expanded();
  for_each_vector(count, vectorizable, [&](int64_t i, auto n) {
    const Vec m = in.mean.get(i, n), raw = in.logvar.get(i, n), lv = clamp(raw);
    const ExpAndRoot<Simd> variance(lv);
    Vec grad_mean{}, grad_logvar{}, grad_prior_mean{}, grad_prior_logvar{};
    if (grad_kl) {
      Vec prior_m{}, prior_raw{};
      if constexpr (kPrior) {
        prior_m = in.prior_mean.get_expanded(i, n);
        prior_raw = in.prior_logvar.get_expanded(i, n);
      }
      const Divergence<kPrior> kl(m, lv, variance.expm1, prior_m, clamp(prior_raw));
      Vec kl_grad = broadcast(*grad_kl);
      if (free_bits > 0)
        kl_grad = kl.value < free_bits ? Vec{} : kl_grad;
      grad_mean = kl_grad * kl.mean;
      grad_logvar = kl_grad * kl.logvar;
      if constexpr (kPrior) {
        grad_prior_mean = -grad_mean;
        grad_prior_logvar = where_inside(prior_raw, kl_grad * kl.prior_logvar);
      }
    }
    if constexpr (kPrior) {
      out.prior_mean.set(i, n, grad_prior_mean);
      out.prior_logvar.set(i, n, grad_prior_logvar);
    }
    if (grad_sample) {
      const Vec g = grad_sample.get_expanded(i, n);
      const Vec z = drawn ? load(drawn + i) : in.noise.get(i, n);
      grad_mean += g;
      grad_logvar = fma(0.5f * g, variance.root * z, grad_logvar);
    }
    out.mean.set(i, n, grad_mean);
    out.logvar.set(i, n, where_inside(raw, grad_logvar));
  });
}

void check_inputs(const Tensor& mean,
                  const Tensor& logvar,
                  const std::optional<Tensor>& prior_mean,
                  const std::optional<Tensor>& prior_logvar,
                  const std::optional<Tensor>& noise,
                  const std::optional<Tensor>& seed) {
  check_rows(mean, mean, true, "mean");
  check_rows(logvar, mean, true, "logvar");
  STD_TORCH_CHECK(prior_mean.has_value() == prior_logvar.has_value(),
                  "prior_mean and prior_logvar must both be given, or neither");
  if (prior_mean.has_value()) {
    check_rows(*prior_mean, mean, true, "prior_mean");
    check_rows(*prior_logvar, mean, true, "prior_logvar");
  }
  STD_TORCH_CHECK(noise.has_value() || seed.has_value(), "noise or a seed must be given");
  if (noise.has_value())
    check_rows(*noise, mean, false, "noise");
}

std::tuple<Tensor, Tensor> gaussian_sample(const Tensor& mean,
                                           const Tensor& logvar,
                                           std::optional<Tensor> prior_mean,
                                           std::optional<Tensor> prior_logvar,
                                           std::optional<Tensor> noise,
                                           std::optional<Tensor> seed,
                                           int64_t first,
                                           double free_bits,
                                           bool float32_sample) {
  check_inputs(mean, logvar, prior_mean, prior_logvar, noise, seed);
  const uint64_t key = seed_of(seed);
  Tensor sample = output_like(mean);
  if (float32_sample)
    sample = torch::stable::to(sample, ScalarType::Float);
  Tensor kl = torch::stable::new_empty(mean, {mean.size(0)}, ScalarType::Float);
  const Blocks blocks(mean);
  std::vector<double> partial(blocks.samples * blocks.per_sample);
  with_type(mean, [&]<class T>(T*) {
    const Moments<T> in{Rows<T>(mean), Rows<T>(logvar), Rows<T>(prior_mean), Rows<T>(prior_logvar),
                        Rows<T>(noise)};
    const Rows<T> out(sample);
    blocks.for_each_segment(
        [&](int64_t block, int64_t b, int64_t row, int64_t column, int64_t count) {
          alignas(64) float buffer[kSegment + kDrawn + 4];
          const float* drawn =
              in.noise ? nullptr
                       : draw_normals(key, first + b, row * blocks.columns + column, count, buffer);
          const auto segment = in.prior_mean ? sample_segment<true, T> : sample_segment<false, T>;
          segment(in.at(b, row, column), drawn, float(free_bits), out.at(b, row, column), count,
                  partial[block]);
        });
  });
  float* total = static_cast<float*>(kl.mutable_data_ptr());
  for (int64_t b = 0; b < blocks.samples; ++b) {
    double value = 0;
    for (int64_t i = 0; i < blocks.per_sample; ++i)
      value += partial[b * blocks.per_sample + i];
    total[b] = float(value);
  }
  return {sample, kl};
}

void gaussian_sample_backward(Tensor grad_mean,
                              Tensor grad_logvar,
                              std::optional<Tensor> grad_prior_mean,
                              std::optional<Tensor> grad_prior_logvar,
                              std::optional<Tensor> grad_sample,
                              std::optional<Tensor> grad_kl,
                              const Tensor& mean,
                              const Tensor& logvar,
                              std::optional<Tensor> prior_mean,
                              std::optional<Tensor> prior_logvar,
                              std::optional<Tensor> noise,
                              std::optional<Tensor> seed,
                              int64_t first,
                              double free_bits) {
  check_inputs(mean, logvar, prior_mean, prior_logvar, noise, seed);
  check_rows(grad_mean, mean, true, "grad_mean");
  check_rows(grad_logvar, mean, true, "grad_logvar");
  STD_TORCH_CHECK(grad_prior_mean.has_value() == prior_mean.has_value() &&
                      grad_prior_logvar.has_value() == prior_mean.has_value(),
                  "the gradients of both moments of the prior must be given, or neither");
  if (prior_mean.has_value()) {
    check_rows(*grad_prior_mean, mean, true, "grad_prior_mean");
    check_rows(*grad_prior_logvar, mean, true, "grad_prior_logvar");
  }
  if (grad_sample.has_value())
    check_rows(*grad_sample, mean, false, "grad_sample");
  if (grad_kl.has_value())
    STD_TORCH_CHECK(grad_kl->scalar_type() == ScalarType::Float && grad_kl->dim() == 1 &&
                        grad_kl->size(0) == mean.size(0),
                    "grad_kl must be float32 [B]");
  use_huge_pages(grad_mean);
  use_huge_pages(grad_logvar);
  const uint64_t key = seed_of(seed);
  const Blocks blocks(mean);
  with_type(mean, [&]<class T>(T*) {
    const Moments<T> in{Rows<T>(mean), Rows<T>(logvar), Rows<T>(prior_mean), Rows<T>(prior_logvar),
                        Rows<T>(noise)};
    const Moments<T> out{Rows<T>(grad_mean), Rows<T>(grad_logvar), Rows<T>(grad_prior_mean),
                         Rows<T>(grad_prior_logvar), Rows<T>()};
    const Rows<T> upstream(grad_sample);
    const float* kl_grad =
        grad_kl.has_value() ? static_cast<const float*>(grad_kl->data_ptr()) : nullptr;
    const int64_t kl_grad_stride = grad_kl.has_value() ? grad_kl->stride(0) : 0;
    blocks.for_each_segment([&](int64_t, int64_t b, int64_t row, int64_t column, int64_t count) {
      alignas(64) float buffer[kSegment + kDrawn + 4];
      const float* drawn =
          in.noise || !upstream
              ? nullptr
              : draw_normals(key, first + b, row * blocks.columns + column, count, buffer);
      const auto segment = in.prior_mean ? backward_segment<true, T> : backward_segment<false, T>;
      segment(in.at(b, row, column), drawn, float(free_bits), upstream.at(b, row, column),
              kl_grad ? kl_grad + b * kl_grad_stride : nullptr, out.at(b, row, column), count);
    });
  });
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("gaussian_sample", TORCH_BOX(&genperf::gaussian_sample));
  m.impl("gaussian_sample_backward", TORCH_BOX(&genperf::gaussian_sample_backward));
}
