// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "samples.h"

namespace genperf {

// T is the dtype of the gradients.
struct GradientNormPenaltyParams {
  SampleInput gradients;
  double* partials;  // [gradient_norm_penalty_partials()]
  unsigned* ticket;  // [], zero before and after
  float* norms;      // [B]
  float* penalty;    // []
  SampleShape shape;
  float center;
  bool one_sided;
};

struct GradientNormPenaltyBackwardParams {
  const float* grad_penalty;  // []
  SampleInput gradients;
  const float* norms;  // [B]
  SampleOutput grad_gradients;
  SampleShape shape;
  float center;
  bool one_sided;
};

int64_t gradient_norm_penalty_partials(GradientNormPenaltyParams params, DType type);
void launch_gradient_norm_penalty(GradientNormPenaltyParams params,
                                  DType type,
                                  cudaStream_t stream);
void launch_gradient_norm_penalty_backward(GradientNormPenaltyBackwardParams params,
                                           DType type,
                                           cudaStream_t stream);

}  // namespace genperf
