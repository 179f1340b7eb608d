// SPDX-License-Identifier: Apache-2.0
//
// Sums of exp(-L1 distance) over all pairs of a batch, and their gradient.
//
// As in a matrix product, a block compares a tile of samples with every tile in turn from shared
// memory, and a thread holds 4 by 4 pairs in registers. Each result is computed by one block in a
// fixed order, without atomics. Nothing of size N^2 is stored; backward recomputes the
// similarities.
#include "minibatch_similarity.h"

namespace genperf {
namespace {

constexpr int kTile = 32;              // samples per block
constexpr int kPairs = 4;              // samples per thread, on both sides
constexpr int kSide = kTile / kPairs;  // threads along each side
constexpr int kThreads = kSide * kSide;
constexpr int kBlocksPerProcessor = 8;     // minimum; with more the compiler spills registers
constexpr int kChunk = 32;                 // channels per step
constexpr int kRow = kTile + kPairs;       // padded to spread columns over banks and keep alignment
constexpr int kChannels = kChunk / kSide;  // per thread, in the backward pass

struct Tiles {
  float own[kChunk][kRow];
  float other[kChunk][kRow];
};

struct BackwardTiles {
  Tiles features;
  float weight[kTile][kRow];  // [other sample][own sample]
  float own_grad[kTile];
  float other_grad[kTile];
};

using Quad = Pack<float, kPairs>;

__device__ Quad quad_at(const float* row, int quad) {
  return *reinterpret_cast<const Quad*>(row + quad * kPairs);
}

__device__ int width_of(int64_t channels, int64_t first) {
  return channels - first < kChunk ? static_cast<int>(channels - first) : kChunk;
}

// Loads a chunk of the channels of kTile samples, with zeros past the last sample.
template <typename T, typename Params>
__device__ void load_tile(const Params& p,
                          int64_t kernel,
                          int64_t sample,
                          int64_t first,
                          float (&tile)[kChunk][kRow]) {
  const T* features = static_cast<const T*>(p.features) + kernel * p.channels + first;
  const int width = width_of(p.channels, first);
  for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
    const int64_t row = sample + i / width;
    tile[i % width][i / width] =
        row < p.samples ? to_float(features[row * p.kernels * p.channels + i % width]) : 0.0f;
  }
}

// part = the L1 distances of this thread's pairs in `count` channels of the tiles, from c on: of
// four channels, of which those past the last count as 0, as a tree.
__device__ void distances_of_four(const Tiles& tiles,
                                  int c,
                                  int count,
                                  int own_quad,
                                  int other_quad,
                                  float (&part)[kPairs][kPairs]) {
  Quad a[4], b[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    a[n] = n < count ? quad_at(tiles.own[c + n], own_quad) : Quad{};
    b[n] = n < count ? quad_at(tiles.other[c + n], other_quad) : Quad{};
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const auto difference = [&](int n) { return fabsf(a[n].values[i] - b[n].values[j]); };
      part[i][j] = (difference(0) + difference(1)) + (difference(2) + difference(3));
    }
  }
}

// The similarities of this thread's pairs, with 0 for a sample and itself and past the end. The
// caller synchronizes before the tiles are written again.
template <typename T, typename Params>
__device__ void compare(const Params& p,
                        int64_t kernel,
                        int64_t own,
                        int64_t other,
                        Tiles& tiles,
                        float (&similarity)[kPairs][kPairs]) {
  const int own_quad = threadIdx.x / kSide;
  const int other_quad = threadIdx.x % kSide;
  // As on the CPU: if there are more than two sums of eight channels, what rounding takes from
  // their sum is kept, so that the error does not grow with the number of channels.
  constexpr int kStep = 8;
  static_assert(kChunk % kStep == 0);
  const bool compensated = p.channels > 2 * kStep;
  float lost[kPairs][kPairs] = {};
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      similarity[i][j] = 0;
  }
  for (int64_t first = 0; first < p.channels; first += kChunk) {
    if (first > 0)
      __syncthreads();
    if (other == 0 || p.channels > kChunk)
      load_tile<T>(p, kernel, own, first, tiles.own);
    load_tile<T>(p, kernel, other, first, tiles.other);
    __syncthreads();
    const int count = width_of(p.channels, first);
    for (int c = 0; c < count; c += kStep) {
      float part[kPairs][kPairs], second[kPairs][kPairs] = {};
      distances_of_four(tiles, c, count - c, own_quad, other_quad, part);
      if (c + kStep / 2 < count) {
        distances_of_four(tiles, c + kStep / 2, count - c - kStep / 2, own_quad, other_quad,
                          second);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const float before = similarity[i][j], added = part[i][j] + second[i][j];
          const float total = before + added;
          if (compensated) {
            const float arrived = total - before;
            lost[i][j] += (before - (total - arrived)) + (added - arrived);
          }
          similarity[i][j] = total;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t row = own + own_quad * kPairs + i;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int64_t column = other + other_quad * kPairs + j;
      if (lost[i][j] == lost[i][j])  // that of an infinite sum is NaN
        similarity[i][j] += lost[i][j];
      similarity[i][j] = row != column && column < p.samples ? expf(-similarity[i][j]) : 0.0f;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    minibatch_similarity_kernel(MinibatchSimilarityParams p) {
  auto& tiles = shared_memory<Tiles>();
  const int64_t kernel = blockIdx.x % p.kernels;
  const int64_t own = blockIdx.x / p.kernels * kTile;
  float sums[kPairs] = {};
  for (int64_t other = 0; other < p.samples; other += kTile) {
    float similarity[kPairs][kPairs];
    __syncthreads();
    compare<T>(p, kernel, own, other, tiles, similarity);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        sums[i] += similarity[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    for (int step = kSide / 2; step > 0; step /= 2)
      sums[i] += __shfl_xor_sync(kFullWarp, sums[i], step);
    const int64_t row = own + threadIdx.x / kSide * kPairs + i;
    if (threadIdx.x % kSide == 0 && row < p.samples)
      static_cast<T*>(p.similarity)[row * p.kernels + kernel] = convert<T>(sums[i]);
  }
}

template <typename T>
__device__ void load_grads(const MinibatchSimilarityBackwardParams& p,
                           int64_t kernel,
                           int64_t sample,
                           float (&grads)[kTile]) {
  const int i = threadIdx.x;
  if (i < kTile) {
    grads[i] =
        sample + i < p.samples
            ? to_float(static_cast<const T*>(p.grad_similarity)[(sample + i) * p.kernels + kernel])
            : 0.0f;
  }
}

// A block has one chunk of channels; a thread sums kPairs samples by kChannels channels.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    minibatch_similarity_backward_kernel(MinibatchSimilarityBackwardParams p) {
  auto& shared = shared_memory<BackwardTiles>();
  Tiles& tiles = shared.features;
  const int64_t kernel = blockIdx.x % p.kernels;
  const int64_t own = blockIdx.x / p.kernels * kTile;
  const int64_t first = int64_t{blockIdx.y} * kChunk;
  const int width = width_of(p.channels, first);
  const int own_quad = threadIdx.x / kSide;
  const int lane = threadIdx.x % kSide;
  float sums[kPairs][kChannels] = {};
  load_grads<T>(p, kernel, own, shared.own_grad);
  for (int64_t other = 0; other < p.samples; other += kTile) {
    float similarity[kPairs][kPairs];
    __syncthreads();
    load_grads<T>(p, kernel, other, shared.other_grad);
    compare<T>(p, kernel, own, other, tiles, similarity);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int column = lane * kPairs + j;
      Quad weight;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        weight.values[i] =
            similarity[i][j] * (shared.own_grad[own_quad * kPairs + i] + shared.other_grad[column]);
      }
      *reinterpret_cast<Quad*>(&shared.weight[column][own_quad * kPairs]) = weight;
    }
    __syncthreads();
    if (p.channels > kChunk) {  // otherwise the tiles already hold the chunk
      load_tile<T>(p, kernel, own, first, tiles.own);
      load_tile<T>(p, kernel, other, first, tiles.other);
      __syncthreads();
    }
    for (int j = 0; j < kTile; ++j) {
      const Quad weight = quad_at(shared.weight[j], own_quad);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (lane + c * kSide >= width)
          break;
        const Quad a = quad_at(tiles.own[lane + c * kSide], own_quad);
        const float b = tiles.other[lane + c * kSide][j];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float sign = (a.values[i] > b ? 1.0f : 0.0f) - (a.values[i] < b ? 1.0f : 0.0f);
          sums[i][c] -= weight.values[i] * sign;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t row = own + own_quad * kPairs + i;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t channel = first + lane + c * kSide;
      if (row < p.samples && channel < p.channels) {
        static_cast<T*>(p.grad_features)[(row * p.kernels + kernel) * p.channels + channel] =
            convert<T>(sums[i][c]);
      }
    }
  }
}

unsigned blocks_of(int64_t samples, int64_t kernels) {
  const int64_t blocks = (samples + kTile - 1) / kTile * kernels;
  if (blocks > INT32_MAX)
    throw std::runtime_error("minibatch_similarity: too many samples");
  return static_cast<unsigned>(blocks);
}

}  // namespace

void launch_minibatch_similarity(const MinibatchSimilarityParams& params,
                                 DType type,
                                 cudaStream_t stream) {
  constexpr const char* kOp = "minibatch_similarity";
  const unsigned blocks = blocks_of(params.samples, params.kernels);
  if (blocks == 0)
    return;
  dispatch(kOp, type, [&]<typename T>() {
    launch(kOp, minibatch_similarity_kernel<T>, blocks, kThreads, sizeof(Tiles), stream, params);
  });
}

void launch_minibatch_similarity_backward(const MinibatchSimilarityBackwardParams& params,
                                          DType type,
                                          cudaStream_t stream) {
  constexpr const char* kOp = "minibatch_similarity_backward";
  const unsigned blocks = blocks_of(params.samples, params.kernels);
  const int64_t chunks = (params.channels + kChunk - 1) / kChunk;
  if (blocks == 0 || chunks == 0)
    return;
  if (chunks > 65535)
    throw std::runtime_error("minibatch_similarity_backward: too many channels");
  dispatch(kOp, type, [&]<typename T>() {
    launch(kOp, minibatch_similarity_backward_kernel<T>,
           dim3(blocks, static_cast<unsigned>(chunks)), kThreads, sizeof(BackwardTiles), stream,
           params);
  });
}

}  // namespace genperf
