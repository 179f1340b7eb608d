// SPDX-License-Identifier: Apache-2.0
//
// Compiled without sanitizers, see races.h.
#include "races.h"

#include <sanitizer/common_interface_defs.h>

#include <cstdlib>

using cuda_on_host::trace;

namespace {

constexpr unsigned kWarp = 32;
constexpr uint16_t kAtomic = 0x8000;  // beside the number of a writer
constexpr uint16_t kWarpOf = 0x8000;  // several readers, all of this warp
constexpr uint16_t kMany = 0xffff;    // readers of several warps
constexpr uintptr_t kPageBytes = 4096;

// The last accesses to a byte: interval, thread, and barriers of its warp.
struct Cell {
  uint32_t write_interval;
  uint32_t read_interval;
  uint16_t writer;
  uint16_t writer_barriers;
  uint16_t reader;
  uint16_t reader_barriers;
};

// Memory that the launch accesses.
struct Page {
  uintptr_t number;
  uint32_t launch_begin;
  Cell* cells;
};

constexpr size_t kPages = 1 << 16;
Page pages[kPages];  // a hash table

// Cells are used again in later launches: what they hold is ordered by the stream then.
struct {
  Cell* all[kPages];
  size_t count;
  uint32_t launch_begin;
} pool;

struct Ticket {
  const void* address;
  uint32_t block_begin;
  uint32_t interval;
  unsigned thread;
};

struct {
  Ticket* all;
  size_t count;
  size_t capacity;
  uint32_t launch_begin;
} tickets;

Cell* new_cells() {
  if (pool.launch_begin != trace.launch_begin) {
    pool.launch_begin = trace.launch_begin;
    pool.count = 0;
  }
  if (pool.count == kPages)
    cuda_on_host::fail("a launch accesses more memory than the detector of races can follow");
  Cell*& cells = pool.all[pool.count++];
  if (cells == nullptr)
    cells = static_cast<Cell*>(std::calloc(kPageBytes, sizeof(Cell)));
  return cells;
}

Cell* cells_of(uintptr_t number) {
  for (size_t slot = number % kPages;; slot = (slot + 1) % kPages) {
    Page& page = pages[slot];
    if (page.launch_begin != trace.launch_begin)
      page = {number, trace.launch_begin, new_cells()};
    if (page.number == number)
      return page.cells;
  }
}

// Whether the block of an access took a ticket after it, and this block one at the same address
// before now.
bool ordered_by_tickets(uint32_t interval, unsigned thread) {
  if (tickets.launch_begin != trace.launch_begin)
    return false;
  for (size_t i = 0; i < tickets.count; ++i) {
    const Ticket& release = tickets.all[i];
    const bool after =
        release.block_begin <= interval &&
        (interval < release.interval || (interval == release.interval && thread == release.thread));
    if (!after || release.block_begin == trace.block_begin)
      continue;
    for (size_t j = i + 1; j < tickets.count; ++j) {
      const Ticket& own = tickets.all[j];
      if (own.address == release.address && own.block_begin == trace.block_begin &&
          (own.interval < trace.interval || own.thread == trace.thread))
        return true;
    }
  }
  return false;
}

// Whether an earlier access of a thread is ordered before what this thread does now.
bool ordered(uint32_t interval,
             unsigned thread,
             unsigned warp,
             uint16_t warp_barriers,
             bool shared) {
  if (interval < (shared ? trace.block_begin : trace.launch_begin))
    return true;
  if (interval == trace.interval) {
    return thread == trace.thread ||
           (warp == trace.thread / kWarp && warp_barriers != trace.warp_barriers);
  }
  return interval >= trace.block_begin || ordered_by_tickets(interval, thread);
}

[[noreturn]] void report(const char* what) {
  __sanitizer_print_stack_trace();
  cuda_on_host::fail(what);
}

void check(Cell& cell, bool store, bool shared) {
  if (shared && !store && cell.write_interval < trace.block_begin)
    report("a read of shared memory that the block has not written");
  const unsigned writer = cell.writer & ~kAtomic;
  const bool atomics = trace.atomic && (cell.writer & kAtomic) != 0;
  if (!atomics &&
      !ordered(cell.write_interval, writer, writer / kWarp, cell.writer_barriers, shared))
    report("a race with an earlier write of another thread");
  if (!store)
    return;
  const bool one = cell.reader < kWarpOf;
  const unsigned warp = one ? cell.reader / kWarp : cell.reader & ~kWarpOf;
  if (!ordered(cell.read_interval, one ? cell.reader : kMany, warp, cell.reader_barriers, shared))
    report("a race with an earlier read of another thread");
}

void note(Cell& cell, bool store) {
  const auto thread = static_cast<uint16_t>(trace.thread);
  const auto warp = static_cast<uint16_t>(thread / kWarp);
  if (store) {
    cell.write_interval = trace.interval;
    cell.writer = static_cast<uint16_t>(thread | (trace.atomic ? kAtomic : 0));
    cell.writer_barriers = trace.warp_barriers;
  } else if (!trace.atomic) {
    if (cell.read_interval != trace.interval || cell.reader == thread) {
      cell.reader = thread;
    } else {
      const bool of_warp =
          cell.reader < kWarpOf ? cell.reader / kWarp == warp : cell.reader == (kWarpOf | warp);
      cell.reader = of_warp ? kWarpOf | warp : kMany;
    }
    cell.read_interval = trace.interval;
    cell.reader_barriers = trace.warp_barriers;
  }
}

void access(uintptr_t address, size_t bytes, bool store) {
  const auto within = [&](uintptr_t begin, uintptr_t end) {
    return address >= begin && address < end;
  };
  const auto own = reinterpret_cast<uintptr_t>(&trace);
  if (within(trace.stack, trace.stack_end) || within(trace.machine, trace.machine_end) ||
      within(own, own + sizeof(trace)))
    return;
  const bool shared = within(trace.shared, trace.shared_end);
  Cell* cells = nullptr;
  for (uintptr_t at = address; at < address + bytes; ++at) {
    if (cells == nullptr || at % kPageBytes == 0)
      cells = cells_of(at / kPageBytes);
    check(cells[at % kPageBytes], store, shared);
    note(cells[at % kPageBytes], store);
  }
}

}  // namespace

extern "C" {

void cuda_on_host_take_ticket(const void* address) {
  if (tickets.launch_begin != trace.launch_begin) {
    tickets.launch_begin = trace.launch_begin;
    tickets.count = 0;
  }
  if (tickets.count == tickets.capacity) {
    tickets.capacity = 2 * tickets.capacity + 64;
    tickets.all =
        static_cast<Ticket*>(std::realloc(tickets.all, tickets.capacity * sizeof(Ticket)));
  }
  tickets.all[tickets.count++] = {address, trace.block_begin, trace.interval, trace.thread};
}

// AddressSanitizer first, which ends the process if the address is not valid.
#define GENPERF_ACCESS(name, check, bytes, store) \
  void name(uintptr_t address) {                  \
    check(address);                               \
    if (trace.running && trace.enabled)           \
      access(address, bytes, store);              \
  }

#define GENPERF_ACCESSES(bytes)                                                  \
  void __asan_load##bytes(uintptr_t);                                            \
  void __asan_store##bytes(uintptr_t);                                           \
  GENPERF_ACCESS(__tsan_read##bytes, __asan_load##bytes, bytes, false)           \
  GENPERF_ACCESS(__tsan_write##bytes, __asan_store##bytes, bytes, true)          \
  GENPERF_ACCESS(__tsan_unaligned_read##bytes, __asan_load##bytes, bytes, false) \
  GENPERF_ACCESS(__tsan_unaligned_write##bytes, __asan_store##bytes, bytes, true)

GENPERF_ACCESSES(1)
GENPERF_ACCESSES(2)
GENPERF_ACCESSES(4)
GENPERF_ACCESSES(8)
GENPERF_ACCESSES(16)

void __asan_loadN(uintptr_t, size_t);
void __asan_storeN(uintptr_t, size_t);

void __tsan_read_range(uintptr_t address, size_t bytes) {
  __asan_loadN(address, bytes);
  if (trace.running && trace.enabled)
    access(address, bytes, false);
}

void __tsan_write_range(uintptr_t address, size_t bytes) {
  __asan_storeN(address, bytes);
  if (trace.running && trace.enabled)
    access(address, bytes, true);
}

void __tsan_vptr_update(void**, void*) {}

void __tsan_init() {}

}  // extern "C"
