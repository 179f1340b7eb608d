// SPDX-License-Identifier: Apache-2.0
// The launchers of finite scalar and lookup-free quantization under C names, for ctypes.
#include "finite_scalar_quantize.h"
#include "lookup_free_quantize.h"

using genperf::DType;

extern "C" {

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
