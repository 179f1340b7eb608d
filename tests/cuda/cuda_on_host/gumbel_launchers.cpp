// SPDX-License-Identifier: Apache-2.0
// The launchers of gumbel_sample under C names, for ctypes.
#include "gumbel_sample.h"

using genperf::DType;

extern "C" {

void gumbel_sample(const genperf::GumbelSampleParams* params, int type) {
  genperf::launch_gumbel_sample(*params, DType(type), nullptr);
}

void gumbel_sample_backward(const genperf::GumbelSampleBackwardParams* params, int type) {
  genperf::launch_gumbel_sample_backward(*params, DType(type), nullptr);
}

}  // extern "C"
