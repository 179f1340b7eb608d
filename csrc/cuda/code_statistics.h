// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.h"

namespace genperf {

// Rows of the sorted order that one block adds up.
constexpr int kCodeStatisticsChunk = 256;

// The largest K whose sort keys are int16; above it they are int32.
constexpr int64_t kMaxShortCodes = 32767;

// Narrow keys halve or quarter the passes of the radix sort.
struct CodeKeysParams {
  const int64_t* indices;  // [N]
  void* keys;              // [N], int16 or int32: the index, or -1 outside 0 ... K-1
  int64_t positions;       // N
  int64_t num_codes;
};

// T is the type of x, C that of the origins; N = outer * inner.
struct CodeStatisticsParams {
  const void* x;           // [outer, D, inner], T
  const int64_t* indices;  // [outer, inner], contiguous; outside 0 ... K-1 is left out
  const float* weights;    // [outer, inner], contiguous, or null for ones
  const void* origins;     // [K, D], C, or null for zeros
  const void* keys;        // [N], sorted
  const int64_t* order;    // [N], the position of each key, stable
  int64_t* offsets;        // [K + 1], scratch: where each code begins in the sorted order
  double* partials;        // [chunks, 2, D + 1], scratch: sums and mass of runs that cross chunks
  float* counts;           // [K]
  float* sums;             // [K, D]
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t num_codes;
  Strides x_strides;
  int64_t origin_stride;
  int64_t origin_channel_stride;
};

void launch_code_keys(const CodeKeysParams& params, cudaStream_t stream);
void launch_code_statistics(const CodeStatisticsParams& params,
                            DType x_type,
                            DType code_type,
                            cudaStream_t stream);

}  // namespace genperf
