// SPDX-License-Identifier: Apache-2.0
//
// One pass over the moments, with the noise drawn into a buffer that stays in the L1 cache. Samples
// are cut into blocks that do not depend on the number of threads. The KL is summed in float32
// within a segment and in float64 above, so it is the same in every run.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/common/draw.h"
#include "cpu/common/elements.h"

namespace genperf::gaussian {

constexpr int64_t kSegment = 512;  // elements of one row that are processed at a time
constexpr int64_t kBlock = 4096;   // elements per block, approximately

struct NoiseSource {
  uint64_t seed;
  int64_t first;  // number of the first sample
};

// The first 4 * kLanes numbers of kQuads rows, one row after the other.
inline void draw_normal_rows(uint64_t seed, int64_t row, float* out) {
  const PairKeys keys(seed);
  const Counters quads(0, quad_of_lane());
  const auto low = several<kQuads>([&](int) { return quads.low; });
  const auto high = several<kQuads>([&](int) { return quads.high; });
  const auto words = lane_words<kQuads>(
      pairs_of(low), pairs_of(high), uniform_pairs<kQuads>([&](int i) { return row + i; }),
      uniform_pairs<kQuads>([&](int i) { return uint64_t(row + i) >> 32; }), keys);
  const Several<Vec, 4 * kQuads> values = normals_of(words);
  for (int n = 0; n < kQuads; ++n)
    in_order(
        {values.at[n], values.at[kQuads + n], values.at[2 * kQuads + n], values.at[3 * kQuads + n]},
        out + n * 4 * kLanes);
}

// The partition of [B, rows, columns] into blocks.
struct Blocks {
  int64_t samples, rows, columns;
  int64_t block_rows, block_columns;
  int64_t per_row, per_sample;  // blocks

  explicit Blocks(const Tensor& x)
      : Blocks(x.size(0), x.size(1), x.size(2), x.stride(1) < x.stride(2)) {}

  Blocks(int64_t samples, int64_t rows, int64_t columns, bool rows_are_closer)
      : samples(samples), rows(rows), columns(columns) {
    // If rows are closer in memory than columns, blocks are narrow, so that all rows are read while
    // their shared cache lines are in cache.
    block_columns = std::min(columns, rows_are_closer ? kSegment / 4 : kBlock);
    block_rows = std::min(rows, std::max<int64_t>(1, kBlock / std::max<int64_t>(block_columns, 1)));
    per_row = block_columns ? (columns + block_columns - 1) / block_columns : 0;
    per_sample = block_rows ? (rows + block_rows - 1) / block_rows * per_row : 0;
  }

  // Calls f(block, sample, row, column, count, noise) for every segment, in order within a block.
  // The noise is drawn, unless the source is null.
  template <class F>
  void for_each_segment(const NoiseSource* source, const F& f) const {
    const int64_t elements = block_rows * block_columns;
    const int64_t grain = std::max<int64_t>(1, 4 * kBlock / std::max<int64_t>(elements, 1));
    // Samples of one short row are drawn side by side.
    const bool joint = source && rows == 1 && columns <= 4 * kLanes;
    torch::stable::parallel_for(0, samples * per_sample, grain, [&](int64_t begin, int64_t end) {
      alignas(64) float buffer[kSegment + kDrawn + 4];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t sample = block / per_sample, rest = block % per_sample;
        if (joint) {
          const int64_t place = (block - begin) % kQuads;
          if (place == 0)
            draw_normal_rows(source->seed, source->first + sample, buffer);
          f(block, sample, 0, 0, columns, buffer + place * 4 * kLanes);
          continue;
        }
        const int64_t first_row = rest / per_row * block_rows;
        const int64_t first_column = rest % per_row * block_columns;
        const int64_t last_column = std::min(columns, first_column + block_columns);
        for (int64_t row = first_row; row < std::min(rows, first_row + block_rows); ++row)
          for (int64_t c = first_column; c < last_column; c += kSegment) {
            const int64_t count = std::min(kSegment, last_column - c);
            f(block, sample, row, c, count,
              source ? draw_normals(source->seed, source->first + sample, row * columns + c, count,
                                    buffer)
                     : nullptr);
          }
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

}  // namespace genperf::gaussian
