// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/block_maxima.h"

#include <algorithm>
#include <cmath>

namespace genperf {
namespace {

// Codes scored at a time. With two vectors of queries they need 16 of the 32 registers of AVX-512
// and aarch64, or 8 of 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kCodes = 8;
#else
constexpr int kCodes = 4;
#endif

bool amx = false, vnni = false;

// Scores of kCodes codes for a tile of queries, from the components of the codes on. A compile-time
// D unrolls short loops and keeps the queries in registers.
template <int kKnownDim>
[[gnu::always_inline]] inline void score_codes(const float* values,
                                               const float* bias,
                                               int64_t dim,
                                               const float* z,
                                               Vec (&score)[2][kCodes]) {
  if constexpr (kKnownDim > 0)
    dim = kKnownDim;
  Vec sum[2][kCodes];  // in registers; GCC for aarch64 stores those of the caller in every step
#pragma GCC unroll 8
  for (int c = 0; c < kCodes; ++c)
    sum[0][c] = sum[1][c] = broadcast(bias[c]);
  for (int64_t d = 0; d < dim; ++d) {
    const Vec z0 = load(z + d * kTile), z1 = load(z + d * kTile + kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kCodes; ++c) {
      const Vec value = broadcast(values[d * kGroup + c]);
      sum[0][c] = fma(value, z0, sum[0][c]);
      sum[1][c] = fma(value, z1, sum[1][c]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kCodes; ++c) {
    score[0][c] = sum[0][c];
    score[1][c] = sum[1][c];
  }
}

template <int kKnownDim>
void maxima_fma(const CodePanel& panel,
                int64_t block_groups,
                int64_t begin,
                int64_t end,
                const float* z,
                float* maxima) {
  const int64_t dim = kKnownDim ? kKnownDim : panel.dim;
  for (int64_t block = begin; block < end; ++block) {
    Vec best[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    const int64_t first = block * block_groups;
    for (int64_t group = first; group < first + block_groups; ++group) {
      for (int start = 0; start < kGroup; start += kCodes) {
        Vec score[2][kCodes];
        score_codes<kKnownDim>(panel.values.get() + group * dim * kGroup + start,
                               panel.bias.get() + group * kGroup + start, dim, z, score);
#pragma GCC unroll 3
        for (int width = kCodes / 2; width > 0; width /= 2)
#pragma GCC unroll 4
          for (int c = 0; c < width; ++c)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v)
              score[v][c] = max(score[v][c], score[v][c + width]);
        best[0] = max(best[0], score[0][0]);
        best[1] = max(best[1], score[1][0]);
      }
    }
    store(maxima + block * kTile, best[0]);
    store(maxima + block * kTile + kLanes, best[1]);
  }
}

}  // namespace

void block_maxima_fma(const CodePanel& panel,
                      int64_t block_groups,
                      int64_t begin,
                      int64_t end,
                      const float* z,
                      float* maxima) {
  using Kernel = void (*)(const CodePanel&, int64_t, int64_t, int64_t, const float*, float*);
  static constexpr Kernel kernels[] = {maxima_fma<0>, maxima_fma<1>, maxima_fma<2>,
                                       maxima_fma<3>, maxima_fma<4>, maxima_fma<5>,
                                       maxima_fma<6>, maxima_fma<7>, maxima_fma<8>};
  kernels[panel.dim <= 8 ? panel.dim : 0](panel, block_groups, begin, end, z, maxima);
}

void scores_fma(const CodePanel& panel, int64_t begin, int64_t end, const float* z, float* scores) {
  for (int64_t k = begin * kGroup; k < end * kGroup; k += kCodes) {
    Vec score[2][kCodes];
    score_codes<0>(panel.values.get() + k / kGroup * panel.dim * kGroup + k % kGroup,
                   panel.bias.get() + k, panel.dim, z, score);
    for (int c = 0; c < kCodes; ++c)
      for (int v = 0; v < 2; ++v)
        store(scores + (k + c) * kTile + v * kLanes, score[v][c]);
  }
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
constexpr int kScores = kAmxTile * kGroup;

// The rows of a product are queries and its columns are codes, as both are packed.

// Scores of a group of codes for the 16 queries in tiles 6 and 7.
#define GENPERF_SCORE(product, codes)      \
  _tile_zero(product);                     \
  _tile_loadd(4, codes, 64);               \
  _tile_dpbf16ps(product, 6, 4);           \
  if constexpr (kTiles == 2) {             \
    _tile_loadd(5, codes + kTileSize, 64); \
    _tile_dpbf16ps(product, 7, 5);         \
  }

// The queries stay in tiles and their maxima in vectors. There are two products: while AMX computes
// one, the maxima of the other are taken.
template <int kTiles>
GENPERF_AMX void maxima_of_depth(const CodePanel& panel,
                                 int64_t block_groups,
                                 int64_t begin,
                                 int64_t end,
                                 const uint16_t* z,
                                 float* maxima) {
  alignas(64) float scores[2][kGroup * kGroup];
  const uint16_t* codes = panel.bf16_values.get() + begin * block_groups * kTiles * kTileSize;
  const float* bias = panel.bias.get() + begin * block_groups * kGroup;
  _tile_loadd(6, z, kTiles * 64);
  if constexpr (kTiles == 2)
    _tile_loadd(7, z + kDepth, kTiles * 64);
  GENPERF_SCORE(0, codes);
  for (int64_t block = begin; block < end; ++block) {
    Vec best[kGroup];
    const auto take = [&](const float* scores, Vec b) {
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i)
        best[i] = max(best[i], load(scores + i * kGroup) + b);
    };
    for (int i = 0; i < kGroup; ++i)
      best[i] = broadcast(-INFINITY);
    for (int64_t group = 0; group < block_groups; group += 2) {
      GENPERF_SCORE(1, codes + kTiles * kTileSize);
      _tile_stored(0, scores[0], 64);
      take(scores[0], load(bias));
      codes += 2 * kTiles * kTileSize;
      if (group + 2 < block_groups || block + 1 < end) {
        GENPERF_SCORE(0, codes);
      }
      _tile_stored(1, scores[1], 64);
      take(scores[1], load(bias + kGroup));
      bias += 2 * kGroup;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i)
      store(maxima + (block * kAmxTile + i) * kGroup, best[i]);
  }
}

// Queries in tiles 4 and 5, two groups of codes in tiles 6 and 7, reloaded for every step in depth.
// Loading all tiles before the products is 8 % faster when another process shares the core.
GENPERF_AMX void maxima_of_any_depth(const CodePanel& panel,
                                     int64_t block_groups,
                                     int64_t begin,
                                     int64_t end,
                                     const uint16_t* z,
                                     float* maxima) {
  alignas(64) float scores[2][kScores];
  const int64_t depth = panel.depth, row_bytes = depth * kDepth * sizeof(uint16_t);
  const uint16_t* codes = panel.bf16_values.get() + begin * block_groups * depth * kTileSize;
  const float* bias = panel.bias.get() + begin * block_groups * kGroup;
  for (int64_t block = begin; block < end; ++block) {
    float* const out = maxima + block * kScores;
    for (int64_t group = 0; group < block_groups; group += 2) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t t = 0; t < depth; ++t) {
        _tile_loadd(4, z + t * kDepth, row_bytes);
        _tile_loadd(6, codes + t * kTileSize, 64);
        _tile_loadd(5, z + depth * kTileSize + t * kDepth, row_bytes);
        _tile_loadd(7, codes + (depth + t) * kTileSize, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
      }
      _tile_stored(0, scores[0], 64);
      _tile_stored(1, scores[0] + kScores / 2, 64);
      _tile_stored(2, scores[1], 64);
      _tile_stored(3, scores[1] + kScores / 2, 64);
      const Vec low = load(bias), high = load(bias + kGroup), lowest = broadcast(-INFINITY);
#pragma GCC unroll 4
      for (int i = 0; i < kScores; i += kGroup) {
        const Vec found = max(load(scores[0] + i) + low, load(scores[1] + i) + high);
        store(out + i, max(group == 0 ? lowest : load(out + i), found));
      }
      codes += 2 * depth * kTileSize;
      bias += 2 * kGroup;
    }
  }
}

}  // namespace

GENPERF_AMX void block_maxima_amx(const CodePanel& panel,
                                  int64_t block_groups,
                                  int64_t begin,
                                  int64_t end,
                                  const uint16_t* z,
                                  float* maxima) {
  const TileConfig config;
  _tile_loadconfig(&config);
  if (panel.depth > 2) {
    maxima_of_any_depth(panel, block_groups, begin, end, z, maxima);
  } else {
    const auto kernel = panel.depth == 1 ? maxima_of_depth<1> : maxima_of_depth<2>;
    for (int first = 0; first < kAmxTile; first += kGroup)
      kernel(panel, block_groups, begin, end, z + first * panel.depth * kDepth,
             maxima + first * kGroup);
  }
  _tile_release();
}

bool amx_allowed() {
  return amx;
}

bool vnni_allowed() {
  return vnni;
}

#else

bool amx_allowed() {
  return false;
}

bool vnni_allowed() {
  return false;
}

#endif

}  // namespace genperf

// Called by the loader after the operating system has granted the tile state.
extern "C" __attribute__((visibility("default"))) void genperf_allow_amx() {
  genperf::amx = true;
}

extern "C" __attribute__((visibility("default"))) void genperf_allow_vnni() {
  genperf::vnni = true;
}
