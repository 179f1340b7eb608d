// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.h"

namespace genperf {

// Sorted rows that one block sums.
constexpr int kCodeStatisticsChunk = 256;

// The largest K with int16 sort keys; larger ones use int32.
constexpr int64_t kMaxShortCodes = 32767;

// Narrow keys need half or a quarter of the radix sort's passes.
struct CodeKeysParams {
  const int64_t* indices;  // [N]
  void* keys;              // [N], int16 or int32: the index, or -1 if outside 0 ... K-1
  int64_t positions;       // N
  int64_t num_codes;
};

// T is the dtype of x and C that of the origins; N = outer * inner.
struct CodeStatisticsParams {
  const void* x;           // [outer, D, inner], T
  const int64_t* indices;  // [outer, inner], contiguous; indices outside 0 ... K-1 are ignored
  const float* weights;    // [outer, inner], contiguous, or null for ones
  const void* origins;     // [K, D], C, or null for zeros
  const void* keys;        // [N], sorted
  const int64_t* order;    // [N], the position of each key
  int64_t* offsets;        // [K + 1], scratch: the start of each code in the sorted order
  double* partials;        // [chunks, 2, D + 1], scratch: sums and weight of runs that cross chunks
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
