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

template <class W>
Vec centered(const W* x, Vec center, float scale, int count) {
  alignas(64) W padded[kLanes] = {};
  std::copy_n(x, count, padded);
  return centered(padded, center, scale);
}

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

}  // namespace genperf
