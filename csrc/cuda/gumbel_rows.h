// SPDX-License-Identifier: Apache-2.0
//
// The logits, gradients and noise of a position of gumbel_sample.
#pragma once

#include <cfloat>
#include <cmath>

#include "noise.h"
#include "positions.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

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

  // kFull says that there are kWidth classes, and that vectorizable is true.
  template <bool kFull = false, int kWidth>
  __device__ void load(int64_t k, int64_t count, float (&values)[kWidth]) const {
    using Element = std::remove_const_t<T>;
    const auto pack =
        load_pack<Element, kWidth>(data + k * stride, stride, count, kFull || vectorizable);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      values[j] = to_float(pack.values[j]);
  }

  template <bool kFull = false, int kWidth>
  __device__ void store(int64_t k, int64_t count, const float (&values)[kWidth]) const {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      pack.values[j] = convert<T>(values[j]);
    store_pack(data + k * (kFull ? 1 : stride), stride, count, kFull || vectorizable, pack);
  }
};

// Adds the noise of classes k, k + 1, ... of a row of noise to the logits.
template <int kWidth>
__device__ void add_drawn(uint32_t k,
                          int64_t row,
                          const Keys& keys,
                          const float (&logits)[kWidth],
                          float (&perturbed)[kWidth]) {
#pragma unroll
  for (int first = 0; first < kWidth; first += 4) {
    const auto words = random_words<Scalar>((k + first) / 4, 0, static_cast<uint32_t>(row),
                                            static_cast<uint32_t>(row >> 32), keys);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      perturbed[first + j] = logits[first + j] + gumbel<Scalar>(words.word[j]);
  }
}

// The noise of a position, given or drawn.
template <typename T>
struct Noise {
  const T* values = nullptr;
  const float* float32_values = nullptr;
  int64_t stride;
  int64_t row;
  uint64_t seed;
  bool vectorizable;

  template <typename Params>
  __device__ Noise(const Params& p, int64_t position, bool vectorizable_)
      : stride(p.noise_strides.channel),
        row(p.seed.first + position),
        seed(p.noise == nullptr ? value_of(p.seed) : 0),
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
      add_drawn(static_cast<uint32_t>(k), row, seed, logits, perturbed);
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

}  // namespace genperf

#endif
