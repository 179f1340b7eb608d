// SPDX-License-Identifier: Apache-2.0
//
// Logits and noise of gumbel_sample, and the loop over positions.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "cpu/common/draw.h"
#include "cpu/common/elements.h"
#include "cpu/common/positions.h"

namespace genperf {

constexpr int64_t kGrain = 16384;  // logits per task
constexpr int kTile = 512;         // positions per tile
constexpr int kVectors = kTile / kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kClasses = 4 * kQuads;     // drawn side by side
constexpr int kSumLength = 32 * kLanes;  // classes per float32 partial sum

// The inputs, and tau in the form that the kernels use.
template <class T>
struct GumbelInputs {
  Rows<T> logits, noise;
  int64_t outer, classes, inner;
  uint64_t seed;
  int64_t first_row;  // of the noise
  PairKeys keys;
  float inverse_tau;

  int64_t position(int64_t o, int64_t i) const { return o * inner + i; }

  // Logits of classes first ... first + kClasses - 1, of which those past the last are -inf.
  template <class N>
  [[gnu::always_inline]] Several<Vec, kClasses> read(int64_t o,
                                                     int64_t i,
                                                     N n,
                                                     int64_t first) const {
    return several<kClasses>([&](int w) __attribute__((always_inline)) {
      return first + w < classes ? logits.at(o, first + w, i).get(0, n) : broadcast(-kInfinity);
    });
  }

  // Perturbed logits of classes first ... first + kClasses - 1 for n positions starting at (o, i).
  template <class N>
  [[gnu::always_inline]] Several<Vec, kClasses> perturb(int64_t o,
                                                        int64_t i,
                                                        N n,
                                                        int64_t first,
                                                        const Several<Vec, kClasses>& l) const {
    if (noise)
      return several<kClasses>([&](int w) {
        return l.at[w] + (first + w < classes ? noise.at(o, first + w, i).get(0, n) : Vec{});
      });
    const Counters rows(first_row + position(o, i), lane_numbers());
    const auto low = several<kQuads>([&](int) { return rows.low; });
    const auto high = several<kQuads>([&](int) { return rows.high; });
    // Fewer than 2^31 classes are fewer than 2^32 quads.
    const auto words = lane_words<kQuads>(
        uniform_pairs<kQuads>([&](int q) { return first / 4 + q; }),
        uniform_pairs<kQuads>([](int) { return 0; }), pairs_of(low), pairs_of(high), keys);
    const Several<Vec, kClasses> drawn = gumbels(words);
    return several<kClasses>([&](int w) { return l.at[w] + drawn.at[w % 4 * kQuads + w / 4]; });
  }

  // Perturbed logits of one position, in order; `out` holds classes + kDrawn.
  void perturb_all(int64_t o, int64_t i, float* out) const {
    const Rows<T> row = logits.transposed().at(o, i, 0);
    if (!noise)
      draw_gumbels(seed, first_row + position(o, i), 0, classes, out);
    const Rows<T> given = noise.transposed().at(o, i, 0);
    for (int64_t k = 0; k < classes; k += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, classes - k));
      store(out + k, row.get(k, n) + (noise ? given.get(k, n) : load(out + k)));
    }
  }

  static UVec lane_numbers() {
    UVec numbers{};
    for (int lane = 0; lane < kLanes; ++lane)
      numbers[lane] = uint32_t(lane);
    return numbers;
  }
};

// Calls classes(o, i, buffer) for every position if its classes are contiguous, else positions(o,
// i, count, buffer) for every tile of at most `tile_size` positions, with a buffer of `floats`.
template <class T, class Classes, class Positions>
void for_each_position(const GumbelInputs<T>& in,
                       int64_t tile_size,
                       int64_t floats,
                       const Classes& classes,
                       const Positions& positions) {
  const bool by_class = in.logits.row_stride == 1 || in.inner == 1;
  const int64_t step = by_class ? 1 : std::min(tile_size, in.inner);
  const int64_t tiles = step ? (in.inner + step - 1) / step : 0;
  torch::stable::parallel_for(
      0, in.outer * tiles, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, in.classes * step)),
      [&](int64_t begin, int64_t end) {
        const Buffer<float> buffer(by_class ? in.classes + kDrawn : floats);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t o = tile / tiles, i = tile % tiles * step;
          if (by_class)
            classes(o, i, buffer.get());
          else
            positions(o, i, std::min(step, in.inner - i), buffer.get());
        }
      });
}

}  // namespace genperf
