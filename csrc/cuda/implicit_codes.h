// SPDX-License-Identifier: Apache-2.0
//
// Shared by finite scalar and lookup-free quantization.
//
// A block processes a tile of positions with all their channels. Its threads visit the elements in
// memory order, 16 bytes at a time where the layout allows, so that warps access full cache lines
// in both layouts for any number of channels. The digits are collected in shared memory, and one
// thread per position adds up the index.
#pragma once

#include "implicit_levels.h"
#include "positions.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kCodeThreads = 256;
constexpr int kCodePositions = 128;  // per tile
constexpr unsigned kCodeBlocks = 4096;

// The order of the elements of a tile: along channels if those are contiguous, else along
// positions.
struct CodeTiling {
  int64_t positions;
  int64_t inner;
  int channels;
  bool channels_last;
  uint32_t inverse;  // 2^19 / channels, rounded up
};

// Whether each run of `width` elements of a tile is contiguous and aligned in a tensor of these
// strides.
inline bool runs_vectorizable(const void* data,
                              const CodeTiling& tiling,
                              int64_t outer,
                              Strides strides,
                              int width) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0)
    return false;
  if (tiling.channels_last) {
    const int64_t distance = tiling.inner == 1 ? strides.outer : strides.inner;
    const bool one_row =
        tiling.inner == 1 || outer == 1 || strides.outer == tiling.inner * strides.inner;
    return strides.channel == 1 && distance == tiling.channels && one_row;
  }
  return strides.inner == 1 && tiling.inner % width == 0 && strides.channel % width == 0 &&
         (outer == 1 || strides.outer % width == 0);
}

template <typename Params>
CodeTiling tiling_of(const Params& p) {
  const bool last = p.inner == 1 || p.channels == 1 || p.x_strides.channel <= p.x_strides.inner;
  const auto channels = static_cast<uint32_t>(p.channels);
  const uint32_t inverse = ((1u << 19) + channels - 1) / channels;
  return {p.outer * p.inner, p.inner, static_cast<int>(channels), last, inverse};
}

inline unsigned blocks_of(const CodeTiling& tiling) {
  const int64_t tiles = (tiling.positions + kCodePositions - 1) / kCodePositions;
  return static_cast<unsigned>(tiles < kCodeBlocks ? tiles : kCodeBlocks);
}

struct TileElement {
  int position;  // in the tile
  int channel;
};

__device__ inline TileElement element_of(int number, const CodeTiling& tiling) {
  if (!tiling.channels_last)
    return {number % kCodePositions, number / kCodePositions};
  // Exact, since no number is above kCodePositions * kMaxChannels = 2^13.
  const int position = static_cast<int>(static_cast<uint32_t>(number) * tiling.inverse >> 19);
  return {position, number - position * tiling.channels};
}

__device__ inline int64_t element_offset(int64_t first,
                                         TileElement e,
                                         const CodeTiling& tiling,
                                         Strides strides) {
  return offset_of(first + e.position, tiling.inner, strides) + e.channel * strides.channel;
}

// Calls run(first position, number of positions) for each tile of the block.
template <typename Run>
__device__ void for_each_tile(const CodeTiling& tiling, Run run) {
  for (int64_t first = int64_t{blockIdx.x} * kCodePositions; first < tiling.positions;
       first += int64_t{gridDim.x} * kCodePositions) {
    const int64_t left = tiling.positions - first;
    run(first, static_cast<int>(left < kCodePositions ? left : kCodePositions));
  }
}

template <typename T, int kWidth, typename Code>
__device__ void quantize_tiles(const T* x,
                               T* out,
                               int64_t* indices,
                               const CodeTiling& tiling,
                               Strides x_strides,
                               Strides out_strides,
                               int32_t* digits,
                               const int64_t* basis,
                               Code code) {
  for_each_tile(tiling, [&](int64_t first, int count) {
    const int elements = (tiling.channels_last ? count : kCodePositions) * tiling.channels;
    for (int n = threadIdx.x * kWidth; n < elements; n += kCodeThreads * kWidth) {
      const TileElement e = element_of(n, tiling);
      // A run does not cross the end of a tile: with wide runs, rows consist of full runs.
      if (e.position >= count)
        continue;
      const int64_t left = tiling.channels_last ? elements - n : count - e.position;
      const bool full = kWidth > 1 && left >= kWidth;
      const auto xs =
          load_pack<T, kWidth>(x + element_offset(first, e, tiling, x_strides), 1, left, full);
      Pack<T, kWidth> values;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (j >= left) {
          values.values[j] = convert<T>(0.0f);
          continue;
        }
        const TileElement at = element_of(tiling.channels_last ? n + j : n, tiling);
        const int position = at.position + (tiling.channels_last ? 0 : j);
        const Coded<Scalar> coded = code(to_float(xs.values[j]), at.channel);
        values.values[j] = convert<T>(coded.value);
        if (indices != nullptr)
          digits[position * tiling.channels + at.channel] = static_cast<int32_t>(coded.digit);
      }
      store_pack(out + element_offset(first, e, tiling, out_strides), 1, left, full, values);
    }
    if (indices == nullptr)
      return;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      int64_t index = 0;
      for (int d = 0; d < tiling.channels; ++d)
        index += digits[threadIdx.x * tiling.channels + d] * basis[d];
      indices[first + threadIdx.x] = index;
    }
    __syncthreads();
  });
}

struct CodeShared {
  int64_t basis[kMaxChannels];
  float constants[7][kMaxChannels];  // the members of a ChannelGrid, in order

  // [kCodePositions, D], after this struct.
  __device__ int32_t* digits() { return reinterpret_cast<int32_t*>(this + 1); }
};

inline size_t shared_bytes(const CodeTiling& tiling, bool indexed) {
  return sizeof(CodeShared) + (indexed ? sizeof(int32_t) * kCodePositions * tiling.channels : 0);
}

}  // namespace genperf

#endif
