// SPDX-License-Identifier: Apache-2.0
#include "block_maxima.h"

#include <cmath>

namespace genperf {
namespace {

// Codes scored at a time: with two vectors of queries, 16 accumulators of AVX-512's 32 registers, 8
// of the 16 elsewhere.
constexpr int kCodes = kLanes == 16 ? 8 : 4;

bool amx = false;

}  // namespace

void block_maxima_fma(const CodePanel& panel,
                      int64_t begin,
                      int64_t end,
                      const float* z,
                      float* maxima) {
  const int64_t dim = panel.dim;
  for (int64_t block = begin; block < end; ++block) {
    Vec best[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    const int64_t first = block * panel.block_groups;
    for (int64_t group = first; group < first + panel.block_groups; ++group) {
      for (int start = 0; start < kGroup; start += kCodes) {
        const float* values = panel.values.get() + group * dim * kGroup + start;
        const float* bias = panel.bias.get() + group * kGroup + start;
        Vec score[kCodes][2];
        for (int c = 0; c < kCodes; ++c)
          score[c][0] = score[c][1] = broadcast(-bias[c]);
        for (int64_t d = 0; d < dim; ++d) {
          const Vec z0 = load(z + d * kTile), z1 = load(z + d * kTile + kLanes);
          for (int c = 0; c < kCodes; ++c) {
            const Vec value = broadcast(values[d * kGroup + c]);
            score[c][0] = fma(value, z0, score[c][0]);
            score[c][1] = fma(value, z1, score[c][1]);
          }
        }
        for (int c = 0; c < kCodes; ++c) {
          best[0] = max(best[0], score[c][0]);
          best[1] = max(best[1], score[c][1]);
        }
      }
    }
    store(maxima + block * kTile, best[0]);
    store(maxima + block * kTile + kLanes, best[1]);
  }
}

#if defined(GENPERF_HAS_AMX)

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Codes on the rows and queries on the columns, so that a vector of the product holds 16 queries.
// Tiles 0-3 accumulate 32 codes x 32 queries; 4, 5 hold codes and 6, 7 queries.
__attribute__((target("amx-tile,amx-bf16"))) void block_maxima_amx(const CodePanel& panel,
                                                                   int64_t begin,
                                                                   int64_t end,
                                                                   const uint16_t* halves,
                                                                   float* maxima) {
  static_assert(kTile == kAmxTile);
  const TileConfig config;
  alignas(64) float scores[2][2][kGroup * 16];
  const int64_t depth = panel.depth;
  constexpr int64_t kTileSize = kGroup * kDepth;
  _tile_loadconfig(&config);
  for (int64_t block = begin; block < end; ++block) {
    Vec best[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    const int64_t first = block * panel.block_groups;
    for (int64_t group = first; group < first + panel.block_groups; group += 2) {
      const uint16_t* codes = panel.halves.get() + group * depth * kTileSize;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t t = 0; t < depth; ++t) {
        _tile_loadd(4, codes + t * kTileSize, 64);
        _tile_loadd(6, halves + t * kTileSize, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, halves + (depth + t) * kTileSize, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, codes + (depth + t) * kTileSize, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, scores[0][0], 64);
      _tile_stored(1, scores[0][1], 64);
      _tile_stored(2, scores[1][0], 64);
      _tile_stored(3, scores[1][1], 64);
      for (int half = 0; half < 2; ++half) {
        const float* bias = panel.bias.get() + (group + half) * kGroup;
        for (int code = 0; code < kGroup; ++code) {
          const Vec b = broadcast(bias[code]);
          best[0] = max(best[0], load(scores[half][0] + code * 16) - b);
          best[1] = max(best[1], load(scores[half][1] + code * 16) - b);
        }
      }
    }
    store(maxima + block * kAmxTile, best[0]);
    store(maxima + block * kAmxTile + 16, best[1]);
  }
  _tile_release();
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
