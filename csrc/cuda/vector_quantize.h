// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.h"

namespace genperf {

// Pairs of doubles that the blocks of a launch write.
constexpr int kVectorQuantizePartials = 4096;

// T is the dtype of x and C that of the codebook. An index outside 0 ... K-1 marks a masked
// position.
struct VectorQuantizeParams {
  const void* x;           // [outer, D, inner], T
  const void* codebook;    // [K, D], C
  const int64_t* indices;  // [outer, inner], contiguous
  void* quantized;         // [outer, D, inner], T
  double* partials;        // [kVectorQuantizePartials, 2]: squared error and valid positions
  unsigned* ticket;        // [], zero before and after
  float* loss;             // [], the mean squared error times the weight
  int64_t* valid;          // []
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t num_codes;
  Strides x_strides;
  Strides quantized_strides;
  int64_t code_stride;
  int64_t code_channel_stride;
  float weight;
};

struct VectorQuantizeBackwardParams {
  const void* grad_quantized;  // [outer, D, inner], T, or null for zeros
  const float* grad_mse;       // [], or null for zero
  const void* x;               // [outer, D, inner], T
  const void* codebook;        // [K, D], C
  const int64_t* indices;      // [outer, inner], contiguous
  const int64_t* valid;        // []
  void* grad_x;                // [outer, D, inner], T
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t num_codes;
  Strides grad_quantized_strides;
  Strides x_strides;
  Strides grad_x_strides;
  int64_t code_stride;
  int64_t code_channel_stride;
  float commitment_weight;
  bool rotation;
};

void launch_vector_quantize(const VectorQuantizeParams& params,
                            DType x_type,
                            DType code_type,
                            cudaStream_t stream);
void launch_vector_quantize_backward(const VectorQuantizeBackwardParams& params,
                                     DType x_type,
                                     DType code_type,
                                     cudaStream_t stream);

}  // namespace genperf
