// SPDX-License-Identifier: Apache-2.0
// The launchers of the ops over samples under C names, for ctypes, and a kernel that draws words.
#include "gaussian_sample.h"
#include "gradient_norm_penalty.h"
#include "interpolate.h"

using genperf::DType;

namespace {

__global__ void random_words_kernel(const uint32_t* counter, uint64_t seed, uint32_t* words) {
  const auto drawn =
      genperf::random_words<genperf::Scalar>(counter[0], counter[1], counter[2], counter[3], seed);
  for (int i = 0; i < 4; ++i)
    words[i] = drawn.word[i];
}

}  // namespace

extern "C" {

void random_words(const uint32_t* counter, uint64_t seed, uint32_t* words) {
  genperf::launch("random_words", random_words_kernel, 1, 1, 0, nullptr, counter, seed, words);
}

int64_t gaussian_sample_partials(const genperf::GaussianSampleParams* params, int type) {
  return genperf::gaussian_sample_partials(*params, DType(type));
}

void gaussian_sample(const genperf::GaussianSampleParams* params, int type) {
  genperf::launch_gaussian_sample(*params, DType(type), nullptr);
}

void gaussian_sample_backward(const genperf::GaussianSampleBackwardParams* params, int type) {
  genperf::launch_gaussian_sample_backward(*params, DType(type), nullptr);
}

void interpolate(const genperf::InterpolateParams* params, int type) {
  genperf::launch_interpolate(*params, DType(type), nullptr);
}

int64_t interpolate_backward_partials(const genperf::InterpolateBackwardParams* params, int type) {
  return genperf::interpolate_backward_partials(*params, DType(type));
}

void interpolate_backward(const genperf::InterpolateBackwardParams* params, int type) {
  genperf::launch_interpolate_backward(*params, DType(type), nullptr);
}

int64_t gradient_norm_penalty_partials(const genperf::GradientNormPenaltyParams* params, int type) {
  return genperf::gradient_norm_penalty_partials(*params, DType(type));
}

void gradient_norm_penalty(const genperf::GradientNormPenaltyParams* params, int type) {
  genperf::launch_gradient_norm_penalty(*params, DType(type), nullptr);
}

void gradient_norm_penalty_backward(const genperf::GradientNormPenaltyBackwardParams* params,
                                    int type) {
  genperf::launch_gradient_norm_penalty_backward(*params, DType(type), nullptr);
}

}  // extern "C"
