// SPDX-License-Identifier: Apache-2.0
//
// The last block of a launch finishes what the others have begun, in place of another launch.
#pragma once

#include "launch.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

// Whether all other blocks of the launch have come here. Of the block that comes last, every thread
// sees what the others wrote before, if it reads with __ldcg. The ticket is zero between launches.
__device__ inline bool is_last_block(unsigned* ticket) {
  auto& last = shared_memory<bool>();
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  const bool is_last = last;
  __syncthreads();  // the shared memory is used again
  __threadfence();
  return is_last;
}

}  // namespace genperf

#endif
