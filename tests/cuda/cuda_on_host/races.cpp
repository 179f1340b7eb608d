// SPDX-License-Identifier: Apache-2.0
//
// Compiled without sanitizers, see races.h.
#include "races.h"

#include <sanitizer/common_interface_defs.h>

#include <cstdlib>
#include <cstring>

using cuda_on_host::trace;

namespace {

constexpr unsigned kWarp = 32;
constexpr uint16_t kAtomic = 0x8000;  // beside the number of a writer
constexpr uint16_t kWarpOf = 0x8000;  // several readers, all of this warp
constexpr uint16_t kMany = 0xffff;    // readers of several warps

// The last accesses to a word or a byte: interval, thread, and barriers of its warp.
struct Cell {
  uint32_t write_interval;
  uint32_t read_interval;
  uint16_t writer;
  uint16_t writer_barriers;
  uint16_t reader;
  uint16_t reader_barriers;
};

constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kPages = 1 << 16;
constexpr unsigned kWords = 2;  // shift of an address to the number of a cell
constexpr unsigned kBytes = 0;

// Memory that the launch accesses: a cell for each word, or for each byte after an access to less
// than a word.
struct Page {
  uintptr_t number;
  uint32_t launch_begin;
  unsigned shift;
  Cell* cells;
  struct Saved* saved;  // if the launch is to be repeated and has written here
};

// A page before the launch, after it, and the bytes that it wrote.
struct Saved {
  uintptr_t number;
  unsigned char before[kPageBytes];
  unsigned char after[kPageBytes];
  bool written[kPageBytes];
};

struct {
  Saved** all;
  size_t count;
  size_t capacity;
} saved;

Page pages[kPages];  // a hash table

// Cells are used again in later launches: what they hold is ordered by the stream then.
class Pool {
 public:
  Cell* take(unsigned shift) {
    if (launch_begin_ != trace.launch_begin) {
      launch_begin_ = trace.launch_begin;
      count_ = 0;
    }
    if (count_ == kPages)
      cuda_on_host::fail("a launch accesses more memory than the detector of races can follow");
    Cell*& cells = all_[count_++];
    if (cells == nullptr)
      cells = static_cast<Cell*>(std::calloc(kPageBytes >> shift, sizeof(Cell)));
    return cells;
  }

 private:
  Cell* all_[kPages];
  size_t count_;
  uint32_t launch_begin_;
};

Pool pools[kWords + 1];  // by shift

struct Ticket {
  const void* address;
  uint32_t block_begin;
  uint32_t interval;
  unsigned thread;
  unsigned barrier;  // that began the interval
};

struct {
  Ticket* all;
  size_t count;
  size_t capacity;
  uint32_t launch_begin;
} tickets;

Page& page_of(uintptr_t number) {
  for (size_t slot = number % kPages;; slot = (slot + 1) % kPages) {
    Page& page = pages[slot];
    if (page.launch_begin != trace.launch_begin)
      page = {number, trace.launch_begin, kWords, pools[kWords].take(kWords), nullptr};
    if (page.number == number)
      return page;
  }
}

void divide_into_bytes(Page& page) {
  Cell* const bytes = pools[kBytes].take(kBytes);
  for (uintptr_t i = 0; i < kPageBytes; ++i)
    bytes[i] = page.cells[i >> kWords];
  page.cells = bytes;
  page.shift = kBytes;
}

void save(Page& page) {
  if (saved.count == saved.capacity) {
    saved.capacity = 2 * saved.capacity + 64;
    saved.all = static_cast<Saved**>(std::realloc(saved.all, saved.capacity * sizeof(Saved*)));
    for (size_t i = saved.count; i < saved.capacity; ++i)
      saved.all[i] = static_cast<Saved*>(std::malloc(sizeof(Saved)));
  }
  page.saved = saved.all[saved.count++];
  page.saved->number = page.number;
  std::memcpy(page.saved->before, reinterpret_cast<void*>(page.number * kPageBytes), kPageBytes);
}

// Whether the block of an access took a ticket after it, and this block one at the same address
// before now.
bool ordered_by_tickets(uint32_t interval, unsigned thread) {
  if (tickets.launch_begin != trace.launch_begin)
    return false;
  for (size_t i = 0; i < tickets.count; ++i) {
    const Ticket& release = tickets.all[i];
    const bool same = thread == release.thread;
    if (release.block_begin > interval || release.block_begin == trace.block_begin ||
        (same ? interval > release.interval : interval >= release.interval))
      continue;
    for (size_t j = i + 1; j < tickets.count; ++j) {
      const Ticket& own = tickets.all[j];
      if (own.address != release.address || own.block_begin != trace.block_begin)
        continue;
      if (own.thread != trace.thread && own.interval == trace.interval)
        continue;
      if (!same && interval + 1 == release.interval)
        trace.needed[release.barrier] = true;
      if (own.thread != trace.thread && own.interval + 1 == trace.interval)
        trace.needed[trace.barrier] = true;
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
  if (interval < trace.block_begin)
    return ordered_by_tickets(interval, thread);
  if (thread == trace.thread ||
      (warp == trace.thread / kWarp && warp_barriers != trace.warp_barriers))
    return true;
  if (interval + 1 == trace.interval)
    trace.needed[trace.barrier] = true;
  return interval < trace.interval;
}

[[noreturn]] void report(const char* what) {
  if (!trace.quiet)
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
  const uintptr_t end = address + bytes;
  const bool words = (address | end) % (1 << kWords) == 0;
  while (address < end) {
    Page& page = page_of(address / kPageBytes);
    if (!words && page.shift == kWords)
      divide_into_bytes(page);
    if (store && trace.saves && !shared && page.saved == nullptr)
      save(page);
    const uintptr_t begin_of_page = address / kPageBytes * kPageBytes;
    const uintptr_t stop = end < begin_of_page + kPageBytes ? end : begin_of_page + kPageBytes;
    for (; address < stop; address += uintptr_t{1} << page.shift) {
      Cell& cell = page.cells[(address - begin_of_page) >> page.shift];
      check(cell, store, shared);
      note(cell, store);
    }
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
  tickets.all[tickets.count++] = {address, trace.block_begin, trace.interval, trace.thread,
                                  trace.barrier};
}

void cuda_on_host_undo_launch() {
  for (size_t i = 0; i < saved.count; ++i) {
    Saved& page = *saved.all[i];
    auto* const memory = reinterpret_cast<unsigned char*>(page.number * kPageBytes);
    const Page& accessed = page_of(page.number);
    for (uintptr_t j = 0; j < kPageBytes; ++j) {
      page.written[j] = accessed.cells[j >> accessed.shift].write_interval >= trace.launch_begin;
      page.after[j] = memory[j];
      if (page.written[j])
        memory[j] = page.before[j];
    }
  }
}

bool cuda_on_host_same_results() {
  bool same = true;
  for (size_t i = 0; i < saved.count; ++i) {
    const Saved& page = *saved.all[i];
    const auto* const memory = reinterpret_cast<const unsigned char*>(page.number * kPageBytes);
    for (uintptr_t j = 0; j < kPageBytes; ++j)
      same = same && (!page.written[j] || memory[j] == page.after[j]);
  }
  saved.count = 0;
  return same;
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
