// SPDX-License-Identifier: Apache-2.0
// Samples of categorical distributions by Gumbel noise, their KL divergence, and the gradients.
//
// A team of threads works on a position: neighboring threads where classes lie together in memory,
// else one of each warp while lanes are neighboring positions. Forward is one pass with running
// maxima and sums, of the logits and of the perturbed logits at once; the noise is drawn again
// where a pass over the soft sample follows and in the backward pass, never stored.
#include "gumbel_sample.h"

#include <cfloat>
#include <cmath>

#include "noise.h"
#include "positions.h"

namespace genperf {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxThreads = 512;

// Classes that a thread works on at a time.
template <typename T>
constexpr int kForwardWidth = 16 / sizeof(T);
constexpr int kBackwardWidth = 4;  // with 8 registers would leave half as many threads

struct Tiling {
  int team;       // threads to a position, a power of two
  int positions;  // of a block
  bool classes_fast;
  unsigned blocks;
};

Tiling tiling_of(int64_t outer, int64_t classes, int64_t inner, Strides strides, int width) {
  Tiling tiling;
  tiling.classes_fast = inner == 1 || classes == 1 || strides.channel <= strides.inner;
  tiling.team = 1;
  const auto covers = [&](int units) { return int64_t{tiling.team} * width * units >= classes; };
  if (tiling.classes_fast) {
    while (tiling.team < kThreads && !covers(tiling.team < kWarpSize ? 1 : 4))
      tiling.team *= 2;
    tiling.positions = kThreads / tiling.team;
  } else {
    while (tiling.team < kMaxThreads / kWarpSize && !covers(4))
      tiling.team *= 2;
    tiling.positions = tiling.team < kThreads / kWarpSize ? kThreads / tiling.team : kWarpSize;
  }
  const int64_t blocks = (outer * inner + tiling.positions - 1) / tiling.positions;
  if (blocks > INT32_MAX)
    throw std::runtime_error("gumbel_sample: too many positions");
  tiling.blocks = static_cast<unsigned>(blocks);
  return tiling;
}

struct Seat {
  int lane;  // in the team
  int64_t position;

  __device__ explicit Seat(const Tiling& tiling) {
    const int thread = threadIdx.x;
    lane = tiling.classes_fast ? thread % tiling.team : thread / tiling.positions;
    position = int64_t{blockIdx.x} * tiling.positions +
               (tiling.classes_fast ? thread / tiling.team : thread % tiling.positions);
  }
};

template <typename State>
struct StateWords {
  static constexpr int kCount = sizeof(State) / sizeof(uint32_t);
  uint32_t word[kCount];
};

// What the members of a team have, merged; every member holds it, every thread takes part.
template <typename State>
__device__ State team_merge(State state, const Tiling& tiling) {
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
  auto& shared = shared_memory<uint32_t[Words::kCount][kMaxThreads]>();
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

// Running maxima of the logits and of the perturbed logits, with sums of exponentials relative to
// them. Where all is -inf yet, sums are relative to 0, and empty.
struct Running {
  float largest = -INFINITY;
  float sum = 0;       // of e = exp(logit - largest)
  float weighted = 0;  // of e * (logit - largest)
  float best = -INFINITY;
  float soft_sum = 0;  // of exp((perturbed - best) / tau)
  int32_t index = INT32_MAX;
  float inverse_tau = 0;

  // As torch.argmax: NaN is the largest, of equals the first counts.
  __device__ void offer(float value, int32_t at) {
    const bool better =
        value > best || (value != value ? best == best || at < index : value == best && at < index);
    best = better ? value : best;
    index = better ? at : index;
  }

  __device__ static float base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

  // With an exponential of 0 this times it is 0, also for -inf.
  __device__ static float bounded(float exponent) { return exponent < -88.0f ? -88.0f : exponent; }

  __device__ void raise_largest(float maximum) {
    const float exponent = largest - base(maximum);
    const float factor = expf(exponent);
    weighted = factor * (weighted + bounded(exponent) * sum);
    sum *= factor;
    largest = maximum;
  }

  __device__ void raise_soft_sum(float earlier) {
    soft_sum *= expf((earlier - base(best)) * inverse_tau);
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
    const float logit_base = base(largest);
    const float soft_base = base(best);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float exponent = logits[j] - logit_base;
      const float e = expf(exponent);
      sum += e;
      weighted += e * bounded(exponent);
      soft_sum += expf((perturbed[j] - soft_base) * inverse_tau);
    }
  }

  __device__ void merge(Running other) {
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

struct Sums {
  float soft = 0;     // of y dy
  float entropy = 0;  // of q log q

  __device__ void merge(const Sums& other) {
    soft += other.soft;
    entropy += other.entropy;
  }
};

template <typename Params>
__device__ float tau_of(const Params& p) {
  return p.temperature == nullptr ? p.tau : *p.temperature;
}

// Finite, so that times 0 it is 0: at a tau of 0 the soft sample is the one-hot of the maximum.
__device__ float inverse_of(float tau) {
  return tau == 0 ? FLT_MAX : fminf(1 / tau, FLT_MAX);
}

struct Together {
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
  bool together;

  __device__ Row(T* all, int64_t position, int64_t inner, Strides strides, bool together_)
      : data(all == nullptr ? nullptr : all + offset_of(position, inner, strides)),
        stride(strides.channel),
        together(together_) {}

  template <int kWidth>
  __device__ void load(int64_t k, int64_t count, float (&values)[kWidth]) const {
    using Element = std::remove_const_t<T>;
    const auto pack = load_pack<Element, kWidth>(data + k * stride, stride, count, together);
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
    store_pack(data + k * stride, stride, count, together, pack);
  }
};

// The noise of a position: given, or drawn.
template <typename T>
struct Noise {
  const T* narrow = nullptr;
  const float* wide = nullptr;
  int64_t stride;
  int64_t position;
  uint64_t seed;
  bool together;

  template <typename Params>
  __device__ Noise(const Params& p, int64_t position_, bool together_)
      : stride(p.noise_strides.channel),
        position(position_),
        seed(p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed)),
        together(together_) {
    if (p.noise == nullptr)
      return;
    const int64_t offset = offset_of(position, p.inner, p.noise_strides);
    if (p.float32_noise) {
      wide = static_cast<const float*>(p.noise) + offset;
    } else {
      narrow = static_cast<const T*>(p.noise) + offset;
    }
  }

  // Adds the noise of classes k and on to the logits.
  template <int kWidth>
  __device__ void perturb(int64_t k,
                          int64_t count,
                          const float (&logits)[kWidth],
                          float (&perturbed)[kWidth]) const {
    if (wide != nullptr) {
      add(load_pack<float, kWidth>(wide + k * stride, stride, count, together), logits, perturbed);
    } else if (narrow != nullptr) {
      add(load_pack<T, kWidth>(narrow + k * stride, stride, count, together), logits, perturbed);
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
__global__ void __launch_bounds__(kMaxThreads)
    gumbel_sample_kernel(GumbelSampleParams p, Tiling tiling, Together together) {
  constexpr int kWidth = kForwardWidth<T>;
  const Seat seat(tiling);
  const int64_t positions = p.outer * p.inner;
  // Teams past the end take part in the merging of the others.
  const bool inside = seat.position < positions;
  const int64_t position = inside ? seat.position : 0;
  const int64_t first = seat.lane * kWidth;
  const int64_t step = int64_t{tiling.team} * kWidth;
  const int64_t end = inside ? p.classes : 0;
  const Row<const T> row(static_cast<const T*>(p.logits), position, p.inner, p.logits_strides,
                         together.logits);
  const Noise<T> noise(p, position, together.noise);

  Running running;
  running.inverse_tau = inverse_of(tau_of(p));
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
    running.add(logits, perturbed, static_cast<int32_t>(k));
  }
  running = team_merge(running, tiling);
  if (!inside)
    return;
  const float log_soft_sum = logf(running.soft_sum);
  if (seat.lane == 0) {
    const float log_sum = logf(running.sum);
    p.indices[position] = running.index;
    p.kl[position] =
        running.weighted / running.sum + (logf(static_cast<float>(p.classes)) - log_sum);
    p.statistics[position] = running.largest;
    p.statistics[positions + position] = log_sum;
    p.statistics[2 * positions + position] = running.best;
    p.statistics[3 * positions + position] = log_soft_sum;
  }
  if (p.sample == nullptr)
    return;
  const Row<T> out(static_cast<T*>(p.sample), position, p.inner, p.sample_strides, together.out);
  for (int64_t k = first; k < end; k += step) {
    const int64_t count = end - k;
    float values[kWidth];
    if (p.hard || tau_of(p) == 0) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        values[j] = k + j == running.index ? 1.0f : 0.0f;
    } else {
      row.load(k, count, values);
      noise.perturb(k, count, values, values);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        values[j] = expf((values[j] - running.best) * running.inverse_tau - log_soft_sum);
    }
    out.store(k, count, values);
  }
}

// Two passes: the sums that every class's gradient needs, then the gradients.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    gumbel_sample_backward_kernel(GumbelSampleBackwardParams p, Tiling tiling, Together together) {
  constexpr int kWidth = kBackwardWidth;
  const Seat seat(tiling);
  const int64_t positions = p.outer * p.inner;
  const bool inside = seat.position < positions;
  const int64_t position = inside ? seat.position : 0;
  const int64_t first = seat.lane * kWidth;
  const int64_t step = int64_t{tiling.team} * kWidth;
  const int64_t end = inside ? p.classes : 0;
  const Row<const T> row(static_cast<const T*>(p.logits), position, p.inner, p.logits_strides,
                         together.logits);
  const Row<const T> grad_row(static_cast<const T*>(p.grad_sample), position, p.inner,
                              p.grad_sample_strides, together.grad);
  const Row<T> out(static_cast<T*>(p.grad_logits), position, p.inner, p.grad_logits_strides,
                   together.out);
  const Noise<T> noise(p, position, together.noise);
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

  Sums sums;
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
        result[j] = result[j] * (grad[j] - sums.soft) * inverse_tau;  // in this order 0 where y is
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
Together together_of(const Params& p,
                     const void* grad,
                     Strides grad_strides,
                     const void* out,
                     Strides out_strides,
                     int width) {
  const auto check = [&](const void* data, Strides strides) {
    return groups_together(data, p.outer, p.classes, p.inner, strides, width);
  };
  return {check(p.logits, p.logits_strides), check(p.noise, p.noise_strides),
          check(grad, grad_strides), check(out, out_strides)};
}

template <typename State>
constexpr size_t kMergeBytes = sizeof(uint32_t[StateWords<State>::kCount][kMaxThreads]);

}  // namespace

void launch_gumbel_sample(const GumbelSampleParams& params, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "gumbel_sample";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = kForwardWidth<T>;
    const GumbelSampleParams& p = params;
    const Tiling tiling = tiling_of(p.outer, p.classes, p.inner, p.logits_strides, kWidth);
    if (tiling.blocks == 0)
      return;
    launch(kOp, gumbel_sample_kernel<T>, tiling.blocks, tiling.positions * tiling.team,
           kMergeBytes<Running>, stream, p, tiling,
           together_of(p, nullptr, Strides{}, p.sample, p.sample_strides, kWidth));
  });
}

void launch_gumbel_sample_backward(const GumbelSampleBackwardParams& params,
                                   DType type,
                                   cudaStream_t stream) {
  constexpr const char* kOp = "gumbel_sample_backward";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = kBackwardWidth;
    const GumbelSampleBackwardParams& p = params;
    const Tiling tiling = tiling_of(p.outer, p.classes, p.inner, p.logits_strides, kWidth);
    if (tiling.blocks == 0)
      return;
    launch(kOp, gumbel_sample_backward_kernel<T>, tiling.blocks, tiling.positions * tiling.team,
           kMergeBytes<Sums>, stream, p, tiling,
           together_of(p, p.grad_sample, p.grad_sample_strides, p.grad_logits,
                       p.grad_logits_strides, kWidth));
  });
}

}  // namespace genperf
