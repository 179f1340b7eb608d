// SPDX-License-Identifier: Apache-2.0
//
// The kernel of code_statistics that transposes positions to rows, and subtracts codes.
#pragma once

#include "positions.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kTile = 32;
constexpr int kTileRows = 8;

struct RowsParams {
  const void* x;  // [outer, D, inner], T
  void* rows;     // [N, last_channel - first_channel], U
  const float* codebooks;
  const int64_t* indices;  // [N, Q]
  int64_t positions;
  int64_t inner;
  int64_t first_channel;
  int64_t last_channel;
  int64_t num_codes;
  int64_t levels;
  int64_t first_level;  // of the codes that are subtracted
  int64_t last_level;
  Strides x_strides;
  int64_t codebook_stride;
  int64_t code_stride;
  int64_t code_channel_stride;
  bool channels_last;
};

// Transposes x to rows, and subtracts codes. x and rows may be the same if they have one layout.
template <typename T, typename U>
__global__ void __launch_bounds__(kTile* kTileRows) code_rows_kernel(RowsParams p) {
  auto& tile = shared_memory<float[kTile][kTile + 1]>();
  const int lane = threadIdx.x % kTile;
  const int64_t first_position = int64_t{blockIdx.x} * kTile;
  const int64_t first_channel = p.first_channel + int64_t{blockIdx.y} * kTile;
  for (int row = threadIdx.x / kTile; row < kTile; row += kTileRows) {
    const int in_position = p.channels_last ? row : lane;
    const int in_channel = p.channels_last ? lane : row;
    const int64_t position = first_position + in_position;
    const int64_t channel = first_channel + in_channel;
    if (position < p.positions && channel < p.last_channel) {
      const int64_t offset =
          offset_of(position, p.inner, p.x_strides) + channel * p.x_strides.channel;
      tile[in_position][in_channel] = to_float(static_cast<const T*>(p.x)[offset]);
    }
  }
  __syncthreads();
  const int64_t channel = first_channel + lane;
  for (int row = threadIdx.x / kTile; row < kTile; row += kTileRows) {
    const int64_t position = first_position + row;
    if (position >= p.positions || channel >= p.last_channel)
      continue;
    float value = tile[row][lane];
    for (int64_t level = p.first_level; level < p.last_level; ++level) {
      const int64_t index = p.indices[position * p.levels + level];
      if (index >= 0 && index < p.num_codes) {
        value -= p.codebooks[level * p.codebook_stride + index * p.code_stride +
                             channel * p.code_channel_stride];
      }
    }
    static_cast<U*>(
        p.rows)[position * (p.last_channel - p.first_channel) + channel - p.first_channel] =
        convert<U>(value);
  }
}

}  // namespace genperf

#endif
