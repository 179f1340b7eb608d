// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "implicit_levels.h"
#include "launch.h"

namespace genperf {

// T is the dtype of x; D is at most kMaxChannels.
struct FiniteScalarQuantizeParams {
  const void* x;     // [outer, D, inner], T
  void* quantized;   // [outer, D, inner], T
  int64_t* indices;  // [outer, inner], contiguous, or null
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Strides x_strides;
  Strides quantized_strides;
  int32_t levels[kMaxChannels];
  bool symmetric;
  bool hard;
};

struct FiniteScalarQuantizeBackwardParams {
  const void* grad_quantized;  // [outer, D, inner], T
  const void* x;               // [outer, D, inner], T
  void* grad_x;                // [outer, D, inner], T
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Strides grad_quantized_strides;
  Strides x_strides;
  Strides grad_x_strides;
  int32_t levels[kMaxChannels];
  bool symmetric;
  bool hard;
};

void launch_finite_scalar_quantize(const FiniteScalarQuantizeParams& params,
                                   DType type,
                                   cudaStream_t stream);
void launch_finite_scalar_quantize_backward(const FiniteScalarQuantizeBackwardParams& params,
                                            DType type,
                                            cudaStream_t stream);

}  // namespace genperf
