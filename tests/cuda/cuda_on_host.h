// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the CPU, to check their values and memory accesses on a machine without a
// GPU. Compile a .cu file as C++20 with -DGENPERF_CUDA_ON_HOST, and with the sanitizers that
// cuda_on_host/harness.py names; launch.h then includes this header instead of CUDA's.
//
// The threads of a block are fibers that run in random order, see cuda_on_host/machine.h; races are
// detected, see cuda_on_host/races.h. Accesses to shared memory past the size given to launch() are
// errors. A barrier or shuffle that only some threads reach, and a ticket (atomicInc) of a thread
// that did not fence its writes, end the process with a message. Not modeled: memory order beyond
// that, timing, shuffles within part of a warp.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_on_host/controls.h"
#include "cuda_on_host/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
};

struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(uint32_t{value.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value))
    return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00)
    return std::bit_cast<float>(sign | 0x7f800000 | magnitude << 13);
  // The exponent is 112 too small, which the product corrects, for subnormal numbers too.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline __half __float2half_rn(float value) {
  if (std::isnan(value))
    return {0x7fff};
  const uint16_t sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f)
    return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
    const auto steps = static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
    return {static_cast<uint16_t>(sign | steps)};
  }
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13))};
}

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_on_host::barrier(where);
}

inline int __syncthreads_count(int predicate) {
  return cuda_on_host::count(predicate != 0);
}

inline int __syncthreads_or(int predicate) {
  return cuda_on_host::count(predicate != 0) > 0;
}

inline int __syncthreads_and(int predicate) {
  return cuda_on_host::count(predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::warp_barrier(mask);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::shuffled(mask, value, static_cast<unsigned>(source) % cuda_on_host::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_on_host::shuffled(mask, value,
                                cuda_on_host::lane() ^ static_cast<unsigned>(lane_mask));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return cuda_on_host::shuffled(mask, value, cuda_on_host::lane() + delta);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return cuda_on_host::shuffled(mask, value, cuda_on_host::lane() - delta);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_host::ballot(mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate) {
  return cuda_on_host::ballot(mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  return cuda_on_host::ballot(mask, predicate == 0) == 0;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return cuda_on_host::match(mask, value);
}

inline int __popc(unsigned value) {
  return std::popcount(value);
}

inline int __popcll(unsigned long long value) {
  return std::popcount(value);
}

inline int __clz(int value) {
  return std::countl_zero(static_cast<unsigned>(value));
}

inline int __clzll(long long value) {
  return std::countl_zero(static_cast<unsigned long long>(value));
}

inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}

inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}

inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}

inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline void __threadfence() {
  cuda_on_host::machine.current->fenced = true;
}

inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return static_cast<T>(old + value); });
}

template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return static_cast<T>(old - value); });
}

template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return std::max(old, value); });
}

template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return std::min(old, value); });
}

template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return old | value; });
}

template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return old & value; });
}

template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T) { return value; });
}

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_on_host::atomically(address, [&](T old) { return old == expected ? value : old; });
}

// The ticket of a block among the blocks of a launch.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  cuda_on_host::take_ticket(address);
  return cuda_on_host::atomically(address, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

namespace genperf {

template <typename... Params, typename... Args>
void launch(const char* op,
            void (*kernel)(Params...),
            dim3 grid,
            dim3 block,
            size_t shared_bytes,
            cudaStream_t,
            const Args&... args) {
  auto& kernels = cuda_on_host::machine.kernels;
  const auto* const address = reinterpret_cast<const void*>(kernel);
  if (std::find(kernels.begin(), kernels.end(), address) == kernels.end())
    kernels.push_back(address);
  cuda_on_host::run(op, grid, block, shared_bytes, [&] { kernel(args...); });
}

template <typename T>
T& shared_memory() {
  return *reinterpret_cast<T*>(cuda_on_host::shared_bytes_of_block);
}

}  // namespace genperf
