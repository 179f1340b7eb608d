// SPDX-License-Identifier: Apache-2.0
// The launchers of finite scalar and lookup-free quantization under C names, for ctypes.
#include "finite_scalar_quantize.h"
#include "lookup_free_quantize.h"

using genperf::DType;

extern "C" {

// The values of a grid that the division of the kernels, which the host does not run, rounds
// otherwise than IEEE division.
int64_t wrong_quotients(int64_t levels, bool symmetric) {
  const genperf::ChannelGrid grid = genperf::channel_grid(levels, symmetric, false, 1);
  int64_t wrong = 0;
  for (int64_t digit = 0; digit < levels; ++digit) {
    const float value = static_cast<float>(digit) - grid.middle;
    const float found = genperf::corrected_quotient(value, grid.divisor, 1.0f / grid.divisor);
    wrong += found != value / grid.divisor;
  }
  return wrong;
}

void finite_scalar_quantize(const genperf::FiniteScalarQuantizeParams* params, int type) {
  genperf::launch_finite_scalar_quantize(*params, DType(type), nullptr);
}

void finite_scalar_quantize_backward(const genperf::FiniteScalarQuantizeBackwardParams* params,
                                     int type) {
  genperf::launch_finite_scalar_quantize_backward(*params, DType(type), nullptr);
}

void lookup_free_quantize(const genperf::LookupFreeQuantizeParams* params, int type) {
  genperf::launch_lookup_free_quantize(*params, DType(type), nullptr);
}

void lookup_free_quantize_backward(const genperf::LookupFreeQuantizeBackwardParams* params,
                                   int type) {
  genperf::launch_lookup_free_quantize_backward(*params, DType(type), nullptr);
}

}  // extern "C"
