// SPDX-License-Identifier: Apache-2.0
#include "block_maxima.h"

#include <algorithm>
#include <cmath>

namespace genperf {
namespace {

// Codes scored at a time: with two vectors of queries, 16 accumulators of AVX-512's 32 registers, 8
// of the 16 elsewhere.
constexpr int kCodes = kLanes == 16 ? 8 : 4;

bool amx = false;

// With D known to the compiler, short loops over it are unrolled and the queries stay in registers.
template <int kKnownDim>
void maxima_fma(const CodePanel& panel,
                int64_t begin,
                int64_t end,
                const float* z,
                float* maxima) {
  const int64_t dim = kKnownDim ? kKnownDim : panel.dim;
  for (int64_t block = begin; block < end; ++block) {
    Vec best[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    const int64_t first = block * panel.block_groups;
    for (int64_t group = first; group < first + panel.block_groups; ++group) {
      for (int start = 0; start < kGroup; start += kCodes) {
        const float* values = panel.values.get() + group * dim * kGroup + start;
        const float* bias = panel.bias.get() + group * kGroup + start;
        Vec score[kCodes][2];
        for (int c = 0; c < kCodes; ++c)
          score[c][0] = score[c][1] = broadcast(bias[c]);
        for (int64_t d = 0; d < dim; ++d) {
          const Vec z0 = load(z + d * kTile), z1 = load(z + d * kTile + kLanes);
          for (int c = 0; c < kCodes; ++c) {
            const Vec value = broadcast(values[d * kGroup + c]);
            score[c][0] = fma(value, z0, score[c][0]);
            score[c][1] = fma(value, z1, score[c][1]);
          }
        }
        for (int width = kCodes / 2; width > 0; width /= 2)
          for (int c = 0; c < width; ++c)
            for (int v = 0; v < 2; ++v)
              score[c][v] = max(score[c][v], score[c + width][v]);
        best[0] = max(best[0], score[0][0]);
        best[1] = max(best[1], score[0][1]);
      }
    }
    store(maxima + block * kTile, best[0]);
    store(maxima + block * kTile + kLanes, best[1]);
  }
}

}  // namespace

void block_maxima_fma(const CodePanel& panel,
                      int64_t begin,
                      int64_t end,
                      const float* z,
                      float* maxima) {
  using Kernel = void (*)(const CodePanel&, int64_t, int64_t, const float*, float*);
  static constexpr Kernel kernels[] = {maxima_fma<0>, maxima_fma<1>, maxima_fma<2>,
                                       maxima_fma<3>, maxima_fma<4>, maxima_fma<5>,
                                       maxima_fma<6>, maxima_fma<7>, maxima_fma<8>};
  kernels[panel.dim <= 8 ? panel.dim : 0](panel, begin, end, z, maxima);
}

#if defined(GENPERF_HAS_AMX)

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The largest of best and of the 16 scores + bias in each column.
inline void take(const float* scores, const float* bias, Vec (&best)[2]) {
  for (int code = 0; code < kGroup; code += 2) {
    best[0] = max(best[0], load(scores + code * 16) + broadcast(bias[code]));
    best[1] = max(best[1], load(scores + (code + 1) * 16) + broadcast(bias[code + 1]));
  }
}

// Codes on the rows and queries on the columns, so that a vector of the product holds 16 queries.
// Two pairs of accumulators, 16 codes x 32 queries each, take turns: while the matrix unit fills
// one, the other's maxima are taken. Tiles 0, 1 and 2, 3 accumulate, 4 and 5 hold their codes, 6
// and 7 queries.
template <int kKnownDepth>
__attribute__((target("amx-tile,amx-bf16"))) void maxima_amx(const CodePanel& panel,
                                                             int64_t begin,
                                                             int64_t end,
                                                             const uint16_t* halves,
                                                             float* maxima) {
  static_assert(kTile == kAmxTile);
  constexpr int64_t kTileSize = kGroup * kDepth;
  alignas(64) float scores[2][kGroup * 16];
  const int64_t depth = kKnownDepth ? kKnownDepth : panel.depth;
  const uint16_t* codes = panel.halves.get();
  const auto even = [&](int64_t group) __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
    const uint16_t* rows = codes + group * depth * kTileSize;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t t = 0; t < depth; ++t) {
      _tile_loadd(4, rows + t * kTileSize, 64);
      if constexpr (kKnownDepth != 1)
        _tile_loadd(6, halves + t * kTileSize, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kKnownDepth != 1)
        _tile_loadd(7, halves + (depth + t) * kTileSize, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  };
  const auto odd = [&](int64_t group) __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
    const uint16_t* rows = codes + group * depth * kTileSize;
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < depth; ++t) {
      _tile_loadd(5, rows + t * kTileSize, 64);
      if constexpr (kKnownDepth != 1)
        _tile_loadd(6, halves + t * kTileSize, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kKnownDepth != 1)
        _tile_loadd(7, halves + (depth + t) * kTileSize, 64);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  const TileConfig config;
  _tile_loadconfig(&config);
  if constexpr (kKnownDepth == 1) {
    _tile_loadd(6, halves, 64);
    _tile_loadd(7, halves + kTileSize, 64);
  }
  const int64_t block_groups = panel.block_groups;
  const int64_t last = end * block_groups;
  const Vec lowest = broadcast(-INFINITY);
  Vec best[2][2] = {{lowest, lowest}, {lowest, lowest}};  // of both halves of the queries
  int64_t block = begin, left = block_groups;
  const auto finish_group = [&] {
    if (--left > 0)
      return;
    for (int v = 0; v < 2; ++v) {
      store(maxima + block * kAmxTile + v * 16, max(best[v][0], best[v][1]));
      best[v][0] = best[v][1] = lowest;
    }
    ++block;
    left = block_groups;
  };
  even(begin * block_groups);
  for (int64_t group = begin * block_groups; group < last; group += 2) {
    const float* bias = panel.bias.get() + group * kGroup;
    odd(group + 1);
    _tile_stored(0, scores[0], 64);
    _tile_stored(1, scores[1], 64);
    take(scores[0], bias, best[0]);
    take(scores[1], bias, best[1]);
    finish_group();
    if (group + 2 < last)
      even(group + 2);
    _tile_stored(2, scores[0], 64);
    _tile_stored(3, scores[1], 64);
    take(scores[0], bias + kGroup, best[0]);
    take(scores[1], bias + kGroup, best[1]);
    finish_group();
  }
  _tile_release();
}

}  // namespace

void block_maxima_amx(const CodePanel& panel,
                      int64_t begin,
                      int64_t end,
                      const uint16_t* halves,
                      float* maxima) {
  if (panel.depth == 1)
    maxima_amx<1>(panel, begin, end, halves, maxima);
  else if (panel.depth == 2)
    maxima_amx<2>(panel, begin, end, halves, maxima);
  else
    maxima_amx<0>(panel, begin, end, halves, maxima);
}

bool amx_allowed() {
  return amx;
}

#else

bool amx_allowed() {
  return false;
}

#endif

}  // namespace genperf

// Called by the loader once the operating system has granted the tile state.
extern "C" __attribute__((visibility("default"))) void genperf_allow_amx() {
  genperf::amx = true;
}
