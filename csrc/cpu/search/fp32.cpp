// SPDX-License-Identifier: Apache-2.0
//
// Both passes in float32 on the packed codes, with the queries along the lanes and one maximum for
// each query and block.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/search/block_maxima.h"
#include "cpu/search/fp32_queries.h"
#include "cpu/search/group_scores.h"
#include "cpu/search/panel_search.h"

namespace genperf {
namespace {

constexpr int64_t kFewDims = 16;

// Scores the codes of one query's candidate blocks again, and compares those within the bound in
// float64.
template <class T, class C>
void score_blocks(const PanelSearch<T, C>& search,
                  SearchScratch& s,
                  int query,
                  const float* z,
                  const ErrorBounds& bounds,
                  int lane,
                  const int32_t* blocks,
                  int64_t count) {
  const CodePanel& panel = *search.panel;
  const int64_t block_codes = panel.block_groups * kGroup;
  Vec best = broadcast(-INFINITY);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < panel.block_groups; ++g) {
      const int64_t group = blocks[i] * panel.block_groups + g;
      float* scores = s.scores.get() + i * block_codes + g * kGroup;
      const Vec highest = score_group(panel, group, z, scores);
      if (!panel.uneven_blocks) {
        best = max(best, highest);
        continue;
      }
      // The scores become those that the codes have at most.
      for (int k = 0; k < kGroup; k += kLanes) {
        const Vec score = load(scores + k);
        const Vec error = bounds.fine_error(lane, load(panel.bias.get() + group * kGroup + k));
        best = max(best, score - error);
        store(scores + k, score + error);
      }
    }
  const float bound = panel.uneven_blocks ? 0 : bounds.fine[lane];
  const Vec threshold = broadcast(largest(best) - bound);
  typename PanelSearch<T, C>::BestCode nearest(search, s.offsets[query]);
  const float* scores = s.scores.get();
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = blocks[i] * block_codes; k < (blocks[i] + 1) * block_codes;
         k += kLanes, scores += kLanes)
      for (uint32_t bits = not_below(load(scores), threshold); bits; bits &= bits - 1)
        if (k + __builtin_ctz(bits) < panel.codes)
          nearest.offer(k + __builtin_ctz(bits));
  search.accept(s.positions[query], nearest);
}

// The same for few dimensions and blocks with one bound. The scores are bitwise those of the first
// pass, so its largest one gives the threshold, and a query does not wait for its own scores.
template <class T, class C>
void compare_blocks(const PanelSearch<T, C>& search,
                    SearchScratch& s,
                    int query,
                    const float* z,
                    float threshold,
                    const int32_t* blocks,
                    int64_t count) {
  constexpr int kVecs = 2 * kGroup / kLanes;  // of two groups
  const CodePanel& panel = *search.panel;
  const Vec least = broadcast(threshold);
  typename PanelSearch<T, C>::BestCode nearest(search, s.offsets[query]);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < panel.block_groups; g += 2) {
      const int64_t first = (blocks[i] * panel.block_groups + g) * kGroup;
      Vec score[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        score[v] = load(panel.bias.get() + first + v * kLanes);
      for (int64_t d = 0; d < panel.dim; ++d) {
        const Vec component = broadcast(z[d * kTile]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const int64_t group = v * kLanes / kGroup, lane = v * kLanes % kGroup;
          const float* values = panel.values.get() + first * panel.dim;
          score[v] =
              fma(load(values + (group * panel.dim + d) * kGroup + lane), component, score[v]);
        }
      }
      uint32_t bits = 0;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        bits |= not_below(score[v], least) << (v * kLanes);
      for (; bits; bits &= bits - 1)
        if (first + __builtin_ctz(bits) < panel.codes)
          nearest.offer(first + __builtin_ctz(bits));
    }
  search.accept(s.positions[query], nearest);
}

// Calls f(lane, block) for the blocks that can hold the nearest code of queries first ... first +
// kLanes - 1, from the maxima [blocks, kTile] of the tile. Writes what their scores are not below,
// if the blocks have one bound.
template <class F>
void for_each_candidate(const CodePanel& panel,
                        const ErrorBounds& bounds,
                        const float* maxima,
                        int first,
                        float* thresholds,
                        const F& f) {
  maxima += first;
  const auto for_each = [&](Vec threshold, const auto& highest) {
    for (int64_t block = 0; block < panel.blocks(); ++block)
      for (uint32_t bits = not_below(highest(block), threshold); bits; bits &= bits - 1)
        f(first + __builtin_ctz(bits), block);
  };
  Vec best = broadcast(-INFINITY);
  if (!panel.uneven_blocks) {
    const auto highest = [&](int64_t block) { return load(maxima + block * kTile); };
    for (int64_t block = 0; block < panel.blocks(); ++block)
      best = max(best, highest(block));
    const Vec threshold = best - load(bounds.coarse + first);
    store(thresholds + first, threshold);
    for_each(threshold, highest);
    return;
  }
  const auto error = [&](int64_t block) {
    return bounds.coarse_error(first, panel.block_norm[block]);
  };
  for (int64_t block = 0; block < panel.blocks(); ++block)
    best = max(best, load(maxima + block * kTile) - error(block));
  for_each(best, [&](int64_t block) { return load(maxima + block * kTile) + error(block); });
}

}  // namespace

template <class T, class C>
void search_fp32(const PanelSearch<T, C>& search, int count, SearchScratch& s) {
  const int tiles = (count + kTile - 1) / kTile;
  const CodePanel& panel = *search.panel;
  const auto tile_z = [&](int t) { return s.z.get() + t * kTile * panel.dim; };
  const auto tile_maxima = [&](int t) { return s.maxima.get() + t * panel.blocks() * kTile; };
  for (int t = 0; t < tiles; ++t)
    pack_queries(search.x, s.offsets + t * kTile, std::min(kTile, count - t * kTile), panel,
                 tile_z(t));
  for_each_run(panel, panel.dim * sizeof(float), [&](int64_t block, int64_t last) {
    for (int t = 0; t < tiles; ++t)
      block_maxima_fma(panel, panel.block_groups, block, last, tile_z(t), tile_maxima(t));
  });
  for (int t = 0; t < tiles; ++t) {
    const float* z = tile_z(t);
    const ErrorBounds bounds = error_bounds(z, panel);
    int64_t candidates[kTile] = {};
    float thresholds[kTile];
    for (int first = 0; first < kTile; first += kLanes)
      for_each_candidate(
          panel, bounds, tile_maxima(t), first, thresholds, [&](int lane, int64_t block) {
            s.candidate_blocks[lane * panel.blocks() + candidates[lane]++] = int32_t(block);
          });
    for (int lane = 0; lane < std::min(kTile, count - t * kTile); ++lane) {
      const int query = t * kTile + lane;
      const int32_t* blocks = s.candidate_blocks.get() + lane * panel.blocks();
      if (bounds.has_nan[lane])
        search.accept_first(s.positions[query]);
      else if (!panel.uneven_blocks && panel.dim <= kFewDims)
        compare_blocks(search, s, query, z + lane, thresholds[lane], blocks, candidates[lane]);
      else
        score_blocks(search, s, query, z + lane, bounds, lane, blocks, candidates[lane]);
    }
  }
}

#define INSTANTIATE(T, C) template void search_fp32(const PanelSearch<T, C>&, int, SearchScratch&);
GENPERF_FOR_SEARCH_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace genperf
