// SPDX-License-Identifier: Apache-2.0
//
// Shared by the CUDA kernels. The first part is for every compiler: the types of the launchers'
// parameters. The second part is for compilers of kernels: nvcc, or a C++ compiler with
// GENPERF_CUDA_ON_HOST, where cuda_on_host.h replaces CUDA and runs the kernels on the CPU.
// Therefore kernels are started with launch() and get shared memory from shared_memory().
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace genperf {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Strides of a tensor [outer, D, inner], in elements.
struct Strides {
  int64_t outer;
  int64_t channel;
  int64_t inner;
};

// Of noise that is drawn, see noise.h: that of sample or position i is row first + i.
struct Seed {
  const int64_t* data;  // [], or null for the value
  int64_t value;
  int64_t first;
};

}  // namespace genperf

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(GENPERF_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace genperf {

template <typename... Params, typename... Args>
void launch(const char* op,
            void (*kernel)(Params...),
            dim3 grid,
            dim3 block,
            size_t shared_bytes,
            cudaStream_t stream,
            const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) +
                             ": the kernel did not launch: " + cudaGetErrorString(error));
  }
}

// The dynamic shared memory of the block, of the size given to launch().
template <typename T>
__device__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char genperf_shared_memory[];
  return *reinterpret_cast<T*>(genperf_shared_memory);
}

}  // namespace genperf
#endif

namespace genperf {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ inline float to_float(__half value) {
  return __half2float(value);
}

__device__ inline uint64_t value_of(const Seed& seed) {
  return static_cast<uint64_t>(seed.data == nullptr ? seed.value : *seed.data);
}

// Rounds to nearest. A value of type T is returned unchanged.
template <typename T, typename From>
__device__ T convert(From value) {
  if constexpr (std::is_same_v<T, From>) {
    return value;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(to_float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(to_float(value));
  } else {
    return to_float(value);
  }
}

// kWidth elements, loaded and stored at once, or in pieces of 16 bytes.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) Pack {
  T values[kWidth];
};

template <typename T, int kWidth>
__device__ Pack<T, kWidth> load_pack(const T* first,
                                     int64_t stride,
                                     int64_t count,
                                     bool vectorizable) {
  if (vectorizable)
    return *reinterpret_cast<const Pack<T, kWidth>*>(first);
  Pack<T, kWidth> pack;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    pack.values[j] = j < count ? first[j * stride] : convert<T>(0.0f);
  }
  return pack;
}

template <typename T, int kWidth>
__device__ void store_pack(T* first,
                           int64_t stride,
                           int64_t count,
                           bool vectorizable,
                           const Pack<T, kWidth>& pack) {
  if (vectorizable) {
    *reinterpret_cast<Pack<T, kWidth>*>(first) = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < count)
      first[j * stride] = pack.values[j];
  }
}

// Calls run<T, C>() with the C++ types of a tensor and its codebook.
template <typename Run>
void dispatch(const char* op, DType x_type, DType code_type, Run run) {
  const auto is = [&](DType x, DType code) { return x_type == x && code_type == code; };
  if (is(DType::kFloat32, DType::kFloat32)) {
    run.template operator()<float, float>();
  } else if (is(DType::kBFloat16, DType::kBFloat16)) {
    run.template operator()<__nv_bfloat16, __nv_bfloat16>();
  } else if (is(DType::kFloat16, DType::kFloat16)) {
    run.template operator()<__half, __half>();
  } else if (is(DType::kBFloat16, DType::kFloat32)) {
    run.template operator()<__nv_bfloat16, float>();
  } else if (is(DType::kFloat16, DType::kFloat32)) {
    run.template operator()<__half, float>();
  } else {
    throw std::runtime_error(std::string(op) + ": no kernel for this pair of dtypes");
  }
}

// Calls run<T>() with the C++ type of a tensor.
template <typename Run>
void dispatch(const char* op, DType type, Run run) {
  dispatch(op, type, type, [&]<typename T, typename>() { run.template operator()<T>(); });
}

}  // namespace genperf

#endif
