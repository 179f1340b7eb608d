// SPDX-License-Identifier: Apache-2.0
//
// Scores in float32 of one packed query and a group of packed codes.
#pragma once

#include "cpu/search/block_maxima.h"
#include "cpu/search/code_panel.h"

namespace genperf {

// Scores of a group of codes for one query; returns the largest of each lane.
inline Vec score_group(const CodePanel& panel, int64_t group, const float* z, float* scores) {
  constexpr int kVecs = kGroup / kLanes;
  constexpr int kSteps = 8 / kVecs;  // eight independent sums hide the multiply-add's latency
  const float* values = panel.values.get() + group * panel.dim * kGroup;
  Vec sum[kSteps][kVecs];
  const auto component = [&](int64_t d, int v) {
    return load(values + d * kGroup + v * kLanes) * broadcast(z[d * kTile]);
  };
#pragma GCC unroll 8
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      sum[step][v] = step < panel.dim ? component(step, v) : Vec{};
  int64_t d = kSteps;
  for (; d + kSteps <= panel.dim; d += kSteps)
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sum[step][v] = fma(load(values + (d + step) * kGroup + v * kLanes),
                           broadcast(z[(d + step) * kTile]), sum[step][v]);
  for (; d < panel.dim; ++d)
    for (int v = 0; v < kVecs; ++v)
      sum[0][v] += component(d, v);
  Vec best = broadcast(-INFINITY);
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 3
    for (int width = kSteps / 2; width > 0; width /= 2)
#pragma GCC unroll 4
      for (int step = 0; step < width; ++step)
        sum[step][v] += sum[step + width][v];
    const Vec score = sum[0][v] + load(panel.bias.get() + group * kGroup + v * kLanes);
    store(scores + v * kLanes, score);
    best = max(best, score);
  }
  return best;
}

}  // namespace genperf
