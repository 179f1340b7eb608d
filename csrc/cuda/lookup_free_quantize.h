// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.h"

namespace genperf {

// T is the dtype of x; D is less than kMaxChannels.
struct LookupFreeQuantizeParams {
  const void* x;     // [outer, D, inner], T
  void* quantized;   // [outer, D, inner], T
  int64_t* indices;  // [outer, inner], contiguous
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Strides x_strides;
  Strides quantized_strides;
  float size;  // absolute value of a code's components
};

struct LookupFreeQuantizeBackwardParams {
  const void* grad_quantized;  // [outer, D, inner], T
  const void* x;               // [outer, D, inner], T
  void* grad_x;                // [outer, D, inner], T
  int64_t outer;
  int64_t channels;
  int64_t inner;
  Strides grad_quantized_strides;
  Strides x_strides;
  Strides grad_x_strides;
  float scale;
};

void launch_lookup_free_quantize(const LookupFreeQuantizeParams& params,
                                 DType type,
                                 cudaStream_t stream);
void launch_lookup_free_quantize_backward(const LookupFreeQuantizeBackwardParams& params,
                                          DType type,
                                          cudaStream_t stream);

}  // namespace genperf
