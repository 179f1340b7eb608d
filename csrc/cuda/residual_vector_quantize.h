// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "launch.h"

namespace genperf {

// Pairs of doubles that the blocks of a launch write.
constexpr int kResidualStepPartials = 4096;

// One level, after its search: subtracts the codes and sums the squares of what is left. S is the
// dtype of the source, T that of x. The last level also adds the codes of all levels.
struct ResidualStepParams {
  const void* source;         // [outer, D, inner], S: x, or the residual
  float* residual;            // [outer, D, inner], or null if nobody needs it; may be the source
  void* quantized;            // [outer, D, inner], T, or null
  const float* codebooks;     // [Q, K, D]
  const int64_t* found;       // [outer, inner], contiguous: indices of this level
  int64_t* indices;           // [outer, inner, Q], contiguous; this level is written
  const bool* mask;           // [outer, inner], contiguous, or null for ones
  const int64_t* num_levels;  // [], the levels that run, or null for all
  bool* next_mask;            // [outer, inner], of the next level, or null
  double* partials;           // [kResidualStepPartials, 2]: squares and valid positions
  unsigned* ticket;           // [], zero before and after
  float* mse;                 // [Q]; this level is written
  int64_t* valid;             // [], written at level 0, read at later ones
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t num_codes;
  int64_t levels;
  int64_t level;
  Strides source_strides;
  Strides residual_strides;
  Strides quantized_strides;
  int64_t codebook_stride;
  int64_t code_stride;
  int64_t code_channel_stride;
};

// T is the dtype of x. An index outside 0 ... K-1 ends the levels of a position.
struct ResidualBackwardParams {
  const void* grad_quantized;  // [outer, D, inner], T, or null for zeros
  const float* grad_mse;       // [Q], or null for zeros
  const void* x;               // [outer, D, inner], T
  const float* codebooks;      // [Q, K, D]
  const int64_t* indices;      // [outer, inner, Q], contiguous
  const int64_t* valid;        // []
  void* grad_x;                // [outer, D, inner], T
  float* scratch;              // residual_backward_scratch() bytes, or null if that is 0
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t num_codes;
  int64_t levels;
  Strides grad_quantized_strides;
  Strides x_strides;
  Strides grad_x_strides;
  int64_t codebook_stride;
  int64_t code_stride;
  int64_t code_channel_stride;
  float commitment_weight;
  bool rotation;
  bool per_quantizer;
};

void launch_residual_step(const ResidualStepParams& params,
                          DType source_type,
                          DType x_type,
                          cudaStream_t stream);
int64_t residual_backward_scratch(const ResidualBackwardParams& params, DType x_type);
void launch_residual_backward(const ResidualBackwardParams& params,
                              DType x_type,
                              cudaStream_t stream);

}  // namespace genperf
