// SPDX-License-Identifier: Apache-2.0
//
// The first pass in 8 bits: 64 products an instruction.
#include "cpu/search/code_panel.h"

#if defined(GENPERF_HAS_VNNI)

#include <algorithm>

#include "cpu/search/int8_queries.h"

namespace genperf {
namespace {

constexpr int kQueries = 8;  // with two groups of codes, 16 sums hide the latency of the products
constexpr int64_t kUnitBytes = 4 * kGroup;

inline IVec broadcast_int(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof(value));
  return value - IVec{};
}

// Computes sums [2, kQueries, 16] of the products of two groups of codes with kQueries queries,
// from `start` on. A function of its own keeps them in registers.
[[gnu::noinline]] void add_products(const uint8_t* codes,
                                    int64_t units,
                                    const int8_t* z,
                                    const int32_t* start,
                                    IVec* sums) {
  IVec sum[2][kQueries];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i)
    sum[0][i] = sum[1][i] = broadcast_int(start + i);
  for (int64_t t = 0; t < units; ++t) {
    const IVec low = load_bytes(codes + t * kUnitBytes),
               high = load_bytes(codes + (units + t) * kUnitBytes);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const IVec query = broadcast_int(z + t * kUnitBytes + i * 4);
      multiply_add(sum[0][i], low, query);
      multiply_add(sum[1][i], high, query);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    sums[i] = sum[0][i];
    sums[kQueries + i] = sum[1][i];
  }
}

}  // namespace

void Int8Queries::block_maxima(const CodePanel& panel,
                               int64_t block_groups,
                               int64_t begin,
                               int64_t end,
                               float* maxima) const {
  const int64_t units = panel.int8_units();
  const Int8Codes& codes = panel.int8;
  const int64_t together = std::max<int64_t>(block_groups, 2);  // a block, or two of one group
  IVec sums[2 * kQueries];
  for (int64_t start = begin * block_groups; start < end * block_groups; start += together)
    for (int first = 0; first < count_; first += kQueries) {
      const int8_t* const z = z_ + first / kGroup * units * kUnitBytes + first % kGroup * 4;
      Vec best[kQueries];
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; ++i)
        best[i] = broadcast(-INFINITY);
      for (int64_t group = start; group < start + together; ++group) {
        const IVec* const sum = sums + (group - start) % 2 * kQueries;
        if (sum == sums)
          add_products(codes.values.get() + group * units * kUnitBytes, units, z, start_ + first,
                       sums);
        const int64_t k = group * kGroup;
        const Vec scale = load(codes.scale.get() + k), bias = load(panel.bias.get() + k);
        const Vec rest = load(codes.rest.get() + k), length = load(codes.length.get() + k);
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          const int query = first + i;
          const Vec product = __builtin_convertvector(sum[i], Vec) * scale;
          const Vec error =
              fma(broadcast(norm_[query]), rest, fma(broadcast(rest_[query]), length, bias));
          best[i] = max(fma(product, broadcast(scale_[query]), error), best[i]);
        }
        if ((group + 1) % block_groups)
          continue;
        float* const out = maxima + (group / block_groups * kRows + first) * kGroup;
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
          store(out + i * kGroup, best[i]);
          best[i] = broadcast(-INFINITY);
        }
      }
    }
}

}  // namespace genperf

#endif
