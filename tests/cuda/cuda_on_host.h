// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the CPU, to check their values and memory accesses on a machine without a
// GPU. Compile a .cu file as C++20 with -DGENPERF_CUDA_ON_HOST, preferably with
// -fsanitize=address,undefined; launch.h then includes this header instead of CUDA's.
//
// The threads of a block are fibers, resumed in turn until all wait at the same barrier. Blocks run
// one after another. Shared memory is filled with 0xff bytes (NaN) at the start of a block, and
// accesses past the size given to launch() are errors. A barrier or shuffle that only some threads
// reach ends the process with a message. Not modeled: races between blocks or between barriers,
// memory order, timing, shuffles within part of a warp.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(...)
#define ASAN_UNPOISON_MEMORY_REGION(...)
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

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

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedBytes = 48 << 10;

// Where a thread stopped last.
enum class State { kAtWarp, kAtBlock, kReturned };

struct Fiber {
  State state = State::kReturned;
  uint3 index{};
  unsigned linear = 0;
  unsigned exchanges = 0;
  bool started = false;
  ucontext_t start{};  // of a fiber that has not run yet; later switches need no system call
  void* resume[5] = {};
  std::unique_ptr<char[]> memory;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

struct Machine {
  const char* op = "";
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0;
  Fiber scheduler;
  Fiber* current = nullptr;
  // The value that each thread offers in a shuffle. There are two sets, because some lanes may be
  // one shuffle ahead of others.
  uint64_t offers[2][kMaxThreads] = {};
};

inline Machine machine;
alignas(16) inline unsigned char shared_bytes_of_block[kSharedBytes];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s, block (%u, %u, %u): %s\n", machine.op, blockIdx.x,
               blockIdx.y, blockIdx.z, what);
  std::abort();
}

[[noreturn]] inline __attribute__((noinline, no_sanitize("address"))) void jump(Fiber& to) {
  if (to.started)
    __builtin_longjmp(to.resume, 1);
  to.started = true;
  setcontext(&to.start);
  std::abort();
}

inline __attribute__((noinline)) void switch_fiber(Fiber& from, Fiber& to) {
  [[maybe_unused]] void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_bytes);
  if (__builtin_setjmp(from.resume) == 0)
    jump(to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline void wait(State state) {
  Fiber& self = *machine.current;
  self.state = state;
  switch_fiber(self, machine.scheduler);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.stack,
                                  &machine.scheduler.stack_bytes);
  for (;;) {
    machine.kernel();
    wait(State::kReturned);
  }
}

inline void add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->memory = std::make_unique_for_overwrite<char[]>(kStackBytes);
  fiber->stack = fiber->memory.get();
  fiber->stack_bytes = kStackBytes;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->memory.get();
  fiber->start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->start, fiber_main, 0);
  machine.fibers.push_back(std::move(fiber));
}

// The common state of threads begin ... end-1.
inline State common_state(unsigned begin, unsigned end) {
  const State state = machine.fibers[begin]->state;
  for (unsigned i = begin + 1; i < end; ++i) {
    if (machine.fibers[i]->state != state)
      fail("a barrier or shuffle was reached by only some of the threads");
  }
  return state;
}

inline void run_block([[maybe_unused]] size_t shared_bytes) {
  ASAN_UNPOISON_MEMORY_REGION(shared_bytes_of_block, kSharedBytes);
  std::memset(shared_bytes_of_block, 0xff, kSharedBytes);
  ASAN_POISON_MEMORY_REGION(shared_bytes_of_block + shared_bytes, kSharedBytes - shared_bytes);
  const unsigned threads = machine.threads;
  do {
    for (unsigned begin = 0; begin < threads; begin += kWarp) {
      const unsigned end = begin + kWarp < threads ? begin + kWarp : threads;
      do {
        for (unsigned i = begin; i < end; ++i) {
          Fiber& fiber = *machine.fibers[i];
          threadIdx = fiber.index;
          machine.current = &fiber;
          switch_fiber(machine.scheduler, fiber);
        }
      } while (common_state(begin, end) == State::kAtWarp);
    }
  } while (common_state(0, threads) == State::kAtBlock);
}

inline void run(const char* op,
                dim3 grid,
                dim3 block,
                size_t shared_bytes,
                std::function<void()> kernel) {
  machine.op = op;
  machine.kernel = std::move(kernel);
  machine.threads = block.x * block.y * block.z;
  gridDim = grid;
  blockDim = block;
  if (machine.threads == 0 || machine.threads > kMaxThreads || shared_bytes > kSharedBytes ||
      grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("CUDA would not launch this grid, block or shared memory");
  }
  while (machine.fibers.size() < machine.threads)
    add_fiber();
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.linear = i;
    fiber.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  machine.scheduler.started = true;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        run_block(shared_bytes);
    }
  }
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu || machine.threads % kWarp != 0)
    fail("a shuffle of part of a warp");
  const unsigned self = machine.current->linear;
  uint64_t* offers = machine.offers[machine.current->exchanges++ % 2];
  std::memcpy(&offers[self], &value, sizeof(T));
  wait(State::kAtWarp);
  if (source_lane < kWarp)
    std::memcpy(&value, &offers[self / kWarp * kWarp + source_lane], sizeof(T));
  return value;
}

inline unsigned lane() {
  return machine.current->linear % kWarp;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::wait(cuda_on_host::State::kAtBlock);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::exchange(mask, value, static_cast<unsigned>(source) % cuda_on_host::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_on_host::exchange(mask, value,
                                cuda_on_host::lane() ^ static_cast<unsigned>(lane_mask));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  return cuda_on_host::exchange(mask, value, cuda_on_host::lane() + static_cast<unsigned>(delta));
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
  cuda_on_host::run(op, grid, block, shared_bytes, [&] { kernel(args...); });
}

template <typename T>
T& shared_memory() {
  return *reinterpret_cast<T*>(cuda_on_host::shared_bytes_of_block);
}

}  // namespace genperf
