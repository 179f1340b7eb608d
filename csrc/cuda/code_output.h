// SPDX-License-Identifier: Apache-2.0
//
// What the sums of code_sums.h are stored as: float32, or the gradient of a codebook.
#pragma once

#include "code_statistics.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kMaxChannels = 128;  // of a block

template <typename T>
constexpr int kWidthOf = 16 / sizeof(T);

enum class Mode { kPlain, kSubtract, kWeighted, kResidual };

// One launch of code_sums_kernel, for the codes of levels first_level ... last_level - 1.
struct SumsParams {
  CodeStatisticsParams all;
  const void* rows;  // [outer, channels, inner], T: x, or a slice of channels of it
  Strides strides;
  int64_t inner;
  int64_t first_channel;
  int64_t last_channel;
  const CodeEntry* order;
  const uint32_t* offsets;
  double* partials;   // [slices, chunks, 2, kMaxChannels + 1]
  uint32_t* tickets;  // [slices, chunks], zeros before and after
  int64_t first_level;
  int64_t last_level;
  int64_t chunks;
  int64_t rows_per_team;
  int lanes;
  bool vectorizable;
  bool codes_float32;
  bool codes_vectorizable;
  bool sums_float32;
  bool sums_vectorizable;
};

// Writes the results of codes.
template <typename T>
struct Output {
  const SumsParams& p;
  float elements;  // of the mean whose gradient is computed

  __device__ explicit Output(const SumsParams& params) : p(params), elements(1.0f) {
    if (p.all.grad != nullptr) {
      const int64_t valid = *p.all.valid > 1 ? *p.all.valid : 1;
      elements = static_cast<float>(valid * p.all.channels);
    }
  }

  __device__ uint32_t level_of(uint32_t code) const {
    return p.all.levels == 1 ? 0 : code / static_cast<uint32_t>(p.all.num_codes);
  }

  // kWidth components of a code, of which `count` exist.
  template <int kWidth>
  __device__ Pack<float, kWidth> origin(uint32_t code, int64_t channel, int64_t count) const {
    const int64_t level = level_of(code);
    const int64_t stride = p.all.code_channel_stride;
    const int64_t offset = level * p.all.codebook_stride +
                           (code - level * p.all.num_codes) * p.all.code_stride + channel * stride;
    const bool vectorizable = p.codes_vectorizable && kWidth > 1;
    if (p.codes_float32)
      return load_pack<float, kWidth>(static_cast<const float*>(p.all.codebooks) + offset, stride,
                                      count, vectorizable);
    const auto narrow = load_pack<T, kWidth>(static_cast<const T*>(p.all.codebooks) + offset,
                                             stride, count, vectorizable);
    Pack<float, kWidth> wide;
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      wide.values[i] = to_float(narrow.values[i]);
    return wide;
  }

  // Stores the sums of kWidth channels, of which `count` exist.
  template <int kWidth>
  __device__ void store(uint32_t code,
                        int64_t channel,
                        int64_t count,
                        const double (&sums)[kWidth]) const {
    const bool scaled = p.all.grad != nullptr;
    const float scale = scaled ? p.all.grad[level_of(code)] * p.all.factor / elements : 1.0f;
    const int64_t place = code * p.all.channels + channel;
    Pack<float, kWidth> wide;
    Pack<T, kWidth> narrow;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      wide.values[i] = static_cast<float>(sums[i]);
      if (scaled)
        wide.values[i] *= scale;
      narrow.values[i] = convert<T>(wide.values[i]);
    }
    const bool vectorizable = p.sums_vectorizable && kWidth > 1;
    if (p.sums_float32) {
      store_pack(static_cast<float*>(p.all.sums) + place, 1, count, vectorizable, wide);
    } else {
      store_pack(static_cast<T*>(p.all.sums) + place, 1, count, vectorizable, narrow);
    }
  }
};

}  // namespace genperf

#endif
