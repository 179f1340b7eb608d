// SPDX-License-Identifier: Apache-2.0
//
// Gumbel-softmax samples of categorical distributions, their KL divergence, and the gradients.
//
// A team of threads processes a position: adjacent threads if classes are contiguous in memory,
// otherwise one thread of each warp, with the lanes of a warp on adjacent positions. Forward is one
// pass with running maxima and sums of the logits and of the perturbed logits. The noise is never
// stored: the pass that writes a soft sample and the backward pass draw it again.
#include "gumbel_sample.h"

#include <cfloat>
#include <cmath>

#include "gumbel_state.h"
#include "noise.h"
#include "positions.h"

namespace genperf {
namespace {

// Classes per thread and step.
template <typename T>
constexpr int kForwardWidth = 16 / sizeof(T);
constexpr int kBackwardWidth = 4;  // 8 registers would halve the number of threads in flight

// A temperature that is negative or NaN counts as 0.
template <typename Params>
__device__ float tau_of(const Params& p) {
  const float tau = p.temperature == nullptr ? p.tau : *p.temperature;
  return tau > 0 ? tau : 0.0f;
}

// Finite, so that its product with 0 is 0: at tau = 0 the soft sample is the one-hot of the
// maximum.
__device__ float inverse_of(float tau) {
  return tau == 0 ? FLT_MAX : fminf(1 / tau, FLT_MAX);
}

struct Vectorizable {
  bool logits;
  bool noise;
  bool grad;
  bool out;
};

// The row of a position in a tensor.
template <typename T>
struct Row {
  T* data;
  int64_t stride;
  bool vectorizable;

  __device__ Row(T* all, int64_t position, int64_t inner, Strides strides, bool vectorizable_)
      : data(all == nullptr ? nullptr : all + offset_of(position, inner, strides)),
        stride(strides.channel),
        vectorizable(vectorizable_) {}

  template <int kWidth>
  __device__ void load(int64_t k, int64_t count, float (&values)[kWidth]) const {
    using Element = std::remove_const_t<T>;
    const auto pack = load_pack<Element, kWidth>(data + k * stride, stride, count, vectorizable);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      values[j] = to_float(pack.values[j]);
  }

  template <int kWidth>
  __device__ void store(int64_t k, int64_t count, const float (&values)[kWidth]) const {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      pack.values[j] = convert<T>(values[j]);
    store_pack(data + k * stride, stride, count, vectorizable, pack);
  }
};

// The noise of a position, given or drawn.
template <typename T>
struct Noise {
  const T* values = nullptr;
  const float* float32_values = nullptr;
  int64_t stride;
  int64_t position;
  uint64_t seed;
  bool vectorizable;

  template <typename Params>
  __device__ Noise(const Params& p, int64_t position_, bool vectorizable_)
      : stride(p.noise_strides.channel),
        position(position_),
        seed(p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed)),
        vectorizable(vectorizable_) {
    if (p.noise == nullptr)
      return;
    const int64_t offset = offset_of(position, p.inner, p.noise_strides);
    if (p.float32_noise) {
      float32_values = static_cast<const float*>(p.noise) + offset;
    } else {
      values = static_cast<const T*>(p.noise) + offset;
    }
  }

  // Adds the noise of classes k, k + 1, ... to the logits.
  template <int kWidth>
  __device__ void perturb(int64_t k,
                          int64_t count,
                          const float (&logits)[kWidth],
                          float (&perturbed)[kWidth]) const {
    if (float32_values != nullptr) {
      add(load_pack<float, kWidth>(float32_values + k * stride, stride, count, vectorizable),
          logits, perturbed);
    } else if (values != nullptr) {
      add(load_pack<T, kWidth>(values + k * stride, stride, count, vectorizable), logits,
          perturbed);
    } else {
#pragma unroll
      for (int first = 0; first < kWidth; first += 4) {
        const auto words = random_words<Scalar>(static_cast<uint32_t>((k + first) / 4), 0,
                                                static_cast<uint32_t>(position),
                                                static_cast<uint32_t>(position >> 32), seed);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          perturbed[first + j] = logits[first + j] + gumbel<Scalar>(words.word[j]);
      }
    }
  }

  template <typename Element, int kWidth>
  __device__ static void add(const Pack<Element, kWidth>& noise,
                             const float (&logits)[kWidth],
                             float (&perturbed)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      perturbed[j] = logits[j] + to_float(noise.values[j]);
  }
};

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
    const GumbelTiling tiling = tiling_of(p.outer, p.classes, p.inner, p.logits_strides, kWidth);
    if (tiling.blocks == 0)
      return;
    launch(kOp, gumbel_sample_kernel<T>, tiling.blocks, tiling.positions * tiling.team,
           kMergeBytes<GumbelState>, stream, p, tiling,
           vectorizable_of(p, nullptr, Strides{}, p.sample, p.sample_strides, kWidth));
  });
}

void launch_gumbel_sample_backward(const GumbelSampleBackwardParams& params,
                                   DType type,
                                   cudaStream_t stream) {
  constexpr const char* kOp = "gumbel_sample_backward";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = kBackwardWidth;
    const GumbelSampleBackwardParams& p = params;
    const GumbelTiling tiling = tiling_of(p.outer, p.classes, p.inner, p.logits_strides, kWidth);
    if (tiling.blocks == 0)
      return;
    launch(kOp, gumbel_sample_backward_kernel<T>, tiling.blocks, tiling.positions * tiling.team,
           kMergeBytes<GumbelGradientSums>, stream, p, tiling,
           vectorizable_of(p, p.grad_sample, p.grad_sample_strides, p.grad_logits,
                           p.grad_logits_strides, kWidth));
  });
}

}  // namespace genperf
