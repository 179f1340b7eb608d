// SPDX-License-Identifier: Apache-2.0
//
// Finite scalar quantization: bounds each channel and rounds it to a grid; backward is the gradient
// of the bound.
#include "finite_scalar_quantize.h"

#include "implicit_codes.h"

namespace genperf {
namespace {

struct Table {
  ChannelGrid levels[kMaxChannels];
};

template <typename Params>
Table table_of(const Params& p) {
  Table table{};
  uint64_t basis = 1;  // may wrap if no indices are wanted
  for (int64_t d = 0; d < p.channels; ++d) {
    table.levels[d] = channel_grid(p.levels[d], p.symmetric, p.hard, static_cast<int64_t>(basis));
    basis *= static_cast<uint64_t>(p.levels[d]);
  }
  return table;
}

__device__ inline void load_constants(CodeShared& shared, const Table& table, int channels) {
  if (static_cast<int>(threadIdx.x) < channels) {
    const int d = threadIdx.x;
    const ChannelGrid level = table.levels[d];
    const float constants[] = {level.shift,   level.half, level.offset, level.middle,
                               level.divisor, level.top,  level.slope};
#pragma unroll
    for (int i = 0; i < 7; ++i)
      shared.constants[i][d] = constants[i];
    shared.basis[d] = level.basis;
  }
  __syncthreads();
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kCodeThreads)
    finite_scalar_quantize_kernel(FiniteScalarQuantizeParams p, CodeTiling tiling, Table table) {
  CodeShared& shared = shared_memory<CodeShared>();
  load_constants(shared, table, tiling.channels);
  const bool symmetric = p.symmetric;
  const bool hard = p.hard;
  quantize_tiles<T, kWidth>(
      static_cast<const T*>(p.x), static_cast<T*>(p.quantized), p.indices, tiling, p.x_strides,
      p.quantized_strides, shared.digits(), shared.basis, [&](float x, int d) {
        const auto& c = shared.constants;
        return quantize_channel<Scalar>(x, {c[0][d], c[1][d], c[2][d], c[3][d], c[4][d], c[5][d]},
                                        symmetric, hard);
      });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kCodeThreads)
    finite_scalar_quantize_backward_kernel(FiniteScalarQuantizeBackwardParams p,
                                           CodeTiling tiling,
                                           Table table) {
  CodeShared& shared = shared_memory<CodeShared>();
  load_constants(shared, table, tiling.channels);
  const T* const x = static_cast<const T*>(p.x);
  const T* const grad = static_cast<const T*>(p.grad_quantized);
  T* const out = static_cast<T*>(p.grad_x);
  for_each_tile(tiling, [&](int64_t first, int count) {
    const int elements = (tiling.channels_last ? count : kCodePositions) * tiling.channels;
    for (int n = threadIdx.x * kWidth; n < elements; n += kCodeThreads * kWidth) {
      const TileElement e = element_of(n, tiling);
      if (e.position >= count)
        continue;
      const int64_t left = tiling.channels_last ? elements - n : count - e.position;
      const bool full = kWidth > 1 && left >= kWidth;
      const auto xs =
          load_pack<T, kWidth>(x + element_offset(first, e, tiling, p.x_strides), 1, left, full);
      const auto grads = load_pack<T, kWidth>(
          grad + element_offset(first, e, tiling, p.grad_quantized_strides), 1, left, full);
      Pack<T, kWidth> values;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int d = tiling.channels_last ? (n + j) % tiling.channels : e.channel;
        const float slope = channel_slope<Scalar>(to_float(xs.values[j]), shared.constants[0][d],
                                                  shared.constants[6][d], p.hard);
        values.values[j] = convert<T>(to_float(grads.values[j]) * slope);
      }
      store_pack(out + element_offset(first, e, tiling, p.grad_x_strides), 1, left, full, values);
    }
  });
}

}  // namespace

void launch_finite_scalar_quantize(const FiniteScalarQuantizeParams& p,
                                   DType type,
                                   cudaStream_t stream) {
  constexpr const char* kOp = "finite_scalar_quantize";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const CodeTiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kCodeThreads,
             shared_bytes(tiling, p.indices != nullptr), stream, p, tiling, table_of(p));
    };
    if (runs_vectorizable(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_vectorizable(p.quantized, tiling, p.outer, p.quantized_strides, kWidth))
      run(finite_scalar_quantize_kernel<T, kWidth>);
    else
      run(finite_scalar_quantize_kernel<T, 1>);
  });
}

void launch_finite_scalar_quantize_backward(const FiniteScalarQuantizeBackwardParams& p,
                                            DType type,
                                            cudaStream_t stream) {
  constexpr const char* kOp = "finite_scalar_quantize_backward";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const CodeTiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kCodeThreads, shared_bytes(tiling, false), stream, p,
             tiling, table_of(p));
    };
    if (runs_vectorizable(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_vectorizable(p.grad_quantized, tiling, p.outer, p.grad_quantized_strides, kWidth) &&
        runs_vectorizable(p.grad_x, tiling, p.outer, p.grad_x_strides, kWidth))
      run(finite_scalar_quantize_backward_kernel<T, kWidth>);
    else
      run(finite_scalar_quantize_backward_kernel<T, 1>);
  });
}

}  // namespace genperf
