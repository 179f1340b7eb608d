// SPDX-License-Identifier: Apache-2.0
//
// Teams of 1 to 32 threads that process a position each, a thread 16 bytes of x at a time.
//
// One kernel serves both layouts, because only the arrangement of the teams differs: if channels
// are contiguous, a team is a run of lanes in one warp; if positions are, the lanes of a warp are
// 32 adjacent positions and a team has one thread in each of several warps. In both cases a warp
// accesses full cache lines of x, and codes are read as vectors from L2.
#pragma once

#include "last_block.h"
#include "positions.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The largest grid, on every device, so that sums over it are the same everywhere.
constexpr int kMaxBlocks = 4096;

template <typename T>
constexpr int kWidthOf = 16 / sizeof(T);

struct Tiling {
  int64_t tiles;
  int team;       // threads per position, a power of two
  int positions;  // per tile
  bool channels_last;
};

inline Tiling tiling_of(int64_t outer,
                        int64_t channels,
                        int64_t inner,
                        Strides strides,
                        int width) {
  Tiling tiling;
  tiling.channels_last = inner == 1 || channels == 1 || strides.channel <= strides.inner;
  const int widest = tiling.channels_last ? kWarpSize : kWarps;
  tiling.team = 1;
  while (tiling.team < widest && int64_t{tiling.team} * width < channels)
    tiling.team *= 2;
  tiling.positions = kThreads / tiling.team;
  tiling.tiles = (outer * inner + tiling.positions - 1) / tiling.positions;
  return tiling;
}

inline unsigned blocks_of(const Tiling& tiling) {
  return static_cast<unsigned>(tiling.tiles < kMaxBlocks ? tiling.tiles : kMaxBlocks);
}

// The channels and the position of a tile that this thread processes.
struct ThreadTile {
  int lane;      // in the team
  int position;  // in the tile

  __device__ explicit ThreadTile(const Tiling& tiling) {
    const int thread = threadIdx.x;
    lane = tiling.channels_last ? thread % tiling.team : thread / tiling.positions;
    position = tiling.channels_last ? thread / tiling.team : thread % tiling.positions;
  }
};

// The sum over the block in a fixed order, held by thread 0.
__device__ inline double block_sum(double value) {
  auto& warp_sums = shared_memory<double[kWarps]>();
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_down_sync(kFullWarp, value, step);
  }
  __syncthreads();  // the previous sum may still be read
  if (threadIdx.x % kWarpSize == 0)
    warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kWarps; ++warp)
    value += warp_sums[warp];
  return value;
}

struct PairOfSums {
  double first;
  double second;
};

// Replaces each thread's pair by the sums over all threads of the launch, in thread 0 of the last
// block. Whether this is the last block. `partials` holds a pair for each block.
__device__ inline bool sum_over_blocks(PairOfSums& sums, double* partials, unsigned* ticket) {
  sums = {block_sum(sums.first), block_sum(sums.second)};
  if (threadIdx.x == 0) {
    partials[2 * int64_t{blockIdx.x}] = sums.first;
    partials[2 * int64_t{blockIdx.x} + 1] = sums.second;
  }
  if (!is_last_block(ticket))
    return false;
  sums = {};
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    sums.first += __ldcg(partials + 2 * i);
    sums.second += __ldcg(partials + 2 * i + 1);
  }
  sums = {block_sum(sums.first), block_sum(sums.second)};
  return true;
}

// The sums over each team, held by every member. Every thread of the block takes part.
template <int kCount>
__device__ void team_sum(float (&values)[kCount],
                         const Tiling& tiling,
                         const ThreadTile& thread_tile) {
  if (tiling.channels_last) {
    for (int step = tiling.team / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        values[i] += __shfl_xor_sync(kFullWarp, values[i], step);
    }
    return;
  }
  auto& shared = shared_memory<float[kCount][kThreads]>();
  __syncthreads();  // the previous sum may still be read
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    shared[i][threadIdx.x] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int lane = 0; lane < tiling.team; ++lane) {
      values[i] += shared[i][lane * tiling.positions + thread_tile.position];
    }
  }
}

struct Vectorizable {
  bool x;
  bool code;
  bool grad;
  bool out;
};

}  // namespace genperf

#endif
