// SPDX-License-Identifier: Apache-2.0
//
// The assignment of threads to positions in gumbel_sample, and the state that a team accumulates
// over the classes.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "positions.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kGumbelThreads = 256;
constexpr int kMaxGumbelThreads = 512;

struct GumbelTiling {
  int team;       // threads per position, a power of two
  int positions;  // per block, a power of two
  int shift;      // log2 of team, or of positions unless classes_fast
  bool classes_fast;
  unsigned blocks;
};

// Sets the positions per block, and the number of blocks.
inline void set_positions(GumbelTiling& tiling, int64_t positions) {
  if (tiling.classes_fast) {
    tiling.positions = tiling.team < kGumbelThreads ? kGumbelThreads / tiling.team : 1;
  } else {
    tiling.positions =
        tiling.team < kGumbelThreads / kWarpSize ? kGumbelThreads / tiling.team : kWarpSize;
  }
  tiling.shift =
      std::countr_zero(static_cast<unsigned>(tiling.classes_fast ? tiling.team : tiling.positions));
  const int64_t blocks = (positions + tiling.positions - 1) / tiling.positions;
  if (blocks > INT32_MAX)
    throw std::runtime_error("gumbel_sample: too many positions");
  tiling.blocks = static_cast<unsigned>(blocks);
}

inline GumbelTiling tiling_of(int64_t outer,
                              int64_t classes,
                              int64_t inner,
                              Strides strides,
                              int width) {
  GumbelTiling tiling;
  tiling.classes_fast = inner == 1 || classes == 1 || strides.channel <= strides.inner;
  tiling.team = 1;
  const auto covers = [&](int units) { return int64_t{tiling.team} * width * units >= classes; };
  if (tiling.classes_fast) {
    while (tiling.team < kGumbelThreads && !covers(tiling.team < kWarpSize ? 1 : 4))
      tiling.team *= 2;
  } else {
    while (tiling.team < kMaxGumbelThreads / kWarpSize && !covers(4))
      tiling.team *= 2;
  }
  set_positions(tiling, outer * inner);
  return tiling;
}

struct GumbelThreadTile {
  int lane;  // in the team
  int64_t position;

  __device__ explicit GumbelThreadTile(const GumbelTiling& tiling) {
    const int high = static_cast<int>(threadIdx.x) >> tiling.shift;
    const int low = static_cast<int>(threadIdx.x) - (high << tiling.shift);
    lane = tiling.classes_fast ? low : high;
    position = int64_t{blockIdx.x} * tiling.positions + (tiling.classes_fast ? high : low);
  }
};

template <typename State>
struct StateWords {
  static constexpr int kCount = sizeof(State) / sizeof(uint32_t);
  uint32_t word[kCount];
};

// The merged states of a team. Every thread of the block takes part, and every member of a team
// gets the result.
template <typename State>
__device__ State team_merge(State state, const GumbelTiling& tiling) {
  using Words = StateWords<State>;
  Words words;
  if (tiling.classes_fast) {
    const int lanes = tiling.team < kWarpSize ? tiling.team : kWarpSize;
    for (int step = lanes / 2; step > 0; step /= 2) {
      std::memcpy(&words, &state, sizeof(state));
#pragma unroll
      for (int i = 0; i < Words::kCount; ++i)
        words.word[i] = __shfl_xor_sync(kFullWarp, words.word[i], step);
      State other;
      std::memcpy(static_cast<void*>(&other), &words, sizeof(state));
      state.merge(other);
    }
    if (tiling.team <= kWarpSize)
      return state;
  }
  auto& shared = shared_memory<uint32_t[Words::kCount][kMaxGumbelThreads]>();
  std::memcpy(&words, &state, sizeof(state));
#pragma unroll
  for (int i = 0; i < Words::kCount; ++i)
    shared[i][threadIdx.x] = words.word[i];
  __syncthreads();
  const int thread = threadIdx.x;
  const int first = tiling.classes_fast ? thread - thread % tiling.team : thread % tiling.positions;
  const int step = tiling.classes_fast ? kWarpSize : tiling.positions;
  const int members = tiling.classes_fast ? tiling.team / kWarpSize : tiling.team;
  State merged;
  for (int member = 0; member < members; ++member) {
#pragma unroll
    for (int i = 0; i < Words::kCount; ++i)
      words.word[i] = shared[i][first + member * step];
    std::memcpy(static_cast<void*>(&state), &words, sizeof(state));
    merged.merge(state);
  }
  return merged;
}

// What exponentials are relative to.
__device__ inline float base_of(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

// Running maxima of the logits and of the perturbed logits, with sums of exponentials relative to
// them. While all values are -inf, the sums are empty and relative to 0.
struct GumbelState {
  float largest = -INFINITY;
  float sum = 0;       // of e = exp(logit - largest)
  float weighted = 0;  // of e * (logit - largest)
  float best = -INFINITY;
  float soft_sum = 0;  // of exp((perturbed - best) / tau)
  int32_t index = INT32_MAX;
  float inverse_tau = 0;

  // Like torch.argmax: NaN is the largest, and the first of equals wins.
  __device__ void offer(float value, int32_t at) {
    const bool better =
        value > best || (value != value ? best == best || at < index : value == best && at < index);
    best = better ? value : best;
    index = better ? at : index;
  }

  // Bounded from below, so that its product with a zero exponential is 0, for -inf too.
  __device__ static float bounded(float exponent) { return exponent < -88.0f ? -88.0f : exponent; }

  __device__ void raise_largest(float maximum) {
    const float exponent = largest - base_of(maximum);
    const float factor = expf(exponent);
    weighted = factor * (weighted + bounded(exponent) * sum);
    sum *= factor;
    largest = maximum;
  }

  __device__ void raise_soft_sum(float earlier) {
    soft_sum *= expf((earlier - base_of(best)) * inverse_tau);
  }

  template <int kWidth>
  __device__ void add(const float (&logits)[kWidth], const float (&perturbed)[kWidth], int32_t at) {
    float maximum = largest;
    const float earlier = best;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      maximum = fmaxf(maximum, logits[j]);
      offer(perturbed[j], at + j);
    }
    raise_largest(maximum);
    raise_soft_sum(earlier);
    const float logit_base = base_of(largest);
    const float soft_base = base_of(best);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float exponent = logits[j] - logit_base;
      const float e = expf(exponent);
      sum += e;
      weighted += e * bounded(exponent);
      soft_sum += expf((perturbed[j] - soft_base) * inverse_tau);
    }
  }

  __device__ void merge(GumbelState other) {
    const float maximum = fmaxf(largest, other.largest);
    raise_largest(maximum);
    other.raise_largest(maximum);
    sum += other.sum;
    weighted += other.weighted;
    inverse_tau = other.inverse_tau;
    const float earlier = best;
    const float others = other.best;
    offer(other.best, other.index);
    other.best = best;
    raise_soft_sum(earlier);
    other.raise_soft_sum(others);
    soft_sum += other.soft_sum;
  }
};

struct GumbelGradientSums {
  float soft = 0;     // of y dy
  float entropy = 0;  // of q log q

  __device__ void merge(const GumbelGradientSums& other) {
    soft += other.soft;
    entropy += other.entropy;
  }
};

template <typename State>
constexpr size_t kMergeBytes = sizeof(uint32_t[StateWords<State>::kCount][kMaxGumbelThreads]);

}  // namespace genperf

#endif
