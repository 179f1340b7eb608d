// SPDX-License-Identifier: Apache-2.0
//
// Counts and sums per code in O(N D), without one-hot vectors and without float atomics.
//
// The positions are sorted by code, stably. Blocks sum fixed chunks of 256 sorted rows in double,
// one thread per channel. A run of one code within a chunk is written directly to the result; the
// pieces of a run that crosses chunks are added in a last step, in order. The sums equal those of a
// sequential loop up to grouping by chunks, for any distribution of the codes, and are the same in
// every run.
#include "code_statistics.h"

namespace genperf {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = kCodeStatisticsChunk;
constexpr int kBatch = 8;  // rows loaded at a time

__device__ bool is_code(int64_t index, int64_t num_codes) {
  return index >= 0 && index < num_codes;
}

__device__ int64_t thread_index() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

template <typename Key>
__global__ void __launch_bounds__(kThreads) code_keys_kernel(CodeKeysParams p) {
  const int64_t i = thread_index();
  if (i >= p.positions)
    return;
  const int64_t index = p.indices[i];
  static_cast<Key*>(p.keys)[i] = static_cast<Key>(is_code(index, p.num_codes) ? index : -1);
}

template <typename Key>
__global__ void __launch_bounds__(kThreads) code_offsets_kernel(CodeStatisticsParams p) {
  const int64_t code = thread_index();
  if (code > p.num_codes)
    return;
  const Key* keys = static_cast<const Key*>(p.keys);
  int64_t low = 0;
  int64_t high = p.outer * p.inner;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  p.offsets[code] = low;
}

struct ChunkRows {
  int64_t code[kChunk];
  int64_t offset[kChunk];  // into x
  float weight[kChunk];
};

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) code_chunks_kernel(CodeStatisticsParams p) {
  auto& rows = shared_memory<ChunkRows>();
  const int64_t begin = int64_t{blockIdx.x} * kChunk;
  const int64_t positions = p.outer * p.inner;
  const int64_t end = begin + kChunk < positions ? begin + kChunk : positions;
  const int count = static_cast<int>(end - begin);
  for (int row = threadIdx.x; row < kChunk; row += blockDim.x) {
    const int64_t position = row < count ? p.order[begin + row] : 0;
    const int64_t code = row < count ? p.indices[position] : -1;
    rows.code[row] = is_code(code, p.num_codes) ? code : -1;
    rows.offset[row] =
        position / p.inner * p.x_strides.outer + position % p.inner * p.x_strides.inner;
    rows.weight[row] = p.weights == nullptr ? 1.0f : p.weights[position];
  }
  __syncthreads();

  for (int64_t d = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; d < p.channels;
       d += int64_t{gridDim.y} * blockDim.x) {
    const T* x = static_cast<const T*>(p.x) + d * p.x_strides.channel;
    int64_t current = -1;
    double origin = 0;
    double sum = 0;
    double mass = 0;  // used by the thread of channel 0
    const auto finish_run = [&] {
      if (current < 0)
        return;
      const int64_t first = p.offsets[current];
      if (first >= begin && p.offsets[current + 1] <= end) {
        p.sums[current * p.channels + d] = static_cast<float>(sum);
        if (d == 0)
          p.counts[current] = static_cast<float>(mass);
      } else {
        const int64_t slot = 2 * int64_t{blockIdx.x} + (first < begin ? 0 : 1);
        p.partials[slot * (p.channels + 1) + d] = sum;
        if (d == 0)
          p.partials[slot * (p.channels + 1) + p.channels] = mass;
      }
    };
    for (int batch = 0; batch < count; batch += kBatch) {
      float values[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        values[j] = batch + j < count ? to_float(x[rows.offset[batch + j]]) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t code = rows.code[batch + j];
        if (code != current) {
          finish_run();
          current = code;
          sum = mass = 0;
          if (code >= 0 && p.origins != nullptr) {
            origin = to_float(static_cast<const C*>(
                p.origins)[code * p.origin_stride + d * p.origin_channel_stride]);
          }
        }
        const double weight = rows.weight[batch + j];
        sum += weight * (static_cast<double>(values[j]) - origin);
        if (d == 0)
          mass += weight;
      }
    }
    finish_run();
  }
}

// Codes without rows, and codes whose rows are in several chunks: the first piece is the last run
// of its chunk (slot 1), each later piece is the first run of its chunk (slot 0).
__global__ void __launch_bounds__(kThreads) code_combine_kernel(CodeStatisticsParams p) {
  const int64_t columns = p.channels + 1;
  const int64_t item = thread_index();
  if (item >= p.num_codes * columns)
    return;
  const int64_t code = item / columns;
  const int64_t column = item % columns;
  const int64_t begin = p.offsets[code];
  const int64_t end = p.offsets[code + 1];
  const int64_t first = begin / kChunk;
  const int64_t last = (end - 1) / kChunk;
  if (begin < end && first == last)
    return;
  double sum = 0;
  if (begin < end) {
    sum = p.partials[(2 * first + 1) * columns + column];
#pragma unroll 8
    for (int64_t chunk = first + 1; chunk <= last; ++chunk) {
      sum += p.partials[2 * chunk * columns + column];
    }
  }
  if (column < p.channels) {
    p.sums[code * p.channels + column] = static_cast<float>(sum);
  } else {
    p.counts[code] = static_cast<float>(sum);
  }
}

}  // namespace

void launch_code_keys(const CodeKeysParams& params, cudaStream_t stream) {
  const unsigned blocks = blocks_for(params.positions);
  if (blocks == 0)
    return;
  const auto kernel =
      params.num_codes <= kMaxShortCodes ? code_keys_kernel<int16_t> : code_keys_kernel<int32_t>;
  launch("code_statistics", kernel, blocks, kThreads, 0, stream, params);
}

void launch_code_statistics(const CodeStatisticsParams& params,
                            DType x_type,
                            DType code_type,
                            cudaStream_t stream) {
  constexpr const char* kOp = "code_statistics";
  if (params.num_codes == 0)
    return;
  const auto offsets_kernel = params.num_codes <= kMaxShortCodes ? code_offsets_kernel<int16_t>
                                                                 : code_offsets_kernel<int32_t>;
  launch(kOp, offsets_kernel, blocks_for(params.num_codes + 1), kThreads, 0, stream, params);

  const int64_t positions = params.outer * params.inner;
  if (positions > 0) {
    // If channels are not contiguous, few are processed at a time: adjacent positions share cache
    // lines, which stay in L2 while all blocks read the same channels.
    const bool channels_last = params.inner == 1 || params.x_strides.channel == 1;
    const int64_t warps = (params.channels + kWarpSize - 1) / kWarpSize;
    const int64_t widest = channels_last ? kThreads / kWarpSize : 1;
    const int64_t block = kWarpSize * (warps < widest ? warps : widest);
    const int64_t slices = (params.channels + block - 1) / block;
    const dim3 grid(static_cast<unsigned>((positions + kChunk - 1) / kChunk),
                    static_cast<unsigned>(slices < 65535 ? slices : 65535));
    dispatch(kOp, x_type, code_type, [&]<typename T, typename C>() {
      launch(kOp, code_chunks_kernel<T, C>, grid, static_cast<unsigned>(block), sizeof(ChunkRows),
             stream, params);
    });
  }
  launch(kOp, code_combine_kernel, blocks_for(params.num_codes * (params.channels + 1)), kThreads,
         0, stream, params);
}

}  // namespace genperf
