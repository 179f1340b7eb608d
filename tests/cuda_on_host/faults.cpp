// SPDX-License-Identifier: Apache-2.0
// Kernels with the faults that the emulation must report, and one that shows its conversions.
#include "launch.h"

namespace {

using namespace genperf;

__global__ void read_past_end(const float* x, float* out, int64_t n) {
  const int64_t i = threadIdx.x;
  if (i <= n) out[i % n] = x[i];
}

__global__ void divergent_barrier() {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void divergent_shuffle(float* out) {
  float value = 1;
  if (threadIdx.x < 40) value = __shfl_xor_sync(kFullWarp, value, 1);
  out[threadIdx.x] = value;
}

__global__ void read_unwritten_shared_memory(float* out) {
  out[threadIdx.x] = shared_memory<float[64]>()[threadIdx.x];
}

__global__ void write_past_shared_memory() { shared_memory<float[65]>()[threadIdx.x + 1] = 0; }

__global__ void round_trip(const float* x, __nv_bfloat16* bfloat16, __half* half, float* wide) {
  const int i = threadIdx.x;
  bfloat16[i] = convert<__nv_bfloat16>(x[i]);
  half[i] = convert<__half>(x[i]);
  wide[i] = to_float(half[i]);
}

}  // namespace

extern "C" {

void run_read_past_end(const float* x, float* out, int64_t n) {
  launch("read_past_end", read_past_end, 1, 64, 0, nullptr, x, out, n);
}

void run_divergent_barrier() {
  launch("divergent_barrier", divergent_barrier, 1, 64, 0, nullptr);
}

void run_divergent_shuffle(float* out) {
  launch("divergent_shuffle", divergent_shuffle, 1, 64, 0, nullptr, out);
}

void run_read_unwritten_shared_memory(float* out) {
  launch("read_unwritten_shared_memory", read_unwritten_shared_memory, 1, 64, 256, nullptr, out);
}

void run_write_past_shared_memory() {
  launch("write_past_shared_memory", write_past_shared_memory, 1, 64, 256, nullptr);
}

void run_round_trip(const float* x, uint16_t* bfloat16, uint16_t* half, float* wide, int n) {
  launch("round_trip", round_trip, 1, n, 0, nullptr, x, reinterpret_cast<__nv_bfloat16*>(bfloat16),
         reinterpret_cast<__half*>(half), wide);
}

}  // extern "C"
