// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "samples.h"

namespace genperf {

// T is the dtype of mean and of everything that is not float32. Both moments of the prior are
// given, or neither.
struct GaussianSampleParams {
  SampleInput mean;
  SampleInput logvar;
  SampleInput prior_mean;
  SampleInput prior_logvar;
  SampleInput noise;    // T or float32; absent if the noise is drawn
  Seed seed;            // unless the noise is given
  SampleOutput sample;  // T or float32
  double* partials;     // [gaussian_sample_partials()]
  unsigned* ticket;     // [], zero before and after
  float* kl;            // [B]
  SampleShape shape;
  float free_bits;
};

struct GaussianSampleBackwardParams {
  SampleInput grad_sample;  // T or float32; absent for zeros
  const float* grad_kl;     // [B], or null for zeros
  SampleInput mean;
  SampleInput logvar;
  SampleInput prior_mean;
  SampleInput prior_logvar;
  SampleInput noise;
  Seed seed;
  SampleOutput grad_mean;
  SampleOutput grad_logvar;
  SampleOutput grad_prior_mean;  // absent if not wanted
  SampleOutput grad_prior_logvar;
  SampleShape shape;
  float free_bits;
};

int64_t gaussian_sample_partials(GaussianSampleParams params, DType type);
void launch_gaussian_sample(GaussianSampleParams params, DType type, cudaStream_t stream);
void launch_gaussian_sample_backward(GaussianSampleBackwardParams params,
                                     DType type,
                                     cudaStream_t stream);

}  // namespace genperf
