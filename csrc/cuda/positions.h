// SPDX-License-Identifier: Apache-2.0
//
// Shared by the kernels over positions. Their tensors are [outer, channels, inner] with any
// strides, and a position is a pair (outer, inner).
#pragma once

#include "launch.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

// Whether each group of `width` channels is contiguous and aligned to 16 bytes.
inline bool channels_vectorizable(const void* data,
                                  int64_t outer,
                                  int64_t channels,
                                  int64_t inner,
                                  Strides strides,
                                  int width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && channels % width == 0 &&
         strides.channel == 1 && (outer == 1 || strides.outer % width == 0) &&
         (inner == 1 || strides.inner % width == 0);
}

__device__ inline int64_t offset_of(int64_t position, int64_t inner, Strides strides) {
  if (inner == 1)
    return position * strides.outer;
  return position / inner * strides.outer + position % inner * strides.inner;
}

// Division of numbers below 2^31 by a constant.
struct FastDivisor {
  uint32_t divisor;
  uint32_t factor;  // 2^(31 + shift) / divisor, rounded up
  int shift;        // log2(divisor), rounded up

  static FastDivisor of(int64_t divisor) {
    FastDivisor fast{static_cast<uint32_t>(divisor), 0, 0};
    while (int64_t{1} << fast.shift < divisor)
      ++fast.shift;
    fast.factor =
        static_cast<uint32_t>(((uint64_t{1} << (31 + fast.shift)) + divisor - 1) / divisor);
    return fast;
  }

  __device__ uint32_t divide(uint32_t number) const {
    return static_cast<uint32_t>(uint64_t{number} * factor >> (31 + shift));
  }
};

__device__ inline int64_t offset_of(uint32_t position, const FastDivisor& inner, Strides strides) {
  if (inner.divisor == 1)
    return position * strides.outer;
  const uint32_t outer = inner.divide(position);
  return outer * strides.outer + (position - outer * inner.divisor) * strides.inner;
}

}  // namespace genperf

#endif
