// SPDX-License-Identifier: Apache-2.0
//
// Gathers codes, sums the squared error, and computes the gradient of the input.
//
// A team of 1 to 32 threads processes a position, each thread 16 bytes of x at a time. One kernel
// serves both layouts, because only the arrangement of the teams differs: if channels are
// contiguous, a team is a run of lanes in one warp; if positions are, the lanes of a warp are 32
// adjacent positions and a team has one thread in each of several warps. In both cases a warp
// accesses full cache lines of x, and codes are read as vectors from L2. Blocks cover the same
// positions on every device and sum in double, so the loss is the same in every run.
#include "vector_quantize.h"

#include "positions.h"

namespace genperf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <typename T>
constexpr int kWidthOf = 16 / sizeof(T);

struct Tiling {
  int64_t tiles;
  int team;       // threads per position, a power of two
  int positions;  // per tile
  bool channels_last;
};

Tiling tiling_of(int64_t outer, int64_t channels, int64_t inner, Strides strides, int width) {
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

unsigned blocks_of(const Tiling& tiling) {
  return static_cast<unsigned>(tiling.tiles < kVectorQuantizeBlocks ? tiling.tiles
                                                                    : kVectorQuantizeBlocks);
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
__device__ double block_sum(double value) {
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

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads)
    vector_quantize_kernel(VectorQuantizeParams p, Tiling tiling, Vectorizable vectorizable) {
  constexpr int kWidth = kWidthOf<T>;
  const ThreadTile thread_tile(tiling);
  float error = 0;
  int64_t valid = 0;
  for (int64_t tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    const int64_t position = tile * tiling.positions + thread_tile.position;
    if (position >= p.outer * p.inner)
      break;
    const int64_t code = p.indices[position];
    const bool kept = code >= 0 && code < p.num_codes;
    if (kept && thread_tile.lane == 0)
      ++valid;
    const T* x = static_cast<const T*>(p.x) + offset_of(position, p.inner, p.x_strides);
    T* out = static_cast<T*>(p.quantized) + offset_of(position, p.inner, p.quantized_strides);
    const C* row = static_cast<const C*>(p.codebook) + (kept ? code * p.code_stride : 0);
    for (int64_t d = thread_tile.lane * kWidth; d < p.channels; d += tiling.team * kWidth) {
      const int64_t count = p.channels - d;
      Pack<T, kWidth> result;
      if (kept) {
        const auto xs = load_pack<T, kWidth>(x + d * p.x_strides.channel, p.x_strides.channel,
                                             count, vectorizable.x);
        const auto codes = load_pack<C, kWidth>(row + d * p.code_channel_stride,
                                                p.code_channel_stride, count, vectorizable.code);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float difference = to_float(xs.values[j]) - to_float(codes.values[j]);
          error += difference * difference;
          result.values[j] = convert<T>(codes.values[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          result.values[j] = convert<T>(0.0f);
      }
      store_pack(out + d * p.quantized_strides.channel, p.quantized_strides.channel, count,
                 vectorizable.out, result);
    }
  }
  const double block_error = block_sum(error);
  const double block_valid = block_sum(static_cast<double>(valid));
  if (threadIdx.x == 0) {
    p.partials[2 * int64_t{blockIdx.x}] = block_error;
    p.partials[2 * int64_t{blockIdx.x} + 1] = block_valid;
  }
}

__global__ void __launch_bounds__(kThreads)
    mean_error_kernel(VectorQuantizeParams p, int partials) {
  double error = 0;
  double valid = 0;
  for (int i = threadIdx.x; i < partials; i += kThreads) {
    error += p.partials[2 * i];
    valid += p.partials[2 * i + 1];
  }
  error = block_sum(error);
  valid = block_sum(valid);
  if (threadIdx.x == 0) {
    const double elements = valid * static_cast<double>(p.channels);
    *p.mse = elements > 0 ? static_cast<float>(error / elements) : 0.0f;
    *p.valid = static_cast<int64_t>(valid);
  }
}

// With h = x + e |x|/|e|, the gradient is multiplied by |e|/|x| (1 - 2 h h'/|h|^2 + 2 x
// e'/(|x||e|)). There are three passes over the position, the last two from cache: h cancels where
// x and its code are nearly opposite, so its norm is summed from h and not derived from x.e.
template <typename T, typename C, bool kRotation>
__global__ void __launch_bounds__(kThreads)
    vector_quantize_backward_kernel(VectorQuantizeBackwardParams p,
                                    Tiling tiling,
                                    Vectorizable vectorizable) {
  constexpr int kWidth = kWidthOf<T>;
  const ThreadTile thread_tile(tiling);
  const int64_t valid = *p.valid > 0 ? *p.valid : 1;
  const float factor = p.grad_mse == nullptr ? 0.0f
                                             : *p.grad_mse * p.commitment_weight * 2.0f /
                                                   static_cast<float>(valid * p.channels);
  for (int64_t tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    // Teams past the end take part in the sums of the others.
    const int64_t position = tile * tiling.positions + thread_tile.position;
    const bool inside = position < p.outer * p.inner;
    const int64_t code = inside ? p.indices[position] : -1;
    const bool kept = code >= 0 && code < p.num_codes;
    const int64_t first = thread_tile.lane * kWidth;
    const int64_t end = inside ? p.channels : 0;

    const T* x_row = static_cast<const T*>(p.x) + offset_of(position, p.inner, p.x_strides);
    const T* grad_row =
        static_cast<const T*>(p.grad_quantized) +
        (p.grad_quantized == nullptr ? 0 : offset_of(position, p.inner, p.grad_quantized_strides));
    const C* code_row = static_cast<const C*>(p.codebook) + (kept ? code * p.code_stride : 0);
    const auto load_x = [&](int64_t d) {
      return load_pack<T, kWidth>(x_row + d * p.x_strides.channel, p.x_strides.channel,
                                  p.channels - d, vectorizable.x);
    };
    const auto load_code = [&](int64_t d) {
      return load_pack<C, kWidth>(code_row + d * p.code_channel_stride, p.code_channel_stride,
                                  p.channels - d, vectorizable.code);
    };
    const auto load_grad = [&](int64_t d) {
      return load_pack<T, kWidth>(grad_row + d * p.grad_quantized_strides.channel,
                                  p.grad_quantized_strides.channel, p.channels - d,
                                  vectorizable.grad);
    };

    bool rotated = false;
    float stretch = 0;     // |x| / |e|
    float ratio = 1;       // |e| / |x|
    float along_half = 0;  // 2 h.g / |h|^2
    float along_x = 0;     // 2 e.g / (|x||e|)
    if constexpr (kRotation) {
      float squares[2] = {};
      for (int64_t d = first; kept && d < end; d += tiling.team * kWidth) {
        const auto xs = load_x(d);
        const auto codes = load_code(d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          squares[0] += to_float(xs.values[j]) * to_float(xs.values[j]);
          squares[1] += to_float(codes.values[j]) * to_float(codes.values[j]);
        }
      }
      team_sum(squares, tiling, thread_tile);
      rotated = kept && squares[0] > 0 && squares[1] > 0;
      const float x_norm = sqrtf(squares[0]);
      const float code_norm = sqrtf(squares[1]);
      if (rotated) {
        stretch = x_norm / code_norm;
        ratio = code_norm / x_norm;
      }
      float products[3] = {};  // h.h, h.g, e.g
      for (int64_t d = first; rotated && d < end; d += tiling.team * kWidth) {
        const auto xs = load_x(d);
        const auto codes = load_code(d);
        const auto grads = load_grad(d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float code_value = to_float(codes.values[j]);
          const float half = to_float(xs.values[j]) + code_value * stretch;
          const float grad = to_float(grads.values[j]);
          products[0] += half * half;
          products[1] += half * grad;
          products[2] += code_value * grad;
        }
      }
      team_sum(products, tiling, thread_tile);
      rotated = rotated && sqrtf(products[0]) > 1e-3f * x_norm;
      if (rotated) {
        along_half = 2 * products[1] / products[0];
        along_x = 2 * (products[2] / code_norm) / x_norm;
      }
    }

    T* out = static_cast<T*>(p.grad_x) + offset_of(position, p.inner, p.grad_x_strides);
    for (int64_t d = first; d < end; d += tiling.team * kWidth) {
      float sums[kWidth] = {};
      if (kept && p.grad_quantized != nullptr) {
        const auto grads = load_grad(d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          sums[j] = to_float(grads.values[j]);
      }
      if (kept && (rotated || p.grad_mse != nullptr)) {
        const auto xs = load_x(d);
        const auto codes = load_code(d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float x = to_float(xs.values[j]);
          const float e = to_float(codes.values[j]);
          if (rotated) {
            const float half = x + e * stretch;
            sums[j] = ratio * (sums[j] - half * along_half + x * along_x);
          }
          if (p.grad_mse != nullptr)
            sums[j] += factor * (x - e);
        }
      }
      Pack<T, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        result.values[j] = convert<T>(sums[j]);
      store_pack(out + d * p.grad_x_strides.channel, p.grad_x_strides.channel, p.channels - d,
                 vectorizable.out, result);
    }
  }
}

template <typename Params>
Vectorizable vectorizable_of(const Params& p,
                             const void* grad,
                             Strides grad_strides,
                             const void* out,
                             Strides out_strides,
                             int width) {
  const auto check = [&](const void* data, Strides strides) {
    return channels_vectorizable(data, p.outer, p.channels, p.inner, strides, width);
  };
  const Strides code_strides{p.code_stride, p.code_channel_stride, 0};
  return {check(p.x, p.x_strides),
          channels_vectorizable(p.codebook, p.num_codes, p.channels, 1, code_strides, width),
          check(grad, grad_strides), check(out, out_strides)};
}

}  // namespace

void launch_vector_quantize(const VectorQuantizeParams& params,
                            DType x_type,
                            DType code_type,
                            cudaStream_t stream) {
  constexpr const char* kOp = "vector_quantize";
  constexpr size_t kShared = sizeof(double[kWarps]);
  unsigned blocks = 0;
  dispatch(kOp, x_type, code_type, [&]<typename T, typename C>() {
    constexpr int kWidth = kWidthOf<T>;
    const VectorQuantizeParams& p = params;
    const Tiling tiling = tiling_of(p.outer, p.channels, p.inner, p.x_strides, kWidth);
    const Vectorizable vectorizable =
        vectorizable_of(p, nullptr, Strides{}, p.quantized, p.quantized_strides, kWidth);
    blocks = blocks_of(tiling);
    if (blocks == 0)
      return;
    launch(kOp, vector_quantize_kernel<T, C>, blocks, kThreads, kShared, stream, p, tiling,
           vectorizable);
  });
  launch(kOp, mean_error_kernel, 1, kThreads, kShared, stream, params, static_cast<int>(blocks));
}

void launch_vector_quantize_backward(const VectorQuantizeBackwardParams& params,
                                     DType x_type,
                                     DType code_type,
                                     cudaStream_t stream) {
  constexpr const char* kOp = "vector_quantize_backward";
  dispatch(kOp, x_type, code_type, [&]<typename T, typename C>() {
    constexpr int kWidth = kWidthOf<T>;
    const VectorQuantizeBackwardParams& p = params;
    const Tiling tiling = tiling_of(p.outer, p.channels, p.inner, p.x_strides, kWidth);
    const Vectorizable vectorizable = vectorizable_of(p, p.grad_quantized, p.grad_quantized_strides,
                                                      p.grad_x, p.grad_x_strides, kWidth);
    const unsigned blocks = blocks_of(tiling);
    if (blocks == 0)
      return;
    if (p.rotation && p.grad_quantized != nullptr) {
      constexpr size_t kShared = sizeof(float[3][kThreads]);
      launch(kOp, vector_quantize_backward_kernel<T, C, true>, blocks, kThreads, kShared, stream, p,
             tiling, vectorizable);
    } else {
      launch(kOp, vector_quantize_backward_kernel<T, C, false>, blocks, kThreads, 0, stream, p,
             tiling, vectorizable);
    }
  });
}

}  // namespace genperf
