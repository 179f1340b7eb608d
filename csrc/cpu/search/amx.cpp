// SPDX-License-Identifier: Apache-2.0
//
// The first pass in bfloat16 with AMX, with the queries on the rows of a tile and 16 maxima for
// each query and block; the second in float32 on the original inputs, or in float64 if those are
// float64.
#include "cpu/search/code_panel.h"

#if defined(GENPERF_HAS_AMX)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/search/amx_queries.h"
#include "cpu/search/block_maxima.h"
#include "cpu/search/panel_search.h"
#include "cpu/search/rescore.h"

namespace genperf {
namespace {

// Scores the codes of one query's candidate maxima again, and compares those within the bound in
// float64.
template <class T, class C>
void score_codes(const PanelSearch<T, C>& search,
                 SearchScratch& s,
                 int query,
                 const OpMath<T>* row,
                 float bound,
                 const uint64_t* candidates,
                 int64_t words) {
  const CodePanel& panel = *search.panel;
  const int64_t last = panel.codes - 1;
  int64_t scored = 0;
  float* const scores = s.scores.get();
  Vec4 best = Vec4{} - INFINITY;
  for (int64_t word = 0; word < words; ++word)
    for (uint64_t bits = candidates[word]; bits; bits &= bits - 1) {
      const int64_t block = word * 4 + __builtin_ctzll(bits) / kGroup;
      int64_t k = block * panel.block_groups * kGroup + __builtin_ctzll(bits) % kGroup;
      for (int64_t g = 0; g < panel.block_groups; g += 4, scored += 4) {
        const C* codes[4];
        for (int c = 0; c < 4; ++c, k += kGroup) {
          s.codes[scored + c] = int32_t(k);
          codes[c] = search.code(std::min(k, last));
        }
        const Vec4 found = rescore(row, codes, search.x.dim, search.cosine);
        std::memcpy(scores + scored, &found, sizeof(found));
        best = found > best ? found : best;
      }
    }
  const float top = std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
  const float threshold =
      search.cosine ? top - bound : top * search.distance_factor - search.distance_offset;
  typename PanelSearch<T, C>::BestCode nearest(search, s.offsets[query]);
  for (int64_t i = 0; i < scored; i += 4) {
    Vec4 found;
    std::memcpy(&found, scores + i, sizeof(found));
    for (uint32_t bits = not_below(found, threshold); bits; bits &= bits - 1)
      if (const int64_t k = s.codes[i + __builtin_ctz(bits)]; k <= last)
        nearest.offer(k);
  }
  search.accept(s.positions[query], nearest);
}

}  // namespace

template <class T, class C>
void search_amx(const PanelSearch<T, C>& search, int count, SearchScratch& s) {
  using W = OpMath<T>;
  constexpr int kScores = kRows * kGroup;
  const Positions<T>& x = search.x;
  const CodePanel& panel = *search.panel;
  const int tiles = (count + kRows - 1) / kRows;
  const int64_t z_length = panel.depth * kDepth;
  const auto tile_z = [&](int t) { return s.z_bf16.get() + t * kRows * z_length; };
  const auto tile_maxima = [&](int t) { return s.maxima.get() + t * panel.blocks() * kScores; };
  const W* rows[kMaxQueries];
  ErrorBounds bounds[kMaxQueries / kRows];
  W* const copies = static_cast<W*>(s.rows(count * x.dim * sizeof(W)));
  for (int t = 0; t < tiles; ++t) {
    const int first = t * kRows, size = std::min(kRows, count - first);
    Tile<T>(x, s.offsets + first, size).read(copies + first * x.dim, rows + first);
    bounds[t] = pack_rows(rows + first, size, panel, tile_z(t));
  }
  for_each_run(panel, z_length * sizeof(uint16_t), [&](int64_t block, int64_t last) {
    for (int t = 0; t < tiles; ++t)
      block_maxima_amx(panel, panel.block_groups, block, last, tile_z(t), tile_maxima(t));
  });
  const int64_t words = s.words_per_query(panel);
  for (int t = 0; t < tiles; ++t) {
    for (int first = 0; first < kRows; first += kGroup) {
      const float* maxima = tile_maxima(t) + first * kGroup;
      Vec best[kGroup];
      std::fill_n(best, kGroup, broadcast(-INFINITY));
      for (int64_t block = 0; block < panel.blocks(); ++block)
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i)
          best[i] = max(best[i], load(maxima + block * kScores + i * kGroup));
      transpose(best);
#pragma GCC unroll 16
      for (int i = 1; i < kGroup; ++i)
        best[0] = max(best[0], best[i]);
      const Vec threshold = best[0] - load(bounds[t].coarse + first);
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i)
        best[i] = broadcast(threshold[i]);
      uint16_t* const bits = reinterpret_cast<uint16_t*>(s.candidate_bits.get() + first * words);
      for (int64_t block = 0; block < panel.blocks(); ++block)
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i)
          bits[i * words * 4 + block] =
              uint16_t(not_below(load(maxima + block * kScores + i * kGroup), best[i]));
    }
    for (int i = 0; i < std::min(kRows, count - t * kRows); ++i)
      if (bounds[t].has_nan[i])
        search.accept_first(s.positions[t * kRows + i]);
      else
        score_codes(search, s, t * kRows + i, rows[t * kRows + i], bounds[t].fine[i],
                    s.candidate_bits.get() + i * words, words);
  }
}

#define INSTANTIATE(T, C) template void search_amx(const PanelSearch<T, C>&, int, SearchScratch&);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, BFloat16)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, Half)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace genperf

#endif
