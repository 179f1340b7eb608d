// SPDX-License-Identifier: Apache-2.0
//
// Gumbel-softmax samples of categorical distributions, their KL divergence, and the gradients.
//
// A team of threads processes a position: adjacent threads if classes are contiguous in memory,
// otherwise one thread of each warp, with the lanes of a warp on adjacent positions. Forward is one
// pass with running maxima and sums of the logits and of the perturbed logits. The noise is never
// stored: backward draws it again. Where a team's registers hold the logits of a position, the
// kernels of gumbel_held.h draw it once per pass; those of this file, which take any number of
// classes and given noise, draw it again to write a soft sample.
#include "gumbel_sample.h"

#include <cmath>

#include "gumbel_held.h"
#include "gumbel_rows.h"
#include "gumbel_state.h"

namespace genperf {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxGumbelThreads)
    gumbel_sample_kernel(GumbelSampleParams p, GumbelTiling tiling, Vectorizable vectorizable) {
  constexpr int kWidth = kForwardWidth<T>;
  const GumbelThreadTile thread_tile(tiling);
  const int64_t positions = p.outer * p.inner;
  // Teams past the end take part in the merges of the others.
  const bool inside = thread_tile.position < positions;
  const int64_t position = inside ? thread_tile.position : 0;
  const int64_t first = thread_tile.lane * kWidth;
  const int64_t step = int64_t{tiling.team} * kWidth;
  const int64_t end = inside ? p.classes : 0;
  const Row<const T> row(static_cast<const T*>(p.logits), position, p.inner, p.logits_strides,
                         vectorizable.logits);
  const Noise<T> noise(p, position, vectorizable.noise);

  GumbelState state;
  state.inverse_tau = inverse_of(tau_of(p));
  for (int64_t k = first; k < end; k += step) {
    const int64_t count = end - k;
    float logits[kWidth], perturbed[kWidth];
    row.load(k, count, logits);
    noise.perturb(k, count, logits, perturbed);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      logits[j] = j < count ? logits[j] : -INFINITY;
      perturbed[j] = j < count ? perturbed[j] : -INFINITY;
    }
    state.add(logits, perturbed, static_cast<int32_t>(k));
  }
  state = team_merge(state, tiling);
  if (!inside)
    return;
  const float log_soft_sum = logf(state.soft_sum);
  if (thread_tile.lane == 0) {
    const float log_sum = logf(state.sum);
    p.indices[position] = state.index;
    p.kl[position] = state.weighted / state.sum + (logf(static_cast<float>(p.classes)) - log_sum);
    p.statistics[position] = state.largest;
    p.statistics[positions + position] = log_sum;
    p.statistics[2 * positions + position] = state.best;
    p.statistics[3 * positions + position] = log_soft_sum;
  }
  if (p.sample == nullptr)
    return;
  const Row<T> out(static_cast<T*>(p.sample), position, p.inner, p.sample_strides,
                   vectorizable.out);
  for (int64_t k = first; k < end; k += step) {
    const int64_t count = end - k;
    float values[kWidth];
    if (p.hard || tau_of(p) == 0) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        values[j] = k + j == state.index ? 1.0f : 0.0f;
    } else {
      row.load(k, count, values);
      noise.perturb(k, count, values, values);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        values[j] = expf((values[j] - state.best) * state.inverse_tau - log_soft_sum);
    }
    out.store(k, count, values);
  }
}

// One pass for the sums over the classes, one for the gradients.
template <typename T>
__global__ void __launch_bounds__(kMaxGumbelThreads)
    gumbel_sample_backward_kernel(GumbelSampleBackwardParams p,
                                  GumbelTiling tiling,
                                  Vectorizable vectorizable) {
  constexpr int kWidth = kBackwardWidth;
  const GumbelThreadTile thread_tile(tiling);
  const int64_t positions = p.outer * p.inner;
  const bool inside = thread_tile.position < positions;
  const int64_t position = inside ? thread_tile.position : 0;
  const int64_t first = thread_tile.lane * kWidth;
  const int64_t step = int64_t{tiling.team} * kWidth;
  const int64_t end = inside ? p.classes : 0;
  const Row<const T> row(static_cast<const T*>(p.logits), position, p.inner, p.logits_strides,
                         vectorizable.logits);
  const Row<const T> grad_row(static_cast<const T*>(p.grad_sample), position, p.inner,
                              p.grad_sample_strides, vectorizable.grad);
  const Row<T> out(static_cast<T*>(p.grad_logits), position, p.inner, p.grad_logits_strides,
                   vectorizable.out);
  const Noise<T> noise(p, position, vectorizable.noise);
  const float tau = tau_of(p);
  const float inverse_tau = inverse_of(tau);
  const bool soft = p.grad_sample != nullptr && tau != 0;
  const float grad_kl = p.grad_kl == nullptr ? 0.0f : p.grad_kl[position];
  const float largest = p.statistics[position];
  const float log_sum = p.statistics[positions + position];
  const float best = p.statistics[2 * positions + position];
  const float log_soft_sum = p.statistics[3 * positions + position];

  const auto load_soft = [&](int64_t k, int64_t count, const float (&logits)[kWidth],
                             float (&y)[kWidth], float (&grad)[kWidth]) {
    grad_row.load(k, count, grad);
    noise.perturb(k, count, logits, y);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      y[j] = expf((y[j] - best) * inverse_tau - log_soft_sum);
  };

  GumbelGradientSums sums;
  for (int64_t k = first; k < end; k += step) {
    const int64_t count = end - k;
    float logits[kWidth];
    row.load(k, count, logits);
    if (soft) {
      float y[kWidth], grad[kWidth];
      load_soft(k, count, logits, y, grad);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        sums.soft += j < count ? y[j] * grad[j] : 0.0f;
    }
    if (p.grad_kl != nullptr) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float log_q = logits[j] - largest - log_sum;
        const float q = expf(log_q);
        sums.entropy += j < count && q != 0 ? q * log_q : 0.0f;
      }
    }
  }
  sums = team_merge(sums, tiling);

  for (int64_t k = first; k < end; k += step) {
    const int64_t count = end - k;
    float logits[kWidth];
    float result[kWidth] = {};
    row.load(k, count, logits);
    if (soft) {
      float grad[kWidth];
      load_soft(k, count, logits, result, grad);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        result[j] = result[j] * (grad[j] - sums.soft) *
                    inverse_tau;  // 0 where y is 0, because of the order
    }
    if (p.grad_kl != nullptr) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float log_q = logits[j] - largest - log_sum;
        const float q = expf(log_q);
        result[j] += q != 0 ? grad_kl * q * (log_q - sums.entropy) : 0.0f;
      }
    }
    out.store(k, count, result);
  }
}

template <typename Params>
Vectorizable vectorizable_of(const Params& p,
                             const void* grad,
                             Strides grad_strides,
                             const void* out,
                             Strides out_strides,
                             int width) {
  const auto check = [&](const void* data, Strides strides) {
    return channels_vectorizable(data, p.outer, p.classes, p.inner, strides, width);
  };
  return {check(p.logits, p.logits_strides), check(p.noise, p.noise_strides),
          check(grad, grad_strides), check(out, out_strides)};
}

}  // namespace

void launch_gumbel_sample(const GumbelSampleParams& params, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "gumbel_sample";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = kForwardWidth<T>;
    const GumbelSampleParams& p = params;
    if (p.outer == 0 || p.inner == 0)
      return;
    const Vectorizable vectorizable =
        vectorizable_of(p, nullptr, Strides{}, p.sample, p.sample_strides, kWidth);
    const HeldTiling held = held_tiling_of(p.outer, p.classes, p.inner, p.logits_strides);
    if (p.noise == nullptr && held.fits) {
      const bool full =
          held.full && vectorizable.logits && (p.sample == nullptr || vectorizable.out);
      const auto kernel =
          full ? gumbel_sample_held_kernel<T, true> : gumbel_sample_held_kernel<T, false>;
      launch(kOp, kernel, held.tiling.blocks, held.tiling.positions * held.tiling.team,
             kMergeBytes<GumbelSums>, stream, p, held.tiling, vectorizable);
      return;
    }
    const GumbelTiling tiling = tiling_of(p.outer, p.classes, p.inner, p.logits_strides, kWidth);
    launch(kOp, gumbel_sample_kernel<T>, tiling.blocks, tiling.positions * tiling.team,
           kMergeBytes<GumbelState>, stream, p, tiling, vectorizable);
  });
}

void launch_gumbel_sample_backward(const GumbelSampleBackwardParams& params,
                                   DType type,
                                   cudaStream_t stream) {
  constexpr const char* kOp = "gumbel_sample_backward";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = kBackwardWidth;
    const GumbelSampleBackwardParams& p = params;
    if (p.outer == 0 || p.inner == 0)
      return;
    const Vectorizable vectorizable = vectorizable_of(p, p.grad_sample, p.grad_sample_strides,
                                                      p.grad_logits, p.grad_logits_strides, kWidth);
    const HeldTiling held = held_tiling_of(p.outer, p.classes, p.inner, p.logits_strides);
    if (p.noise == nullptr && held.fits) {
      const bool full = held.full && vectorizable.logits && vectorizable.out &&
                        (p.grad_sample == nullptr || vectorizable.grad);
      const auto kernel = full ? gumbel_sample_backward_held_kernel<T, true>
                               : gumbel_sample_backward_held_kernel<T, false>;
      launch(kOp, kernel, held.tiling.blocks, held.tiling.positions * held.tiling.team,
             kMergeBytes<GumbelGradientSums>, stream, p, held.tiling, vectorizable);
      return;
    }
    const GumbelTiling tiling = tiling_of(p.outer, p.classes, p.inner, p.logits_strides, kWidth);
    launch(kOp, gumbel_sample_backward_kernel<T>, tiling.blocks, tiling.positions * tiling.team,
           kMergeBytes<GumbelGradientSums>, stream, p, tiling, vectorizable);
  });
}

}  // namespace genperf
