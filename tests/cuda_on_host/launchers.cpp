// SPDX-License-Identifier: Apache-2.0
// The launchers under C names, for ctypes.
#include "code_statistics.h"
#include "vector_quantize.h"

using genperf::DType;

extern "C" {

void vector_quantize(const genperf::VectorQuantizeParams* params, int x_type, int code_type) {
  genperf::launch_vector_quantize(*params, DType(x_type), DType(code_type), nullptr);
}

void vector_quantize_backward(const genperf::VectorQuantizeBackwardParams* params, int x_type,
                              int code_type) {
  genperf::launch_vector_quantize_backward(*params, DType(x_type), DType(code_type), nullptr);
}

void code_keys(const genperf::CodeKeysParams* params) {
  genperf::launch_code_keys(*params, nullptr);
}

void code_statistics(const genperf::CodeStatisticsParams* params, int x_type, int code_type) {
  genperf::launch_code_statistics(*params, DType(x_type), DType(code_type), nullptr);
}

}  // extern "C"
