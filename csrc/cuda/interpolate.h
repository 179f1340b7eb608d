// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "samples.h"

namespace genperf {

// T is the dtype of real, fake and mixed.
struct InterpolateParams {
  SampleInput real;
  SampleInput fake;     // if absent, real is perturbed by uniform noise
  const float* scale;   // [], of the noise, or null
  const float* weight;  // [B], or null if drawn
  Seed seed;            // unless nothing is drawn
  SampleOutput mixed;
  SampleShape shape;
};

struct InterpolateBackwardParams {
  SampleInput grad_mixed;
  SampleInput real;  // given with fake for the gradient of the weight, else absent
  SampleInput fake;
  const float* weight;  // [B], or null if drawn
  Seed seed;            // unless weight is given
  SampleOutput grad_real;
  SampleOutput grad_fake;
  double* partials;    // [interpolate_backward_partials()]
  unsigned* ticket;    // [], zero before and after
  float* grad_weight;  // [B], or null if not wanted
  SampleShape shape;
};

int64_t interpolate_backward_partials(InterpolateBackwardParams params, DType type);
void launch_interpolate(InterpolateParams params, DType type, cudaStream_t stream);
void launch_interpolate_backward(InterpolateBackwardParams params, DType type, cudaStream_t stream);

}  // namespace genperf
