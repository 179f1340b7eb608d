// SPDX-License-Identifier: Apache-2.0
//
// The detector of races. Kernels are compiled with -fsanitize=thread, which makes each access call
// a function (__tsan_read4 and the like). The runtime of ThreadSanitizer knows nothing of the
// threads of a block; races.cpp takes its place. It lets AddressSanitizer check the address, and
// notes which thread read and wrote it since its last barrier.
//
// An error is: an access to what another thread of the block has written, or a write to what it has
// read, without a barrier between them, or __syncwarp() within a warp; the same with another block
// of the launch, unless both blocks took a ticket (atomicInc) at one address in between; and a read
// of shared memory that no thread of the block has written. Atomics do not conflict with each
// other. A barrier between two accesses that would be an error without it is noted as needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_host {

// Where the running thread is. Plain data: races.cpp is compiled without sanitizers, and may share
// no inline function with the kernels.
struct Trace {
  bool enabled = true;
  bool running = false;        // a thread of a kernel, and not the scheduler
  bool atomic = false;         // in an atomic operation
  unsigned thread = 0;         // in the block
  uint16_t warp_barriers = 0;  // that the thread has passed

  // The time between two barriers of a block is an interval; intervals are numbered from the start
  // of the process.
  uint32_t interval = 0;
  uint32_t block_begin = 0;
  uint32_t launch_begin = 0;

  unsigned barrier = 0;   // number of the one that began the interval, of Machine::barriers
  bool needed[256] = {};  // of each barrier
  bool quiet = false;     // prints no stack
  bool saves = false;     // what the launch overwrites

  // Memory of the emulation.
  uintptr_t stack = 0;
  uintptr_t stack_end = 0;
  uintptr_t machine = 0;
  uintptr_t machine_end = 0;

  uintptr_t shared = 0;
  uintptr_t shared_end = 0;
};

inline Trace trace;

[[noreturn]] void fail(const char* what);

}  // namespace cuda_on_host

extern "C" {

// The running thread takes a ticket at this address.
void cuda_on_host_take_ticket(const void* address);

// Restores what a launch that saves has overwritten, and keeps what it wrote.
void cuda_on_host_undo_launch();

// Whether the launch has written the same again.
bool cuda_on_host_same_results();

}  // extern "C"
