// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.h"

namespace genperf {

// T is the dtype of all tensors.
struct MinibatchSimilarityParams {
  const void* features;  // [N, B, C], contiguous
  void* similarity;      // [N, B], contiguous
  int64_t samples;       // N
  int64_t kernels;       // B
  int64_t channels;      // C
};

struct MinibatchSimilarityBackwardParams {
  const void* grad_similarity;  // [N, B], contiguous
  const void* features;         // [N, B, C], contiguous
  void* grad_features;          // [N, B, C], contiguous
  int64_t samples;
  int64_t kernels;
  int64_t channels;
};

void launch_minibatch_similarity(const MinibatchSimilarityParams& params,
                                 DType type,
                                 cudaStream_t stream);
void launch_minibatch_similarity_backward(const MinibatchSimilarityBackwardParams& params,
                                          DType type,
                                          cudaStream_t stream);

}  // namespace genperf
