// SPDX-License-Identifier: Apache-2.0
//
// Gathers codes, sums the squared error, and computes the gradient of the input.
//
// Blocks cover the same positions on every device and sum the error in double. The block that
// finishes last adds the sums of all, in order, so the loss is the same in every run.
#include "vector_quantize.h"

#include "rotation.h"

namespace genperf {
namespace {

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
  PairOfSums total{error, static_cast<double>(valid)};
  if (!sum_over_blocks(total, p.partials, p.ticket))
    return;
  const auto [total_error, total_valid] = total;
  if (threadIdx.x == 0) {
    const double elements = total_valid * static_cast<double>(p.channels);
    *p.loss = (elements > 0 ? static_cast<float>(total_error / elements) : 0.0f) * p.weight;
    *p.valid = static_cast<int64_t>(total_valid);
  }
}

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
    const TeamChannels channels{thread_tile.lane * kWidth, inside ? p.channels : 0,
                                tiling.team * kWidth};

    const T* x_row = static_cast<const T*>(p.x) + offset_of(position, p.inner, p.x_strides);
    const T* grad_row =
        static_cast<const T*>(p.grad_quantized) +
        (p.grad_quantized == nullptr ? 0 : offset_of(position, p.inner, p.grad_quantized_strides));
    const C* code_row = static_cast<const C*>(p.codebook) + (kept ? code * p.code_stride : 0);
    const auto load_x = [&](int64_t d) {
      return load_floats<T, kWidth>(x_row, d, p.x_strides.channel, p.channels, vectorizable.x);
    };
    const auto load_code = [&](int64_t d) {
      return load_floats<C, kWidth>(code_row, d, p.code_channel_stride, p.channels,
                                    vectorizable.code);
    };
    const auto load_grad = [&](int64_t d) {
      return load_floats<T, kWidth>(grad_row, d, p.grad_quantized_strides.channel, p.channels,
                                    vectorizable.grad);
    };

    Rotation rotation;
    if constexpr (kRotation)
      rotation =
          rotation_of<kWidth>(tiling, thread_tile, channels, kept, load_x, load_code, load_grad);
    T* out = static_cast<T*>(p.grad_x) + offset_of(position, p.inner, p.grad_x_strides);
    for (int64_t d = channels.first; d < channels.end; d += channels.step) {
      Pack<float, kWidth> sums{};
      if (kept && p.grad_quantized != nullptr)
        sums = load_grad(d);
      if (kept && (rotation.exists || p.grad_mse != nullptr)) {
        const auto xs = load_x(d);
        const auto codes = load_code(d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float x = xs.values[j];
          const float e = codes.values[j];
          if (rotation.exists)
            sums.values[j] = rotation.gradient(sums.values[j], x, e);
          if (p.grad_mse != nullptr)
            sums.values[j] += factor * (x - e);
        }
      }
      Pack<T, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        result.values[j] = convert<T>(sums.values[j]);
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
  dispatch(kOp, x_type, code_type, [&]<typename T, typename C>() {
    constexpr int kWidth = kWidthOf<T>;
    const VectorQuantizeParams& p = params;
    const Tiling tiling = tiling_of(p.outer, p.channels, p.inner, p.x_strides, kWidth);
    const Vectorizable vectorizable =
        vectorizable_of(p, nullptr, Strides{}, p.quantized, p.quantized_strides, kWidth);
    const unsigned blocks = blocks_of(tiling);
    launch(kOp, vector_quantize_kernel<T, C>, blocks > 0 ? blocks : 1, kThreads, kShared, stream, p,
           tiling, vectorizable);
  });
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
