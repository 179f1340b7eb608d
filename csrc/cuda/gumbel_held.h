// SPDX-License-Identifier: Apache-2.0
//
// Kernels of gumbel_sample whose teams hold all classes of a position in registers, so that the
// noise is drawn once. First come the maxima of the logits and of the perturbed logits, then the
// sums of exponentials relative to them.
#pragma once

#include "gumbel_rows.h"
#include "gumbel_sample.h"
#include "gumbel_state.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kHeldClasses = 16;  // per thread
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 2^x with an error of about 2^-22, for sums only.
__device__ inline float approximate_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// The larger of two numbers, or NaN if either is.
__device__ inline float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return Scalar::at_least(a, b);  // the same instruction
#else
  return a != a || a > b ? a : b;
#endif
}

struct HeldTiling {
  GumbelTiling tiling;
  bool fits;  // whether the registers of a team hold a position
  bool full;  // whether the classes fill them exactly
};

inline HeldTiling held_tiling_of(int64_t outer, int64_t classes, int64_t inner, Strides strides) {
  HeldTiling held{};
  GumbelTiling& tiling = held.tiling;
  tiling.classes_fast = inner == 1 || classes == 1 || strides.channel <= strides.inner;
  tiling.team = 1;
  const int most = tiling.classes_fast ? kMaxGumbelThreads : kMaxGumbelThreads / kWarpSize;
  while (tiling.team < most && int64_t{tiling.team} * kHeldClasses < classes)
    tiling.team *= 2;
  held.fits = int64_t{tiling.team} * kHeldClasses >= classes;
  held.full = int64_t{tiling.team} * kHeldClasses == classes;
  set_positions(tiling, outer * inner);
  return held;
}

struct GumbelMaxima {
  float largest = -INFINITY;
  float best = -INFINITY;  // of the perturbed logits

  __device__ void merge(const GumbelMaxima& other) {
    largest = max_or_nan(largest, other.largest);
    best = max_or_nan(best, other.best);
  }
};

struct GumbelSums {
  float sum = 0;       // of e = exp(logit - largest)
  float weighted = 0;  // of e * (logit - largest) / log(2)
  float soft_sum = 0;  // of exp((perturbed - best) / tau)
  int32_t index = INT32_MAX;

  __device__ void merge(const GumbelSums& other) {
    sum += other.sum;
    weighted += other.weighted;
    soft_sum += other.soft_sum;
    index = index < other.index ? index : other.index;
  }
};

// kFull says that the classes fill the registers of the team exactly, and are read and written as
// vectors.
template <typename T, bool kFull>
__global__ void __launch_bounds__(kMaxGumbelThreads)
    gumbel_sample_held_kernel(GumbelSampleParams p,
                              GumbelTiling tiling,
                              Vectorizable vectorizable) {
  constexpr int kWidth = kForwardWidth<T>;
  constexpr int kUnits = kHeldClasses / kWidth;
  const GumbelThreadTile thread_tile(tiling);
  const int64_t positions = p.outer * p.inner;
  // Teams past the end take part in the merges of the others.
  const bool inside = thread_tile.position < positions;
  const int64_t position = inside ? thread_tile.position : 0;
  const int classes = static_cast<int>(p.classes);
  const int first = thread_tile.lane * kWidth;
  const int step = tiling.team * kWidth;
  const Row<const T> row(static_cast<const T*>(p.logits), position, p.inner, p.logits_strides,
                         vectorizable.logits);
  const Keys keys = value_of(p.seed);
  const int64_t noise_row = p.seed.first + position;

  float logits[kUnits][kWidth], perturbed[kUnits][kWidth];
  float best_of_unit[kUnits];
  GumbelMaxima maxima;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int k = first + u * step;
    if (kFull || k < classes) {
      row.template load<kFull>(k, classes - k, logits[u]);
      add_drawn(k, noise_row, keys, logits[u], perturbed[u]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (!kFull && k + j >= classes)
        logits[u][j] = perturbed[u][j] = -INFINITY;
      maxima.largest = max_or_nan(maxima.largest, logits[u][j]);
      best_of_unit[u] = j == 0 ? perturbed[u][0] : max_or_nan(best_of_unit[u], perturbed[u][j]);
    }
    maxima.best = max_or_nan(maxima.best, best_of_unit[u]);
  }
  maxima = team_merge(maxima, tiling);
  const float largest = maxima.largest;
  const float best = maxima.best;

  const float tau = tau_of(p);
  const float inverse_tau = inverse_of(tau);
  const float scale = fminf(inverse_tau * kLog2E, FLT_MAX);
  const bool soft = p.sample != nullptr && !p.hard && tau > 0;
  const float logit_base = base_of(largest);
  const float soft_base = base_of(best);
  GumbelSums sums;
#pragma unroll
  for (int u = kUnits - 1; u >= 0; --u) {
#pragma unroll
    for (int j = kWidth - 1; j >= 0; --j) {
      // Bounded from below, so that its product with a zero exponential is 0, for -inf too.
      const float exponent = Scalar::at_least((logits[u][j] - logit_base) * kLog2E, -127.0f);
      const float e = approximate_exp2(exponent);
      sums.sum += e;
      sums.weighted += e * exponent;
    }
    // The first of equals wins.
    if (!(best_of_unit[u] < best)) {
#pragma unroll
      for (int j = kWidth - 1; j >= 0; --j) {
        const float value = perturbed[u][j];
        sums.index = value == best || value != value ? first + u * step + j : sums.index;
      }
    }
  }
  if (soft) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        perturbed[u][j] = expf((perturbed[u][j] - soft_base) * inverse_tau);
        sums.soft_sum += perturbed[u][j];
      }
    }
  } else {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        sums.soft_sum += approximate_exp2((perturbed[u][j] - soft_base) * scale);
    }
  }
  __syncthreads();  // the merge of the maxima has read the shared memory
  sums = team_merge(sums, tiling);
  if (!inside)
    return;
  if (thread_tile.lane == 0) {
    const float log_sum = logf(sums.sum);
    p.indices[position] = sums.index;
    p.kl[position] =
        sums.weighted * kLn2 / sums.sum + (logf(static_cast<float>(p.classes)) - log_sum);
    p.statistics[position] = largest;
    p.statistics[positions + position] = log_sum;
    p.statistics[2 * positions + position] = best;
    p.statistics[3 * positions + position] = logf(sums.soft_sum);
  }
  if (p.sample == nullptr)
    return;
  const Row<T> out(static_cast<T*>(p.sample), position, p.inner, p.sample_strides,
                   vectorizable.out);
  const float inverse_sum = 1 / sums.soft_sum;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int k = first + u * step;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      perturbed[u][j] = soft ? perturbed[u][j] * inverse_sum : k + j == sums.index ? 1.0f : 0.0f;
    if (kFull || k < classes)
      out.template store<kFull>(k, classes - k, perturbed[u]);
  }
}

template <typename T, bool kFull>
__global__ void __launch_bounds__(kMaxGumbelThreads)
    gumbel_sample_backward_held_kernel(GumbelSampleBackwardParams p,
                                       GumbelTiling tiling,
                                       Vectorizable vectorizable) {
  constexpr int kWidth = kBackwardWidth;
  constexpr int kUnits = kHeldClasses / kWidth;
  const GumbelThreadTile thread_tile(tiling);
  const int64_t positions = p.outer * p.inner;
  const bool inside = thread_tile.position < positions;
  const int64_t position = inside ? thread_tile.position : 0;
  const int classes = static_cast<int>(p.classes);
  const int first = thread_tile.lane * kWidth;
  const int step = tiling.team * kWidth;
  const Row<const T> row(static_cast<const T*>(p.logits), position, p.inner, p.logits_strides,
                         vectorizable.logits);
  const Row<const T> grad_row(static_cast<const T*>(p.grad_sample), position, p.inner,
                              p.grad_sample_strides, vectorizable.grad);
  const Row<T> out(static_cast<T*>(p.grad_logits), position, p.inner, p.grad_logits_strides,
                   vectorizable.out);
  const float tau = tau_of(p);
  const float inverse_tau = inverse_of(tau);
  const bool soft = p.grad_sample != nullptr && tau != 0;
  const bool has_grad_kl = p.grad_kl != nullptr;
  const float grad_kl = has_grad_kl ? p.grad_kl[position] : 0.0f;
  const float largest = p.statistics[position];
  const float log_sum = p.statistics[positions + position];
  const float best = p.statistics[2 * positions + position];
  const float log_soft_sum = p.statistics[3 * positions + position];
  const Keys keys = value_of(p.seed);
  const int64_t noise_row = p.seed.first + position;

  float y[kUnits][kWidth];
  GumbelGradientSums sums;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int k = first + u * step;
    if (!kFull && k >= classes)
      continue;
    float logits[kWidth];
    row.template load<kFull>(k, classes - k, logits);
    if (soft) {
      float grad[kWidth];
      grad_row.template load<kFull>(k, classes - k, grad);
      add_drawn(k, noise_row, keys, logits, y[u]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        y[u][j] = expf((y[u][j] - best) * inverse_tau - log_soft_sum);
        sums.soft += kFull || k + j < classes ? y[u][j] * grad[j] : 0.0f;
      }
    }
    if (has_grad_kl) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float log_q = logits[j] - largest - log_sum;
        const float q = expf(log_q);
        sums.entropy += (kFull || k + j < classes) && q != 0 ? q * log_q : 0.0f;
      }
    }
  }
  sums = team_merge(sums, tiling);
  if (!inside)
    return;

#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int k = first + u * step;
    if (!kFull && k >= classes)
      continue;
    float result[kWidth] = {};
    if (soft) {
      float grad[kWidth];
      grad_row.template load<kFull>(k, classes - k, grad);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        result[j] = y[u][j] * (grad[j] - sums.soft) * inverse_tau;
    }
    if (has_grad_kl) {
      float logits[kWidth];
      row.template load<kFull>(k, classes - k, logits);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float log_q = logits[j] - largest - log_sum;
        const float q = expf(log_q);
        result[j] += q != 0 ? grad_kl * q * (log_q - sums.entropy) : 0.0f;
      }
    }
    out.template store<kFull>(k, classes - k, result);
  }
}

}  // namespace genperf

#endif
