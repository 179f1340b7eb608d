// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.h"

namespace genperf {

// T is the dtype of logits. Noise is T or float32, and null if it is drawn. temperature, if not
// null, replaces tau.
struct GumbelSampleParams {
  const void* logits;        // [outer, K, inner], T
  const void* noise;         // [outer, K, inner]
  const float* temperature;  // []
  void* sample;              // [outer, K, inner], T, or null if not wanted
  int64_t* indices;          // [outer, inner], contiguous
  float* kl;                 // [outer, inner], contiguous
  float* statistics;         // [4, outer, inner], contiguous
  int64_t outer;
  int64_t classes;
  int64_t inner;
  Strides logits_strides;
  Strides noise_strides;
  Strides sample_strides;
  Seed seed;
  float tau;
  bool float32_noise;
  bool hard;
};

struct GumbelSampleBackwardParams {
  const void* grad_sample;  // [outer, K, inner], T, or null for zeros
  const float* grad_kl;     // [outer, inner], contiguous, or null for zeros
  const void* logits;       // [outer, K, inner], T
  const void* noise;        // [outer, K, inner]
  const float* temperature;
  const float* statistics;  // [4, outer, inner], contiguous
  void* grad_logits;        // [outer, K, inner], T
  int64_t outer;
  int64_t classes;
  int64_t inner;
  Strides grad_sample_strides;
  Strides logits_strides;
  Strides noise_strides;
  Strides grad_logits_strides;
  Seed seed;
  float tau;
  bool float32_noise;
};

void launch_gumbel_sample(const GumbelSampleParams& params, DType type, cudaStream_t stream);
void launch_gumbel_sample_backward(const GumbelSampleBackwardParams& params,
                                   DType type,
                                   cudaStream_t stream);

}  // namespace genperf
