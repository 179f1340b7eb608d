// SPDX-License-Identifier: Apache-2.0
//
// Shared by the bindings of the CUDA kernels, which check what memory safety requires, allocate the
// outputs and fill the params. The schemas are in library.cpp.
//
// Only the LibTorch stable ABI is used, so one binary serves every torch from 2.11 on. The library
// also loads with a torch without CUDA, because its only CUDA symbol, the current stream, is weak.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "samples.h"

extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// Of the CUDA runtime, whose header needs a CUDA installation.
extern "C" int cudaStreamIsCapturing(cudaStream_t stream, int* status);

namespace genperf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Makes x's device current during its lifetime, and holds the current stream.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA.");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  DeviceGuard guard_;
  cudaStream_t stream_;
};

// The ticket that the blocks of a launch take to find the last one. It is zero before and after a
// launch, and launches of a stream run one after another, so a stream needs one. A graph may be
// replayed beside other work of the stream that captured it, so each launch in it has its own.
inline Tensor ticket_of(const Tensor& x, const Launch& launch) {
  int capturing = 0;
  STD_TORCH_CHECK(cudaStreamIsCapturing(launch.stream(), &capturing) == 0,
                  "the state of the CUDA stream is unknown.");
  // 1 and 2 stand for the streams of a thread, which can differ from thread to thread.
  const auto handle = reinterpret_cast<uintptr_t>(launch.stream());
  if (capturing != 0 || handle == 1 || handle == 2)
    return torch::stable::new_zeros(x, {1}, ScalarType::Int);
  static std::mutex mutex;
  // Never destroyed, because torch may be gone first.
  static auto& tickets = *new std::map<std::pair<int32_t, cudaStream_t>, Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair key(x.get_device_index(), launch.stream());
  auto found = tickets.find(key);
  if (found == tickets.end())
    found = tickets.emplace(key, torch::stable::new_zeros(x, {1}, ScalarType::Int)).first;
  return found->second;
}

inline DType dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, bfloat16 and float16.");
  }
}

inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void check_same_device(const char* op,
                              const char* name,
                              const Tensor& tensor,
                              const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), op, ": ",
                  name, " must be on x's device.");
}

inline void check_scalar(const char* op,
                         const char* name,
                         const Tensor& tensor,
                         ScalarType dtype,
                         const Tensor& x) {
  check_same_device(op, name, tensor, x);
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == dtype, op, ": ", name,
                  " must be one element of the right dtype.");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
         a.size(2) == b.size(2);
}

// Checks for x's shape and dtype, or float32 if allowed.
inline void check_like(const char* op,
                       const char* name,
                       const Tensor& tensor,
                       const Tensor& x,
                       bool or_float32 = false) {
  check_same_device(op, name, tensor, x);
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(same_shape(tensor, x) &&
                      (dtype == x.scalar_type() || (or_float32 && dtype == ScalarType::Float)),
                  op, ": ", name, " has the wrong shape or dtype.");
}

inline void check_vector(const char* op,
                         const char* name,
                         const Tensor& tensor,
                         ScalarType dtype,
                         const Tensor& x) {
  check_same_device(op, name, tensor, x);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == x.size(0) && tensor.scalar_type() == dtype,
                  op, ": ", name, " must hold one number of the right dtype for each sample.");
}

inline void check_positions(const char* op,
                            const char* name,
                            const Tensor& tensor,
                            ScalarType dtype,
                            const Tensor& x) {
  check_same_device(op, name, tensor, x);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has the wrong dtype.");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(2),
                  op, ": ", name, " must have shape [outer, inner] for x [outer, D, inner].");
}

inline void check_codes(const char* op, const char* name, const Tensor& codes, const Tensor& x) {
  check_same_device(op, name, codes, x);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == x.size(1), op, ": ", name,
                  " must have shape [K, D] for x [outer, D, inner].");
}

// For residual quantization: x [outer, D, inner], float32 codebooks [Q, K, D], and contiguous
// indices [outer, inner, Q].
inline void check_residual_codebooks(const char* op, const Tensor& x, const Tensor& codebooks) {
  check_same_device(op, "codebooks", codebooks, x);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && codebooks.dim() == 3 && codebooks.size(0) > 0 &&
                      codebooks.size(2) == x.size(1) &&
                      codebooks.scalar_type() == ScalarType::Float,
                  op, ": codebooks must be float32 [Q, K, D] for x [outer, D, inner].");
}

inline void check_residual(const char* op,
                           const Tensor& x,
                           const Tensor& codebooks,
                           const Tensor& indices) {
  check_residual_codebooks(op, x, codebooks);
  check_same_device(op, "indices", indices, x);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 3 &&
                      indices.size(0) == x.size(0) && indices.size(1) == x.size(2) &&
                      indices.size(2) == codebooks.size(0),
                  op, ": indices must be int64 [outer, inner, Q].");
}

inline void check_losses(const char* op,
                         const Tensor& losses,
                         const Tensor& codebooks,
                         const Tensor& x) {
  check_same_device(op, "grad_mse", losses, x);
  STD_TORCH_CHECK(losses.dim() == 1 && losses.size(0) == codebooks.size(0) &&
                      losses.scalar_type() == ScalarType::Float,
                  op, ": the gradient of the losses must be float32 [Q].");
}

inline void check_x(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, op, ": x must have shape [outer, D, inner].");
}

inline void check_samples(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": samples must have shape [B, rows, columns].");
}

// A seed on the CPU is passed to the kernel as a value, without a copy to the device. A graph that
// captures the kernel would keep that value.
inline Seed seed_of(const char* op,
                    const std::optional<Tensor>& seed,
                    int64_t first,
                    const Tensor& x) {
  if (!seed)
    return {};
  STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op,
                  ": seed must be one int64.");
  if (!seed->is_cpu()) {
    check_same_device(op, "seed", *seed, x);
    return {static_cast<const int64_t*>(seed->const_data_ptr()), 0, first};
  }
  return {nullptr, *static_cast<const int64_t*>(seed->const_data_ptr()), first};
}

// Checks that the noise is given or a seed to draw it from.
inline void check_noise(const char* op,
                        const std::optional<Tensor>& noise,
                        const std::optional<Tensor>& seed,
                        const Tensor& x) {
  STD_TORCH_CHECK(noise || seed, op, ": needs noise or a seed.");
  if (noise)
    check_like(op, "noise", *noise, x, true);
}

inline SampleShape sample_shape_of(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2)};
}

inline SampleInput sample_input(const Tensor& x) {
  return {x.const_data_ptr(),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          x.scalar_type() == ScalarType::Float,
          false};
}

inline SampleInput sample_input(const std::optional<Tensor>& x) {
  return x ? sample_input(*x) : SampleInput{};
}

inline SampleOutput sample_output(const Tensor& x) {
  return {x.mutable_data_ptr(),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          x.scalar_type() == ScalarType::Float,
          false};
}

inline SampleOutput sample_output(const std::optional<Tensor>& x) {
  return x ? sample_output(*x) : SampleOutput{};
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional(torch::stable::contiguous(*x)) : std::nullopt;
}

inline Tensor empty_like(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional(dtype)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// For finite scalar and lookup-free quantization.
inline void check_channels(const char* op, const Tensor& x, int64_t most) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1 && x.size(1) <= most, op,
                  ": x must have shape [outer, D, inner] and at most ", most, " channels.");
}

template <typename Params>
void set_shape(Params& params, const Tensor& x) {
  params.x = x.const_data_ptr();
  params.x_strides = strides_of(x);
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
}

template <typename Params>
Tensor quantized_of(Params& params, const Tensor& x) {
  Tensor quantized = torch::stable::empty_like(x);
  params.quantized = quantized.mutable_data_ptr();
  params.quantized_strides = strides_of(quantized);
  return quantized;
}

template <typename Params>
Tensor gradient_of(const char* op, Params& params, const Tensor& grad_quantized, const Tensor& x) {
  check_like(op, "grad_quantized", grad_quantized, x);
  Tensor grad_x = torch::stable::empty_like(x);
  params.grad_quantized = grad_quantized.const_data_ptr();
  params.grad_quantized_strides = strides_of(grad_quantized);
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_x_strides = strides_of(grad_x);
  return grad_x;
}

}  // namespace genperf
