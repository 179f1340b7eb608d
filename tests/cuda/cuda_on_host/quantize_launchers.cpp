// SPDX-License-Identifier: Apache-2.0
// The launchers of vector_quantize, residual_vector_quantize and code_statistics under C names, for
// ctypes, and a kernel that tests the emulation's conversions.
#include "code_order.h"
#include "code_statistics.h"
#include "residual_vector_quantize.h"
#include "vector_quantize.h"

using genperf::DType;

namespace {

__global__ void round_trip_kernel(const float* x,
                                  __nv_bfloat16* bfloat16,
                                  __half* half,
                                  float* wide) {
  const unsigned i = threadIdx.x;
  bfloat16[i] = genperf::convert<__nv_bfloat16>(x[i]);
  half[i] = genperf::convert<__half>(x[i]);
  wide[i] = genperf::to_float(half[i]);
}

}  // namespace

extern "C" {

void vector_quantize(const genperf::VectorQuantizeParams* params, int x_type, int code_type) {
  genperf::launch_vector_quantize(*params, DType(x_type), DType(code_type), nullptr);
}

void vector_quantize_backward(const genperf::VectorQuantizeBackwardParams* params,
                              int x_type,
                              int code_type) {
  genperf::launch_vector_quantize_backward(*params, DType(x_type), DType(code_type), nullptr);
}

int64_t code_statistics_workspace(const genperf::CodeStatisticsParams* params, int x_type) {
  return genperf::code_statistics_workspace(*params, DType(x_type));
}

void code_statistics(const genperf::CodeStatisticsParams* params, int x_type, int code_type) {
  genperf::launch_code_statistics(*params, DType(x_type), DType(code_type), nullptr);
}

void residual_step(const genperf::ResidualStepParams* params, int source_type, int x_type) {
  genperf::launch_residual_step(*params, DType(source_type), DType(x_type), nullptr);
}

int64_t residual_backward_scratch(const genperf::ResidualBackwardParams* params, int x_type) {
  return genperf::residual_backward_scratch(*params, DType(x_type));
}

void residual_backward(const genperf::ResidualBackwardParams* params, int x_type) {
  genperf::launch_residual_backward(*params, DType(x_type), nullptr);
}

void round_trip(const float* x, __nv_bfloat16* bfloat16, __half* half, float* wide, int n) {
  genperf::launch("round_trip", round_trip_kernel, 1, n, 0, nullptr, x, bfloat16, half, wide);
}

}  // extern "C"
