// SPDX-License-Identifier: Apache-2.0
//
// Packs queries for the search in float32: z = (x - c) * scale with the queries along the lanes.
#pragma once

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"
#include "cpu/search/block_maxima.h"
#include "cpu/search/code_panel.h"
#include "cpu/search/error_bounds.h"

namespace genperf {

// Packs the `count` vectors at `offsets` to z [D, kTile], with zeros in the remaining lanes.
template <class T>
void pack_queries(const Positions<T>& x,
                  const int64_t* offsets,
                  int count,
                  const CodePanel& panel,
                  float* z) {
  const float* center = panel.center.get();
  const int64_t full = x.dim / kLanes * kLanes;
  const auto pack = [&](int64_t d, int lane) {
    const OpMath<T> value = OpMath<T>(x.data[offsets[lane] + d * x.stride]);
    z[d * kTile + lane] = float((value - OpMath<T>(center[d])) * OpMath<T>(panel.scale));
  };
  if (count < kTile)
    for (int64_t d = 0; d < x.dim; ++d)
      std::fill(z + d * kTile + count, z + (d + 1) * kTile, 0.0f);
  if (x.channels_last()) {
    for (int first = 0; first < count; first += kLanes)
      for (int64_t d = 0; d < full; d += kLanes) {
        const Vec c = load(center + d);
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] =
              first + i < count ? centered(x.data + offsets[first + i] + d, c, panel.scale) : Vec{};
        transpose(block);
        for (int i = 0; i < kLanes; ++i)
          store(z + (d + i) * kTile + first, block[i]);
      }
    for (int lane = 0; lane < count; ++lane)
      for (int64_t d = full; d < x.dim; ++d)
        pack(d, lane);
  } else if (count == kTile && x.inner_stride == 1 &&
             offsets[kTile - 1] - offsets[0] == kTile - 1) {
    for (int64_t d = 0; d < x.dim; ++d)
      for (int lane = 0; lane < kTile; lane += kLanes)
        store(z + d * kTile + lane, centered(x.data + offsets[0] + lane + d * x.stride,
                                             broadcast(center[d]), panel.scale));
  } else {
    for (int64_t d = 0; d < x.dim; ++d)
      for (int lane = 0; lane < count; ++lane)
        pack(d, lane);
  }
}

inline ErrorBounds error_bounds(const float* z, const CodePanel& panel) {
  ErrorBounds bounds;
  for (int first = 0; first < kTile; first += kLanes) {
    QuerySquares squares;
    for (int64_t d = 0; d < panel.dim; ++d) {
      const Vec value = load(z + d * kTile + first);
      squares.total = fma(value, value, squares.total);
    }
    bounds.set(first, squares, panel);
  }
  return bounds;
}

}  // namespace genperf
