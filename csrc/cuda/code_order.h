// SPDX-License-Identifier: Apache-2.0
//
// Positions sorted by their code.
#pragma once

#include <cstddef>

#include "launch.h"

namespace genperf {

constexpr uint32_t kNoCode = 0xffffffffu;

// Counters of 16 bits in 48 KB of shared memory, so that one pass sorts by up to so many codes.
constexpr int64_t kMaxDigits = 24576;

// Entry p * Q + q is position p at level q. Its code is q * K + its index.
struct alignas(8) CodeEntry {
  uint32_t entry;
  uint32_t code;
};

struct CodeOrderParams {
  const int64_t* indices;  // [N, Q]; entries with an index outside 0 ... K-1 are left out
  CodeEntry* order;        // [N * Q]
  CodeEntry* scratch;      // [N * Q], if there are several passes
  uint32_t* table;         // [tiles, digits], scratch
  uint32_t* totals;        // [digits], scratch
  uint32_t* starts;        // [digits + 1], scratch, if there are several passes
  uint32_t* offsets;       // [Q * K + 1]: the start of each code in the order, and its length
  uint32_t* ticket;        // scratch
  uint32_t* zeros;         // [num_zeros], set to zero
  int64_t num_zeros;
  int64_t entries;    // N * Q
  int64_t num_codes;  // K
  int64_t levels;     // Q
};

// How the entries are sorted: a stable radix sort of one or more passes over tiles of entries.
struct CodeOrderShape {
  CodeOrderShape(int64_t entries, int64_t codes);

  int passes;
  int bits;        // of a digit, if there are several passes
  int64_t digits;  // values of a digit
  int64_t tile;    // entries that one block sorts
  int64_t tiles;
};

void launch_code_order(const CodeOrderParams& params, cudaStream_t stream);

}  // namespace genperf
