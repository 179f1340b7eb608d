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

}  // namespace genperf

#endif
