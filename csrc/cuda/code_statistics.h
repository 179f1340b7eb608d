// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "code_order.h"

namespace genperf {

// Levels whose residuals are computed from the same rows: level j of a group subtracts j codes.
constexpr int64_t kLevelsPerGroup = 4;

// Of x, or of the residuals of x at every level: codes of the earlier levels are subtracted, in
// float32 and in order. T is the dtype of x, C that of the codebooks (float32 for residuals), N =
// outer * inner. Q is 1 if there are no residuals.
struct CodeStatisticsParams {
  const void* x;           // [outer, D, inner], T
  const int64_t* indices;  // [outer, inner, Q], contiguous; indices outside 0 ... K-1 are ignored
  const float* weights;    // [outer, inner], contiguous, or null for ones
  const void* codebooks;   // [Q, K, D], C, or null if nothing is subtracted
  void* workspace;         // code_statistics_workspace() bytes
  float* counts;           // [Q, K], or null
  void* sums;              // [Q, K, D], float32, or C for a gradient
  // The gradient of the codes is sums * *grad * factor / (*valid * D), with at least 1 for *valid.
  const float* grad;     // [Q], or null for plain sums
  const int64_t* valid;  // []
  float factor;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t num_codes;
  int64_t levels;
  Strides x_strides;
  int64_t codebook_stride;
  int64_t code_stride;
  int64_t code_channel_stride;
  bool subtract_own;  // sums of x - code
  bool residual;
};

int64_t code_statistics_workspace(const CodeStatisticsParams& params, DType x_type);
void launch_code_statistics(const CodeStatisticsParams& params,
                            DType x_type,
                            DType code_type,
                            cudaStream_t stream);

}  // namespace genperf
