// SPDX-License-Identifier: Apache-2.0
// Runs the named kernel; each has a fault that the emulation must report.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using namespace genperf;

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
  out[threadIdx.x] = shared_memory<float[64]>()[threadIdx.x];
}

__global__ void write_past_shared_memory() {
  shared_memory<float[65]>()[threadIdx.x + 1] = 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "";
  const auto start = [&](auto kernel, size_t shared_bytes, auto... args) {
    launch(fault.c_str(), kernel, 1, 64, shared_bytes, nullptr, args...);
  };
  const std::vector<float> x(60);
  std::vector<float> out(64);
  if (fault == "read_past_end")
    start(read_past_end, 0, x.data(), out.data(), int64_t{60});
  if (fault == "divergent_barrier")
    start(divergent_barrier, 0);
  if (fault == "divergent_shuffle")
    start(divergent_shuffle, 0, out.data());
  if (fault == "write_past_shared_memory")
    start(write_past_shared_memory, 256);
  if (fault == "read_unwritten_shared_memory") {
    start(read_unwritten_shared_memory, 256, out.data());
    for (const float value : out) {
      if (std::isnan(value)) {
        std::fprintf(stderr, "NaN from shared memory\n");
        return 1;
      }
    }
  }
  return 0;
}
