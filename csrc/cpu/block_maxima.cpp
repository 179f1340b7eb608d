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
void maxima_fma(const CodePanel& panel, int64_t begin, int64_t end, const float* z, float* maxima) {
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

#define GENPERF_AMX __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kTileSize = kGroup * kDepth;

// The kernels below have codes on the rows and queries on the columns, so that a vector of the
// product holds 16 queries, and take groups two by two. How they use the eight tiles follows from
// the depth: where the queries fit, they stay in tiles, for loads are what the matrix unit waits
// for when the core is shared.
class Maxima {
 public:
  Maxima(const CodePanel& panel, int64_t begin, int64_t end, float* maxima)
      : codes(panel.halves.get()),
        first(begin * panel.block_groups),
        last(end * panel.block_groups),
        bias_(panel.bias.get()),
        maxima_(maxima + begin * kAmxTile),
        block_groups_(panel.block_groups),
        left_(panel.block_groups) {}

  // The scores [2, 16, 16] of a group against the two sub-tiles of queries.
  void take(int64_t group, const float* scores) {
    const float* bias = bias_ + group * kGroup;
    const Vec lowest = broadcast(-INFINITY);
    Vec best[2][2] = {{lowest, lowest}, {lowest, lowest}};
    for (int code = 0; code < kGroup; ++code) {
      const Vec b = broadcast(bias[code]);
      for (int v = 0; v < 2; ++v)
        best[v][code % 2] = max(best[v][code % 2], load(scores + v * 256 + code * 16) + b);
    }
    for (int v = 0; v < 2; ++v)
      best_[v] = max(best_[v], max(best[v][0], best[v][1]));
    if (--left_ > 0)
      return;
    for (int v = 0; v < 2; ++v) {
      store(maxima_ + v * 16, best_[v]);
      best_[v] = lowest;
    }
    maxima_ += kAmxTile;
    left_ = block_groups_;
  }

  const uint16_t* const codes;
  const int64_t first, last;  // groups

 private:
  const float* bias_;
  float* maxima_;
  const int64_t block_groups_;
  int64_t left_;  // groups until the block is complete
  Vec best_[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
};

// Queries in tiles 6 and 7. Two pairs of accumulators take turns: while the matrix unit fills one,
// the other's maxima are taken.
GENPERF_AMX void maxima_of_depth_1(Maxima maxima, const uint16_t* halves) {
  alignas(64) float scores[512];
  _tile_loadd(6, halves, 64);
  _tile_loadd(7, halves + kTileSize, 64);
  const uint16_t* codes = maxima.codes + maxima.first * kTileSize;
  _tile_zero(0);
  _tile_zero(1);
  _tile_loadd(4, codes, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  for (int64_t group = maxima.first; group < maxima.last; group += 2, codes += 2 * kTileSize) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, codes + kTileSize, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    maxima.take(group, scores);
    if (group + 2 < maxima.last) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(4, codes + 2 * kTileSize, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(2, scores, 64);
    _tile_stored(3, scores + 256, 64);
    maxima.take(group + 1, scores);
  }
}

// Queries in tiles 4 to 7.
GENPERF_AMX void maxima_of_depth_2(Maxima maxima, const uint16_t* halves) {
  alignas(64) float scores[512];
  _tile_loadd(4, halves, 64);
  _tile_loadd(5, halves + kTileSize, 64);
  _tile_loadd(6, halves + 2 * kTileSize, 64);
  _tile_loadd(7, halves + 3 * kTileSize, 64);
  for (int64_t group = maxima.first; group < maxima.last; ++group) {
    const uint16_t* codes = maxima.codes + group * 2 * kTileSize;
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, codes, 64);
    _tile_dpbf16ps(0, 2, 4);
    _tile_dpbf16ps(1, 2, 6);
    _tile_loadd(3, codes + kTileSize, 64);
    _tile_dpbf16ps(0, 3, 5);
    _tile_dpbf16ps(1, 3, 7);
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    maxima.take(group, scores);
  }
}

// Two groups of codes in tiles 4 and 5, queries in 6 and 7, loaded anew for each step in depth.
GENPERF_AMX void maxima_of_any_depth(Maxima maxima, const uint16_t* halves, int64_t depth) {
  alignas(64) float scores[2][512];
  for (int64_t group = maxima.first; group < maxima.last; group += 2) {
    const uint16_t* codes = maxima.codes + group * depth * kTileSize;
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
    _tile_stored(0, scores[0], 64);
    _tile_stored(1, scores[0] + 256, 64);
    _tile_stored(2, scores[1], 64);
    _tile_stored(3, scores[1] + 256, 64);
    maxima.take(group, scores[0]);
    maxima.take(group + 1, scores[1]);
  }
}

}  // namespace

GENPERF_AMX void block_maxima_amx(const CodePanel& panel,
                                  int64_t begin,
                                  int64_t end,
                                  const uint16_t* halves,
                                  float* maxima) {
  static_assert(kTile == kAmxTile);
  const TileConfig config;
  _tile_loadconfig(&config);
  const Maxima range(panel, begin, end, maxima);
  if (panel.depth == 1)
    maxima_of_depth_1(range, halves);
  else if (panel.depth == 2)
    maxima_of_depth_2(range, halves);
  else
    maxima_of_any_depth(range, halves, panel.depth);
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
