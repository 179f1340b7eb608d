// SPDX-License-Identifier: Apache-2.0
//
// The threads of a block as fibers of one thread of the CPU, and the order in which they run.
//
// Blocks run one after another, in random order. Between two barriers a random warp is resumed, and
// of that its lanes in random order, until all threads wait at the same barrier; each runs until
// its next barrier or shuffle. Shared memory is poisoned at the start of a block, with NaN or with
// large numbers. All random choices follow from the seed. One of four launches runs a second time,
// on the same memory and in another order, and has to write the same. races.h finds what no order
// shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

#if defined(__SANITIZE_THREAD__)  // with AddressSanitizer's runtime, see races.h
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __asan_poison_memory_region(...)
#define __asan_unpoison_memory_region(...)
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedBytes = 48 << 10;
constexpr unsigned kRepeated = 4;  // one of so many launches runs again in another order

// Where a thread stopped last.
enum class State { kAtWarp, kAtBlock, kReturned };

struct Fiber {
  State state = State::kReturned;
  uint3 index{};
  unsigned linear = 0;
  unsigned exchanges = 0;
  unsigned votes = 0;
  uint16_t warp_barriers = 0;
  bool fenced = false;  // since the start of the block or the last ticket
  bool started = false;
  ucontext_t start{};  // of a fiber that has not run yet; later switches need no system call
  void* resume[5] = {};
  std::unique_ptr<char[]> memory;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

// Of a barrier in the source.
struct Place {
  const char* file = "";
  unsigned line = 0;

  bool operator==(const Place& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

struct Machine {
  const char* op = "";
  std::function<void()> kernel;
  Fiber fibers[kMaxThreads];
  unsigned threads = 0;
  Fiber scheduler;
  Fiber* current = nullptr;
  uint64_t random = 0;
  int launches = 0;
  // The values that the threads offer in a shuffle or a vote of the block. There are two sets of
  // each, because some threads may be one shuffle ahead of others.
  uint64_t offers[2][kMaxThreads] = {};
  uint64_t votes[2][kMaxThreads] = {};
  Place barriers[sizeof(Trace::needed)] = {};  // that were reached; the first stands for others
  unsigned barrier_count = 1;
  std::vector<const void*> kernels;  // that ran
  unsigned next_barrier = 0;         // that thread 0 waits at
  std::string listed;
  Place omitted{};  // the barrier that is passed over
  std::string omitted_file;
};

inline Machine machine;
alignas(16) inline unsigned char shared_bytes_of_block[kSharedBytes];

[[noreturn]] inline __attribute__((used)) void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s, block (%u, %u, %u): %s\n", machine.op, blockIdx.x,
               blockIdx.y, blockIdx.z, what);
  std::abort();
}

// A random number below `count`; Steele et al., "Fast splittable pseudorandom number generators"
// (2014).
inline unsigned draw(unsigned count) {
  uint64_t z = machine.random += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return static_cast<unsigned>((z >> 32) * count >> 32);
}

// Sets numbers to 0 ... count-1 in random order.
inline void shuffle(unsigned* numbers, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    const unsigned j = draw(i + 1);
    numbers[i] = numbers[j];
    numbers[j] = i;
  }
}

[[noreturn]] inline __attribute__((noinline, no_sanitize("thread"))) void jump(Fiber& to) {
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
  trace.running = false;
  switch_fiber(self, machine.scheduler);
  trace.running = true;
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.stack,
                                  &machine.scheduler.stack_bytes);
  trace.running = true;
  for (;;) {
    machine.kernel();
    wait(State::kReturned);
  }
}

inline void allocate_stack(Fiber& fiber) {
  fiber.memory = std::make_unique_for_overwrite<char[]>(kStackBytes);
  fiber.stack = fiber.memory.get();
  fiber.stack_bytes = kStackBytes;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.memory.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, fiber_main, 0);
}

// The common state of threads begin ... end-1.
inline State common_state(unsigned begin, unsigned end) {
  const State state = machine.fibers[begin].state;
  for (unsigned i = begin + 1; i < end; ++i) {
    if (machine.fibers[i].state != state)
      fail("a barrier or shuffle was reached by only some of the threads");
  }
  return state;
}

// Resumes each lane of a warp once.
inline State step_warp(unsigned warp) {
  const unsigned begin = warp * kWarp;
  const unsigned lanes = begin + kWarp < machine.threads ? kWarp : machine.threads - begin;
  unsigned order[kWarp];
  shuffle(order, lanes);
  for (unsigned i = 0; i < lanes; ++i) {
    Fiber& fiber = machine.fibers[begin + order[i]];
    threadIdx = fiber.index;
    machine.current = &fiber;
    trace.thread = fiber.linear;
    trace.warp_barriers = fiber.warp_barriers;
    trace.stack = reinterpret_cast<uintptr_t>(fiber.stack);
    trace.stack_end = trace.stack + fiber.stack_bytes;
    switch_fiber(machine.scheduler, fiber);
  }
  return common_state(begin, begin + lanes);
}

inline void run_block(size_t shared_bytes) {
  __asan_unpoison_memory_region(shared_bytes_of_block, kSharedBytes);
  // A NaN can get lost in a maximum and -1 may stand for "none", so there is a second pattern.
  std::memset(shared_bytes_of_block, draw(2) == 0 ? 0xff : 0x7e, kSharedBytes);
  __asan_poison_memory_region(shared_bytes_of_block + shared_bytes, kSharedBytes - shared_bytes);
  for (unsigned i = 0; i < machine.threads; ++i)
    machine.fibers[i].fenced = false;
  trace.block_begin = trace.interval + 1;
  unsigned running[kMaxThreads / kWarp];
  do {
    ++trace.interval;
    trace.barrier = machine.next_barrier;
    unsigned left = (machine.threads + kWarp - 1) / kWarp;
    for (unsigned i = 0; i < left; ++i)
      running[i] = i;
    while (left > 0) {
      unsigned& warp = running[draw(left)];
      if (step_warp(warp) != State::kAtWarp)
        warp = running[--left];
    }
  } while (common_state(0, machine.threads) == State::kAtBlock);
}

inline void run_blocks(size_t shared_bytes) {
  trace.launch_begin = trace.interval + 1;
  std::vector<unsigned> order(size_t{gridDim.x} * gridDim.y * gridDim.z);
  shuffle(order.data(), static_cast<unsigned>(order.size()));
  for (const unsigned i : order) {
    blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / (gridDim.x * gridDim.y)};
    run_block(shared_bytes);
  }
}

inline void run(const char* op,
                dim3 grid,
                dim3 block,
                size_t shared_bytes,
                std::function<void()> kernel) {
  machine.op = op;
  machine.kernel = std::move(kernel);
  machine.threads = block.x * block.y * block.z;
  ++machine.launches;
  gridDim = grid;
  blockDim = block;
  if (machine.threads == 0 || machine.threads > kMaxThreads || shared_bytes > kSharedBytes ||
      grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("CUDA would not launch this grid, block or shared memory");
  }
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.memory == nullptr)
      allocate_stack(fiber);
    fiber.linear = i;
    fiber.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  machine.scheduler.started = true;
  trace.machine = reinterpret_cast<uintptr_t>(&machine);
  trace.machine_end = trace.machine + sizeof(machine);
  trace.shared = reinterpret_cast<uintptr_t>(shared_bytes_of_block);
  trace.shared_end = trace.shared + kSharedBytes;
  trace.saves = trace.enabled && draw(kRepeated) == 0;
  run_blocks(shared_bytes);
  if (trace.saves) {
    trace.saves = false;
    cuda_on_host_undo_launch();
    run_blocks(shared_bytes);
    if (!cuda_on_host_same_results())
      fail("the results depend on the order of threads or blocks");
  }
}

// The values that the lanes of this warp pass, valid until the next call but one.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu || machine.threads % kWarp != 0)
    fail("a shuffle of part of a warp");
  const unsigned self = machine.current->linear;
  uint64_t* offers = machine.offers[machine.current->exchanges++ % 2];
  offers[self] = value;
  wait(State::kAtWarp);
  return offers + self / kWarp * kWarp;
}

template <typename T>
T shuffled(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* offers = exchange(mask, bits);
  if (source_lane < kWarp)
    std::memcpy(&value, offers + source_lane, sizeof(T));
  return value;
}

inline void warp_barrier(unsigned mask) {
  exchange(mask, 0);
  trace.warp_barriers = ++machine.current->warp_barriers;
}

inline unsigned lane() {
  return machine.current->linear % kWarp;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  const uint64_t* offers = exchange(mask, predicate);
  unsigned result = 0;
  for (unsigned i = 0; i < kWarp; ++i)
    result |= static_cast<unsigned>(offers[i]) << i;
  return result;
}

// The lanes whose value has the same bits.
template <typename T>
unsigned match(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* offers = exchange(mask, bits);
  unsigned result = 0;
  for (unsigned i = 0; i < kWarp; ++i)
    result |= static_cast<unsigned>(offers[i] == bits) << i;
  return result;
}

// An atomic operation on an address.
template <typename T, typename Operation>
T atomically(T* address, Operation operation) {
  // Accesses stay between the assignments: the compiler does not know that they call the detector.
  trace.atomic = true;
  asm volatile("" ::: "memory");
  const T old = *address;
  *address = operation(old);
  asm volatile("" ::: "memory");
  trace.atomic = false;
  return old;
}

inline void take_ticket(const void* address) {
  if (!machine.current->fenced)
    fail("atomicInc without an earlier __threadfence() of the thread");
  machine.current->fenced = false;
  cuda_on_host_take_ticket(address);
}

inline void barrier(const std::source_location& where) {
  const Place place{where.file_name(), where.line()};
  if (place == machine.omitted)
    return;
  if (machine.current->linear == 0) {
    unsigned i = 1;
    while (i < machine.barrier_count && !(machine.barriers[i] == place))
      ++i;
    if (i == std::size(machine.barriers))
      fail("there are more barriers than the emulation can list");
    if (i == machine.barrier_count)
      machine.barriers[machine.barrier_count++] = place;
    machine.next_barrier = i;
  }
  wait(State::kAtBlock);
}

// A barrier that returns the number of threads whose predicate holds.
inline int count(bool predicate) {
  uint64_t* votes = machine.votes[machine.current->votes++ % 2];
  votes[machine.current->linear] = predicate;
  machine.next_barrier = 0;
  wait(State::kAtBlock);
  int result = 0;
  for (unsigned i = 0; i < machine.threads; ++i)
    result += static_cast<int>(votes[i]);
  return result;
}

}  // namespace cuda_on_host
