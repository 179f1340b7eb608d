// SPDX-License-Identifier: Apache-2.0
//
// The first pass in bfloat16 with AMX or in 8 bits with AVX-512 VNNI, with 16 maxima for each query
// and block; the second in float32 on the original inputs, or in float64 if those are float64.
#include "cpu/search/code_panel.h"

#if defined(GENPERF_HAS_AMX)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/search/amx_queries.h"
#include "cpu/search/int8_queries.h"
#include "cpu/search/panel_search.h"
#include "cpu/search/rescore.h"

namespace genperf {
namespace {

// Components of candidates from which on it pays to wait for the score of the best one.
constexpr int64_t kMinBestFirst = 4000;

// Scores the codes of a query's candidate maxima again, and compares those within the bound in
// float64. `maxima` are those of the query, kRows rows of 16 apart. The codes of the largest one
// come first where the bounds of the scores are wide and there is much to score: their scores leave
// out most of the others.
template <class Queries, class T, class C>
void score_codes(const PanelSearch<T, C>& search,
                 SearchScratch& s,
                 int query,
                 const OpMath<T>* row,
                 const Queries& queries,
                 const float* maxima,
                 const uint64_t* candidates,
                 int64_t words) {
  const CodePanel& panel = *search.panel;
  const int lane = query % kRows;
  const auto for_each_place = [&](const auto& f) {
    for (int64_t word = 0; word < words; ++word)
      for (uint64_t bits = candidates[word]; bits; bits &= bits - 1)
        f(word * 4 * kGroup + __builtin_ctzll(bits));
  };
  const auto maximum = [&](int64_t place) {
    return maxima[place / kGroup * kRows * kGroup + place % kGroup];
  };
  int64_t listed = 0, scored = 0;
  const auto list = [&](int64_t place) {
    int64_t k = place / kGroup * panel.block_groups * kGroup + place % kGroup;
    for (int64_t g = 0; g < panel.block_groups; ++g, k += kGroup)
      if (k < panel.codes)
        s.codes[listed++] = int32_t(k);
  };
  float* const scores = s.scores.get();
  Vec4 best = Vec4{} - INFINITY;
  const auto score_listed = [&] {
    for (; scored < listed; scored += 4) {
      const C *codes[4], *next[4];
      for (int c = 0; c < 4; ++c) {
        codes[c] = search.code(s.codes[std::min(scored + c, listed - 1)]);
        next[c] = search.code(s.codes[std::min(scored + 4 + c, listed - 1)]);
      }
      const Vec4 found = rescore(row, codes, next, search.x.dim, search.cosine);
      std::memcpy(scores + scored, &found, sizeof(found));
      best = found > best ? found : best;
    }
    scored = listed;
    return std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
  };
  if constexpr (Queries::kWideBounds) {
    int64_t places = 0;
    for (int64_t word = 0; word < words; ++word)
      places += __builtin_popcountll(candidates[word]);
    if (places * panel.block_groups * panel.dim >= kMinBestFirst) {
      int64_t first = -1;
      for_each_place([&](int64_t place) {
        if (first < 0 || maximum(place) > maximum(first))
          first = place;
      });
      list(first);
      const float top = score_listed();
      const float least =
          queries.least_maximum(lane, search.cosine ? top : top - search.distance_offset, panel);
      for_each_place([&](int64_t place) {
        if (place != first && !(maximum(place) < least))
          list(place);
      });
    }
  }
  if (listed == 0)
    for_each_place(list);
  const float top = score_listed();
  const float threshold = search.cosine ? top - queries.bounds.fine[lane]
                                        : top * search.distance_factor - search.distance_offset;
  typename PanelSearch<T, C>::BestCode nearest(search, s.offsets[query]);
  for (int64_t i = 0; i < scored; i += 4) {
    Vec4 found;
    std::memcpy(&found, scores + i, sizeof(found));
    for (uint32_t bits = not_below(found, threshold); bits; bits &= bits - 1)
      if (const int64_t at = i + __builtin_ctz(bits); at < scored)
        nearest.offer(s.codes[at]);
  }
  search.accept(s.positions[query], nearest);
  s.rescored += scored;
}

template <class Queries, class T, class C>
void search_columns(const PanelSearch<T, C>& search, int count, SearchScratch& s) {
  using W = OpMath<T>;
  constexpr int kScores = kRows * kGroup;
  const Positions<T>& x = search.x;
  const CodePanel& panel = *search.panel;
  const int tiles = (count + kRows - 1) / kRows;
  const auto tile_maxima = [&](int t) { return s.maxima.get() + t * panel.blocks() * kScores; };
  const W* rows[kMaxQueries];
  Queries queries[kMaxQueries / kRows];
  W* const copies = static_cast<W*>(s.rows(count * x.dim * sizeof(W)));
  for (int t = 0; t < tiles; ++t) {
    const int first = t * kRows, size = std::min(kRows, count - first);
    Tile<T>(x, s.offsets + first, size).read(copies + first * x.dim, rows + first);
    queries[t].pack(rows + first, size, panel, s.packed.get() + first * panel.query_bytes());
  }
  for_each_run(panel, panel.query_bytes(), [&](int64_t block, int64_t last) {
    for (int t = 0; t < tiles; ++t)
      queries[t].block_maxima(panel, panel.block_groups, block, last, tile_maxima(t));
  });
  const int64_t words = s.words_per_query(panel);
  for (int t = 0; t < tiles; ++t) {
    const int size = std::min(kRows, count - t * kRows);
    for (int first = 0; first < size; first += kGroup) {
      const float* maxima = tile_maxima(t) + first * kGroup;
      Vec best[kGroup];
      std::fill_n(best, kGroup, broadcast(-INFINITY));
      for (int64_t block = 0; block < panel.blocks(); ++block) {
        const auto lowest = queries[t].lowest(panel, block, first);
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i)
          best[i] = max(best[i], lowest(load(maxima + block * kScores + i * kGroup), i));
      }
      transpose(best);
#pragma GCC unroll 16
      for (int i = 1; i < kGroup; ++i)
        best[0] = max(best[0], best[i]);
      const Vec threshold = queries[t].threshold(best[0], first);
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
    const ErrorBounds& bounds = queries[t].bounds;
    for (int i = 0; i < size; ++i)
      if (bounds.has_nan[i])
        search.accept_first(s.positions[t * kRows + i]);
      else
        score_codes(search, s, t * kRows + i, rows[t * kRows + i], queries[t],
                    tile_maxima(t) + i * kGroup, s.candidate_bits.get() + i * words, words);
  }
}

}  // namespace

template <class T, class C>
void search_low_precision(const PanelSearch<T, C>& search, int count, SearchScratch& s) {
  if (search.panel->packing == Packing::kInt8)
    search_columns<Int8Queries>(search, count, s);
  else
    search_columns<AmxQueries>(search, count, s);
}

#define INSTANTIATE(T, C) \
  template void search_low_precision(const PanelSearch<T, C>&, int, SearchScratch&);
GENPERF_FOR_SEARCH_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace genperf

#endif
