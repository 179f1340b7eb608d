// SPDX-License-Identifier: Apache-2.0
//
// Packs queries for AMX: rows of z = (x - c) * scale in bfloat16.
#pragma once

#include "cpu/common/vector_rows.h"
#include "cpu/search/block_maxima.h"
#include "cpu/search/code_panel.h"
#include "cpu/search/error_bounds.h"

namespace genperf {

static_assert(kRows == kAmxTile);

// Packs `count` rows to out [32, depth, 32], with zeros below. The columns are [zh, zh, zl] if the
// panel is split.
template <class W>
ErrorBounds pack_rows(const W* const* rows, int count, const CodePanel& panel, uint16_t* out) {
  using Narrow = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  const int64_t length = panel.depth * kDepth;
  const auto put = [](uint16_t* to, Vec v) {
    const Narrow bits = __builtin_convertvector(UVec(v) >> 16, Narrow);
    std::memcpy(to, &bits, sizeof(bits));
  };
  alignas(64) float totals[kRows] = {}, low_totals[kRows] = {}, rest_totals[kRows] = {};
  for (int i = 0; i < count; ++i) {
    uint16_t* const row = out + i * length;
    uint16_t columns[kDepth + kLanes] = {};
    Vec squares{}, low_squares{}, rest_squares{};
    const auto add = [&](int64_t d, Vec z) {
      const Vec high = round_to_bfloat16(z);
      Vec rest = z - high;
      squares = fma(z, z, squares);
      if (panel.split) {
        const Vec second = round_to_bfloat16(rest);
        // The next part overwrites the zeros after this one.
        put(columns, high);
        put(columns + panel.dim, high);
        put(columns + 2 * panel.dim, second);
        low_squares = fma(second, second, low_squares);
        rest -= second;
      } else {
        put(row + d, high);
      }
      rest_squares = fma(rest, rest, rest_squares);
    };
    const float* const center = panel.center.get();
    int64_t d = 0;
    for (; d + kLanes <= panel.dim; d += kLanes)
      add(d, centered(rows[i] + d, load(center + d), panel.scale));
    if (d < panel.dim) {
      add(d, centered(rows[i] + d, load(center + d), panel.scale, int(panel.dim - d)));
      d += kLanes;
    }
    if (panel.split)
      std::memcpy(row, columns, kDepth * sizeof(uint16_t));
    else
      std::fill(row + d, row + length, 0);
    totals[i] = float(Pack<float>::total(squares));
    low_totals[i] = float(Pack<float>::total(low_squares));
    rest_totals[i] = float(Pack<float>::total(rest_squares));
  }
  std::fill(out + count * length, out + kRows * length, 0);
  ErrorBounds bounds;
  for (int first = 0; first < kRows; first += kLanes)
    bounds.set(first, {load(totals + first), load(low_totals + first), load(rest_totals + first)},
               panel);
  return bounds;
}

#if defined(GENPERF_HAS_AMX)

// A tile of queries for the search with AMX.
class AmxQueries {
 public:
  // Packs `count` rows to `packed`, which is kept.
  template <class W>
  void pack(const W* const* rows, int count, const CodePanel& panel, void* packed) {
    z_ = static_cast<uint16_t*>(packed);
    bounds = pack_rows(rows, count, panel, z_);
  }

  void block_maxima(const CodePanel& panel,
                    int64_t block_groups,
                    int64_t begin,
                    int64_t end,
                    float* maxima) const {
    block_maxima_amx(panel, block_groups, begin, end, z_, maxima);
  }

  // A function of the maxima of query first + i in a block, and of i: what the scores of the codes
  // are at least, up to the threshold.
  auto lowest(const CodePanel&, int64_t, int) const {
    return [](Vec maxima, int) { return maxima; };
  }

  // What the scores of candidates are not below, for kLanes queries.
  Vec threshold(Vec lowest, int first) const { return lowest - load(bounds.coarse + first); }

  // Whether the bounds leave so many codes that a score of one of them leaves out others.
  static constexpr bool kWideBounds = false;

  ErrorBounds bounds;

 private:
  uint16_t* z_;
};

#endif

}  // namespace genperf
