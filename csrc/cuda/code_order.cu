// SPDX-License-Identifier: Apache-2.0
//
// A stable counting sort of positions by code, in three launches for up to kMaxDigits codes.
//
// A block counts the codes of a tile of entries; a second launch turns the counts into the first
// place of each tile's entries of a code; a block then places the entries of its tile, 256 at a
// time, the warps in turn. Entries that share a code in a warp are found by one instruction, so a
// batch in which all have the same code takes no longer. No step depends on the order in which
// blocks or warps run. With more codes, digits of the code are sorted by, from the lowest on.
#include "code_order.h"

namespace genperf {
namespace {

constexpr const char* kOp = "code_statistics";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxTile = 65280;         // so that counts fit 16 bits
constexpr int64_t kMinTile = 1024;          // of few entries, so that many blocks run
constexpr int64_t kTiles = 256;             // wanted
constexpr int64_t kTableEntries = 1 << 21;  // wanted

struct Pass {
  const CodeEntry* source;  // or null for the indices
  CodeEntry* target;
  uint32_t* starts;  // [digits + 1]
  uint32_t* length;  // of the order, written by the first pass and read by the others
  int shift;
  uint32_t mask;
  int64_t digits;
  int64_t tile;
  int64_t tiles;
};

__device__ inline int64_t entries_of(const CodeOrderParams& p, const Pass& pass) {
  return pass.source == nullptr ? p.entries : *pass.length;
}

// The entry at a place of the pass's input; kNoCode past its end and for indices of no code.
__device__ inline CodeEntry load_entry(const CodeOrderParams& p,
                                       const Pass& pass,
                                       int64_t place,
                                       int64_t end) {
  if (place >= end)
    return {0, kNoCode};
  if (pass.source != nullptr)
    return pass.source[place];
  const uint32_t entry = static_cast<uint32_t>(place);
  const int64_t index = p.indices[place];
  if (index < 0 || index >= p.num_codes)
    return {entry, kNoCode};
  const uint32_t levels = static_cast<uint32_t>(p.levels);
  const uint32_t level = levels == 1 ? 0 : entry % levels;
  return {entry, level * static_cast<uint32_t>(p.num_codes) + static_cast<uint32_t>(index)};
}

__device__ inline uint32_t digit_of(const CodeEntry& entry, const Pass& pass) {
  return entry.code == kNoCode ? kNoCode : entry.code >> pass.shift & pass.mask;
}

__global__ void __launch_bounds__(kThreads) code_histogram_kernel(CodeOrderParams p, Pass pass) {
  auto& counters = shared_memory<uint32_t[kMaxDigits / 2]>();  // of two digits each
  const int64_t words = (pass.digits + 1) / 2;
  for (int64_t word = threadIdx.x; word < words; word += kThreads)
    counters[word] = 0;
  if (pass.source == nullptr) {
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (int64_t i = thread; i < p.num_zeros; i += int64_t{gridDim.x} * kThreads)
      p.zeros[i] = 0;
    if (thread == 0)
      *p.ticket = 0;
  }
  __syncthreads();
  const int64_t entries = entries_of(p, pass);
  const int64_t begin = int64_t{blockIdx.x} * pass.tile;
  const int64_t end = begin + pass.tile < entries ? begin + pass.tile : entries;
  const unsigned lane = threadIdx.x % kWarpSize;
  for (int64_t first = begin; first < end; first += kThreads) {
    const uint32_t digit = digit_of(load_entry(p, pass, first + threadIdx.x, end), pass);
    const unsigned peers = __match_any_sync(kFullWarp, digit);
    if (digit != kNoCode && lane == static_cast<unsigned>(__ffs(static_cast<int>(peers)) - 1)) {
      atomicAdd(&counters[digit / 2], static_cast<uint32_t>(__popc(peers))
                                          << (digit % 2 != 0 ? 16 : 0));
    }
  }
  __syncthreads();
  uint32_t* row = p.table + int64_t{blockIdx.x} * pass.digits;
  for (int64_t digit = threadIdx.x; digit < pass.digits; digit += kThreads)
    row[digit] = counters[digit / 2] >> (digit % 2 != 0 ? 16 : 0) & 0xffffu;
}

// The sum over the threads before this one. `total` is the sum over all.
__device__ inline uint32_t exclusive_sum(uint32_t value,
                                         uint32_t (&warps)[kWarps],
                                         uint32_t& total) {
  const unsigned lane = threadIdx.x % kWarpSize;
  uint32_t sum = value;
  for (unsigned step = 1; step < kWarpSize; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step)
      sum += other;
  }
  __syncthreads();  // the previous sums may still be read
  if (lane == kWarpSize - 1)
    warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (unsigned warp = 0; warp < kWarps; ++warp) {
    if (warp < threadIdx.x / kWarpSize)
      before += warps[warp];
    total += warps[warp];
  }
  return before + sum - value;
}

struct PrefixShared {
  uint32_t sums[kWarps][kWarpSize];
  uint32_t warps[kWarps];
  bool last;
};

// A block turns the counts of 32 digits into sums over the earlier tiles. The last block to finish
// sums the digits.
__global__ void __launch_bounds__(kThreads) code_prefix_kernel(CodeOrderParams p, Pass pass) {
  auto& shared = shared_memory<PrefixShared>();
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t digit = int64_t{blockIdx.x} * kWarpSize + lane;
  const int64_t share = (pass.tiles + kWarps - 1) / kWarps;  // tiles of a warp
  const int64_t begin = warp * share;
  const int64_t end = begin + share < pass.tiles ? begin + share : pass.tiles;
  uint32_t sum = 0;
  if (digit < pass.digits) {
#pragma unroll 8
    for (int64_t tile = begin; tile < end; ++tile)
      sum += p.table[tile * pass.digits + digit];
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (digit < pass.digits) {
    uint32_t before = 0;
    for (int other = 0; other < warp; ++other)
      before += shared.sums[other][lane];
#pragma unroll 8
    for (int64_t tile = begin; tile < end; ++tile) {
      uint32_t& entry = p.table[tile * pass.digits + digit];
      const uint32_t count = entry;
      entry = before;
      before += count;
    }
    if (warp == kWarps - 1)
      p.totals[digit] = before;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicInc(p.ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.last)
    return;
  __threadfence();
  constexpr int kDigits = 4;  // of a thread
  uint32_t before = 0;
  for (int64_t first = 0; first < pass.digits; first += kDigits * kThreads) {
    uint32_t counts[kDigits];
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      const int64_t d = first + threadIdx.x * kDigits + i;
      counts[i] = d < pass.digits ? __ldcg(p.totals + d) : 0;
      own += counts[i];
    }
    uint32_t total;
    uint32_t start = before + exclusive_sum(own, shared.warps, total);
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      const int64_t d = first + threadIdx.x * kDigits + i;
      if (d < pass.digits)
        pass.starts[d] = start;
      start += counts[i];
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    pass.starts[pass.digits] = before;
    *pass.length = before;
  }
}

__global__ void __launch_bounds__(kThreads) code_scatter_kernel(CodeOrderParams p, Pass pass) {
  auto& counters = shared_memory<uint16_t[kMaxDigits]>();  // entries of a digit so far
  for (int64_t digit = threadIdx.x; digit < pass.digits; digit += kThreads)
    counters[digit] = 0;
  __syncthreads();
  const int64_t entries = entries_of(p, pass);
  const int64_t begin = int64_t{blockIdx.x} * pass.tile;
  const int64_t end = begin + pass.tile < entries ? begin + pass.tile : entries;
  const uint32_t* row = p.table + int64_t{blockIdx.x} * pass.digits;
  const unsigned lane = threadIdx.x % kWarpSize;
  for (int64_t first = begin; first < end; first += kThreads) {
    const CodeEntry entry = load_entry(p, pass, first + threadIdx.x, end);
    const uint32_t digit = digit_of(entry, pass);
    const uint32_t start = digit == kNoCode ? 0 : pass.starts[digit] + row[digit];
    const unsigned peers = __match_any_sync(kFullWarp, digit);
    const unsigned leader = static_cast<unsigned>(__ffs(static_cast<int>(peers)) - 1);
    uint32_t before = 0;
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      if (threadIdx.x / kWarpSize == warp && lane == leader && digit != kNoCode) {
        before = counters[digit];
        counters[digit] = static_cast<uint16_t>(before + __popc(peers));
      }
      __syncthreads();
    }
    before = __shfl_sync(kFullWarp, before, static_cast<int>(leader));
    if (digit != kNoCode) {
      const uint32_t rank = static_cast<uint32_t>(__popc(peers & ((1u << lane) - 1)));
      pass.target[start + before + rank] = entry;
    }
  }
}

// After several passes, the start of each code by a search in the order.
__global__ void __launch_bounds__(kThreads) code_offsets_kernel(CodeOrderParams p) {
  const int64_t codes = p.levels * p.num_codes;
  const int64_t code = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (code >= codes)
    return;
  uint32_t low = 0;
  uint32_t high = p.offsets[codes];
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (p.order[middle].code < code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  p.offsets[code] = low;
}

int64_t divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

}  // namespace

CodeOrderShape::CodeOrderShape(int64_t entries, int64_t codes) : passes(1), bits(0), digits(codes) {
  if (codes > kMaxDigits) {
    int width = 0;
    while ((codes - 1) >> width > 0)
      ++width;
    passes = static_cast<int>(divide(width, 14));
    bits = static_cast<int>(divide(width, passes));
    digits = int64_t{1} << bits;
  }
  const int64_t fit = kTableEntries / (digits > 0 ? digits : 1);
  const int64_t wanted = fit < kTiles ? (fit > 1 ? fit : 1) : kTiles;
  tile = divide(divide(entries, wanted), kThreads) * kThreads;
  tile = tile < kMinTile ? kMinTile : tile > kMaxTile ? kMaxTile : tile;
  tiles = entries > 0 ? divide(entries, tile) : 1;
}

void launch_code_order(const CodeOrderParams& params, cudaStream_t stream) {
  const CodeOrderParams& p = params;
  const int64_t codes = p.levels * p.num_codes;
  const CodeOrderShape shape(p.entries, codes);
  const CodeEntry* source = nullptr;
  for (int i = 0; i < shape.passes; ++i) {
    Pass pass{};
    pass.source = source;
    pass.target = (shape.passes - 1 - i) % 2 == 0 ? p.order : p.scratch;
    pass.starts = shape.passes == 1 ? p.offsets : p.starts;
    pass.length = p.offsets + codes;
    pass.shift = i * shape.bits;
    pass.mask = shape.passes == 1 ? kNoCode : (1u << shape.bits) - 1;
    pass.digits = shape.digits;
    pass.tile = shape.tile;
    pass.tiles = shape.tiles;
    const auto tiles = static_cast<unsigned>(shape.tiles);
    launch(kOp, code_histogram_kernel, tiles, kThreads, divide(shape.digits, 2) * sizeof(uint32_t),
           stream, p, pass);
    launch(kOp, code_prefix_kernel, static_cast<unsigned>(divide(shape.digits, kWarpSize)),
           kThreads, sizeof(PrefixShared), stream, p, pass);
    launch(kOp, code_scatter_kernel, tiles, kThreads, shape.digits * sizeof(uint16_t), stream, p,
           pass);
    source = pass.target;
  }
  if (shape.passes > 1) {
    launch(kOp, code_offsets_kernel, static_cast<unsigned>(divide(codes, kThreads)), kThreads, 0,
           stream, p);
  }
}

}  // namespace genperf
