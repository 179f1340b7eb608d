// SPDX-License-Identifier: Apache-2.0
//
// Lookup-free quantization: the sign of each channel; backward is the gradient of the
// normalization.
#include "lookup_free_quantize.h"

#include "implicit_codes.h"

namespace genperf {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kCodeThreads)
    lookup_free_quantize_kernel(LookupFreeQuantizeParams p, CodeTiling tiling) {
  CodeShared& shared = shared_memory<CodeShared>();
  if (static_cast<int>(threadIdx.x) < tiling.channels)
    shared.basis[threadIdx.x] = int64_t{1} << (tiling.channels - 1 - threadIdx.x);
  quantize_tiles<T, kWidth>(static_cast<const T*>(p.x), static_cast<T*>(p.quantized), p.indices,
                            tiling, p.x_strides, p.quantized_strides, shared.digits(), shared.basis,
                            [&](float x, int) { return quantize_sign<Scalar>(x, p.size); });
}

// The gradient through x / |x|, which is orthogonal to x. One thread per position.
template <typename T>
__global__ void __launch_bounds__(kCodeThreads)
    lookup_free_quantize_backward_kernel(LookupFreeQuantizeBackwardParams p) {
  constexpr float kLeast = 1e-12f;  // as in torch.nn.functional.normalize
  const int64_t positions = p.outer * p.inner;
  for (int64_t position = int64_t{blockIdx.x} * kCodeThreads + threadIdx.x; position < positions;
       position += int64_t{gridDim.x} * kCodeThreads) {
    const T* x = static_cast<const T*>(p.x) + offset_of(position, p.inner, p.x_strides);
    const T* grad = static_cast<const T*>(p.grad_quantized) +
                    offset_of(position, p.inner, p.grad_quantized_strides);
    T* out = static_cast<T*>(p.grad_x) + offset_of(position, p.inner, p.grad_x_strides);
    // In double, because the square of a length above kLeast can underflow in float.
    double square = 0;
    double product = 0;
    for (int64_t d = 0; d < p.channels; ++d) {
      const float value = to_float(x[d * p.x_strides.channel]);
      square += static_cast<double>(value) * value;
      product += static_cast<double>(value) * to_float(grad[d * p.grad_quantized_strides.channel]);
    }
    const double norm = sqrt(square);
    const float factor = static_cast<float>(p.scale / (norm < kLeast ? kLeast : norm));
    const float along = norm < kLeast ? 0.0f : static_cast<float>(product / square);
    for (int64_t d = 0; d < p.channels; ++d) {
      const float value = to_float(grad[d * p.grad_quantized_strides.channel]) -
                          along * to_float(x[d * p.x_strides.channel]);
      out[d * p.grad_x_strides.channel] = convert<T>(factor * value);
    }
  }
}

}  // namespace

void launch_lookup_free_quantize(const LookupFreeQuantizeParams& p,
                                 DType type,
                                 cudaStream_t stream) {
  constexpr const char* kOp = "lookup_free_quantize";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const CodeTiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kCodeThreads, shared_bytes(tiling, true), stream, p,
             tiling);
    };
    if (runs_vectorizable(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_vectorizable(p.quantized, tiling, p.outer, p.quantized_strides, kWidth))
      run(lookup_free_quantize_kernel<T, kWidth>);
    else
      run(lookup_free_quantize_kernel<T, 1>);
  });
}

void launch_lookup_free_quantize_backward(const LookupFreeQuantizeBackwardParams& p,
                                          DType type,
                                          cudaStream_t stream) {
  constexpr const char* kOp = "lookup_free_quantize_backward";
  const int64_t blocks = (p.outer * p.inner + kCodeThreads - 1) / kCodeThreads;
  if (blocks == 0)
    return;
  dispatch(kOp, type, [&]<typename T>() {
    launch(kOp, lookup_free_quantize_backward_kernel<T>,
           static_cast<unsigned>(blocks < kCodeBlocks ? blocks : kCodeBlocks), kCodeThreads, 0,
           stream, p);
  });
}

}  // namespace genperf
