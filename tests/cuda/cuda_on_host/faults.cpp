// SPDX-License-Identifier: Apache-2.0
// Runs the named kernel: one with a fault that the emulation must report, or "none", kernels
// without one.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using namespace genperf;

constexpr unsigned kThreads = 64;
constexpr unsigned kBlocks = 7;

__global__ void read_past_end(const float* x, float* out, int64_t n) {
  const int64_t i = threadIdx.x;
  if (i <= n)
    out[i % n] = x[i];
}

__global__ void divergent_barrier() {
  if (threadIdx.x != 5)
    __syncthreads();
}

__global__ void divergent_shuffle(float* out) {
  float value = 1;
  if (threadIdx.x < 40)
    value = __shfl_xor_sync(kFullWarp, value, 1);
  out[threadIdx.x] = value;
}

__global__ void read_unwritten_shared_memory(float* out) {
  out[threadIdx.x] = shared_memory<float[kThreads]>()[threadIdx.x];
}

__global__ void write_past_shared_memory() {
  shared_memory<float[kThreads + 1]>()[threadIdx.x + 1] = 0;
}

// Writes the numbers of the threads in reverse, with or without the barriers that it needs.
__global__ void reverse(float* out, bool before, bool after) {
  auto& shared = shared_memory<float[kThreads]>();
  shared[threadIdx.x] = 0;
  __syncthreads();
  for (int step = 0; step < 2; ++step) {
    shared[threadIdx.x] = threadIdx.x;
    if (before)
      __syncthreads();
    out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
    if (after)
      __syncthreads();
  }
}

// The same within warps.
__global__ void reverse_in_warp(float* out, bool synchronized) {
  auto& shared = shared_memory<float[kThreads]>();
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = threadIdx.x;
  if (synchronized)
    __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ (kWarpSize - 1)];
}

// The last block adds up what all blocks have written.
__global__ void add_in_last_block(float* partials,
                                  unsigned* blocks_done,
                                  float* sum,
                                  bool fenced,
                                  bool by_ticket) {
  auto& is_last = shared_memory<bool>();
  partials[blockIdx.x * kThreads + threadIdx.x] = blockIdx.x;
  if (fenced)
    __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    is_last = !by_ticket || atomicInc(blocks_done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    *sum = 0;
    for (unsigned i = 0; i < gridDim.x * kThreads; ++i)
      *sum += partials[i];
  }
}

__global__ void count_with_atomics(unsigned* count, bool all) {
  if (all || threadIdx.x % 2 == 0) {
    atomicAdd(count, 1u);
  } else {
    *count += 1;
  }
}

// Each thread takes the next place.
__global__ void append(unsigned* count, unsigned* out) {
  out[atomicAdd(count, 1u)] = threadIdx.x;
}

__global__ void vote(unsigned* out) {
  const unsigned i = threadIdx.x;
  const unsigned odd = __ballot_sync(kFullWarp, i % 2);
  const unsigned same = __match_any_sync(kFullWarp, i % 4);
  const int first = __syncthreads_count(i < 10);
  const int none = __syncthreads_or(i > kThreads);
  const int every = __syncthreads_and(i < kThreads);
  const unsigned above = __shfl_up_sync(kFullWarp, i, 1);
  const bool right = odd == 0xaaaaaaaau && same == 0x11111111u << i % 4 && first == 10 &&
                     none == 0 && every == 1 && above == (i % kWarpSize == 0 ? i : i - 1);
  out[i] = right;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "";
  const bool none = fault == "none";
  const auto start = [&](auto kernel, unsigned blocks, size_t shared_bytes, auto... args) {
    launch(fault.c_str(), kernel, blocks, kThreads, shared_bytes, nullptr, args...);
  };
  const auto check = [&](bool right, const char* what) {
    if (!right)
      std::fprintf(stderr, "wrong result of %s\n", what);
    if (!right)
      std::exit(1);
  };
  constexpr size_t kBytes = sizeof(float[kThreads]);
  const std::vector<float> x(60);
  std::vector<float> out(kThreads), partials(kBlocks * kThreads);
  std::vector<unsigned> words(kThreads);
  unsigned counter = 0;
  float sum = 0;
  if (fault == "read_past_end")
    start(read_past_end, 1, 0, x.data(), out.data(), int64_t{60});
  if (fault == "divergent_barrier")
    start(divergent_barrier, 1, 0);
  if (fault == "divergent_shuffle")
    start(divergent_shuffle, 1, 0, out.data());
  if (fault == "write_past_shared_memory")
    start(write_past_shared_memory, 1, kBytes);
  if (fault == "read_unwritten_shared_memory")
    start(read_unwritten_shared_memory, 1, kBytes, out.data());
  if (fault == "no_barrier_after_write")
    start(reverse, 1, kBytes, out.data(), false, true);
  if (fault == "no_barrier_after_read")
    start(reverse, 1, kBytes, out.data(), true, false);
  if (fault == "no_barrier_of_warp")
    start(reverse_in_warp, 1, kBytes, out.data(), false);
  if (fault == "no_fence")
    start(add_in_last_block, kBlocks, 1, partials.data(), &counter, &sum, false, true);
  if (fault == "no_ticket")
    start(add_in_last_block, kBlocks, 1, partials.data(), &counter, &sum, true, false);
  if (fault == "half_atomic")
    start(count_with_atomics, 1, 0, &counter, false);
  if (fault == "result_by_order") {
    for (int launch = 0; launch < 20; ++launch, counter = 0)
      start(append, 1, 0, &counter, words.data());
  }
  if (none) {
    start(reverse, 1, kBytes, out.data(), true, true);
    check(out[0] == kThreads - 1 && out[kThreads - 1] == 0, "reverse");
    start(reverse_in_warp, 1, kBytes, out.data(), true);
    check(out[0] == kWarpSize - 1 && out[kThreads - 1] == kWarpSize, "reverse_in_warp");
    start(vote, 1, 0, words.data());
    for (const unsigned right : words)
      check(right == 1, "vote");
    for (int seed = 0; seed < 20; ++seed) {
      cuda_on_host_seed(seed);
      start(add_in_last_block, kBlocks, 1, partials.data(), &counter, &sum, true, true);
      check(sum == kThreads * kBlocks * (kBlocks - 1) / 2 && counter == 0, "add_in_last_block");
    }
    start(count_with_atomics, kBlocks, 0, &counter, true);
    check(counter == kBlocks * kThreads, "count_with_atomics");
  }
  return 0;
}
