// SPDX-License-Identifier: Apache-2.0
//
// The search of the k nearest codes has the passes of search.cpp.
//
// 1. Scores of all codes go through the lists of candidate_lists.h as they come: in low precision
//    the maxima of two codes or of one; in float32 those of groups of 16, or every score, where the
//    comparisons take less time than step 2.
// 2. The codes of listed blocks are scored again in float32. A score that is below the k-th largest
//    by more than the error bound of that arithmetic is dropped.
// 3. If the remaining scores do not prove their order, or if distances are wanted, float64 on the
//    original inputs decides.
#include "cpu/search/top_k.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cpu/search/amx_queries.h"
#include "cpu/search/block_maxima.h"
#include "cpu/search/fp32_queries.h"
#include "cpu/search/group_scores.h"
#include "cpu/search/int8_queries.h"
#include "cpu/search/rescore.h"
#include "cpu/search/top_k_choice.h"

namespace genperf {
namespace {

constexpr int64_t kPair = 2;  // groups of a block
constexpr int64_t kRunBytes = 192 << 10;

// From this D on a maximum in 8 bits is that of one code, since scoring another one costs more than
// the comparison of twice as many maxima.
constexpr int64_t kSingleCodeDim = 256;

// Components of candidates, for each of the k, from which on it pays to wait for the scores of the
// best ones.
constexpr int64_t kMinBestFirst = 4000;

// Calls f(first, last) for runs of blocks that stay in L2 while all tiles of queries pass over
// them, and whose maxima fit their buffer. Their number is even, as that of all groups is.
template <class F>
void for_each_run(int64_t blocks, int64_t block_bytes, int64_t maxima_per_block, const F& f) {
  const int64_t step =
      std::clamp<int64_t>(kRunBytes / block_bytes / 2 * 2, 2, kRunMaxima / maxima_per_block);
  for (int64_t block = 0; block < blocks; block += step)
    f(block, std::min(block + step, blocks));
}

template <class T, class C>
void top_k_fp32(const TopKSearch<T, C>& search, int64_t position, int count, TopKScratch& s) {
  const CodePanel& panel = *search.panel;
  const auto tile_z = [&](int first) { return s.z.get() + first * panel.dim; };
  for (int first = 0; first < count; first += kTile) {
    const int size = std::min(kTile, count - first);
    pack_queries(search.x, s.offsets + first, size, panel, tile_z(first));
    s.start<kTile>(error_bounds(tile_z(first), panel), first, size);
  }
  // A place of the lists is a code, if comparing every score takes less time than scoring the codes
  // of the listed groups again, or a group.
  const bool each = panel.codes < 12 * search.k * panel.dim;
  const int places = each ? kGroup : 1;  // of a group
  float* const values = s.maxima.get();
  const auto add = [&](int first, int64_t begin, int64_t end) {
    for (int lane = 0; lane < kTile; lane += kLanes)
      for (int64_t place = begin; place < end; ++place) {
        const float* const found = values + (place - begin) * kTile + lane;
        uint32_t bits = not_below(load(found), load(s.lists.thresholds(first + lane)));
        for (; bits; bits &= bits - 1) {
          const int i = __builtin_ctz(bits);
          if (s.lists.add(first + lane + i, found[i], int32_t(place)))
            s.lists.prune(first + lane + i);
        }
      }
  };
  const int64_t group_bytes = kGroup * panel.dim * sizeof(float);
  for_each_run(panel.groups, group_bytes, places * kTile, [&](int64_t begin, int64_t end) {
    // The kernels write what belongs to a group at its place in the whole panel.
    float* const whole = values - begin * places * kTile;
    for (int first = 0; first < count; first += kTile) {
      if (each)
        scores_fma(panel, begin, end, tile_z(first), whole);
      else
        block_maxima_fma(panel, 1, begin, end, tile_z(first), whole);
      add(first, begin * places, end * places);
    }
  });
  for (int query = 0; query < count; ++query) {
    if (s.has_nan[query]) {
      choose_first(search, s, position + query, query);
      continue;
    }
    s.lists.prune(query);
    s.codes.clear();
    const bool all = s.lists.has_all_places(query);
    const int64_t listed = all ? panel.groups : s.lists.count(query);
    if (each && !all) {
      s.scores.resize(listed + kLanes);
      for (int64_t i = 0; i < listed; ++i)
        if (const int32_t k = s.lists.places(query)[i]; k < panel.codes) {
          s.scores[s.codes.size()] = s.lists.values(query)[i];
          s.codes.push_back(k);
        }
      choose(search, s, position + query, query, s.coarse[query]);
      continue;
    }
    const float* const z = tile_z(query / kTile * kTile) + query % kTile;
    s.scores.resize((listed + 1) * kGroup);
    for (int64_t i = 0; i < listed; ++i) {
      const int64_t group = all ? i : s.lists.places(query)[i];
      score_group(panel, group, z, s.scores.data() + s.codes.size());
      // What follows the last code is overwritten.
      for (int64_t k = group * kGroup; k < std::min((group + 1) * kGroup, panel.codes); ++k)
        s.codes.push_back(int32_t(k));
    }
    choose(search, s, position + query, query, s.fine[query]);
  }
}

#if defined(GENPERF_HAS_AMX)

// Scores the codes of s.codes again, from `scored` on.
template <class T, class C>
void score_codes(const TopKSearch<T, C>& search,
                 TopKScratch& s,
                 const OpMath<T>* row,
                 int64_t scored = 0) {
  const int64_t codes = s.codes.size();
  s.rescored += codes - scored;
  s.scores.resize(codes + kLanes);
  for (; scored < codes; scored += 4) {
    const C *four[4], *next[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = search.code(s.codes[std::min(scored + i, codes - 1)]);
      next[i] = search.code(s.codes[std::min(scored + 4 + i, codes - 1)]);
    }
    const Vec4 found = rescore(row, four, next, search.x.dim, search.cosine);
    std::memcpy(s.scores.data() + scored, &found, sizeof(found));
  }
}

template <class Queries, class T, class C>
void top_k_columns(const TopKSearch<T, C>& search, int64_t position, int count, TopKScratch& s) {
  using W = OpMath<T>;
  constexpr int kScores = kRows * kGroup;
  const Positions<T>& x = search.x;
  const CodePanel& panel = *search.panel;
  const int64_t groups = Queries::kWideBounds && x.dim >= kSingleCodeDim ? 1 : kPair;  // of a block
  const bool own_bounds = s.lists.own_bounds();
  Queries queries[kMaxQueries / kRows];
  const W* rows[kMaxQueries];
  W* const copies = reinterpret_cast<W*>(s.rows.get());
  for (int first = 0; first < count; first += kRows) {
    const int size = std::min(kRows, count - first);
    Tile<T>(x, s.offsets + first, size).read(copies + first * x.dim, rows + first);
    Queries& tile = queries[first / kRows];
    tile.pack(rows + first, size, panel, s.packed.get() + first * panel.query_bytes());
    s.start<kRows>(tile.bounds, first, size);
    if constexpr (Queries::kWideBounds)
      for (int i = 0; own_bounds && i < size; ++i)
        if (!tile.bounds.has_nan[i])
          s.lists.start(first + i, tile.margin(i));
  }
  // Lists the codes of those places of a query whose maxima are wanted.
  const auto list_codes = [&](int query, const auto& wanted) {
    const int32_t* const places = s.lists.places(query);
    const float* const values = s.lists.values(query);
    for (int64_t i = 0; i < s.lists.count(query); ++i) {
      if (!wanted(values[i]))
        continue;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k = (places[i] / kGroup * groups + g) * kGroup + places[i] % kGroup;
        if (k < panel.codes)
          s.codes.push_back(int32_t(k));
      }
    }
  };
  // Lists and scores the codes of the k largest maxima, and returns what the maxima of others that
  // are as near are at least, and the least of these.
  const auto score_best = [&](int query) {
    const float best = s.lists.reached(query);
    s.codes.clear();
    list_codes(query, [=](float maximum) { return maximum >= best; });
    score_codes(search, s, rows[query]);
    const int64_t codes = s.codes.size();
    const float top = CandidateLists::kth_largest(s.scores.data(), codes, search.k);
    float least = -INFINITY;
    if constexpr (Queries::kWideBounds)
      least = queries[query / kRows].least_maximum(
          query % kRows, search.cosine ? top : top - search.distance_offset, panel);
    return std::pair(least, best);
  };
  const auto prune = [&](int query) {
    s.lists.prune(query);
    if (Queries::kWideBounds && s.lists.is_long(query))
      s.lists.drop_below(query, score_best(query).first);
  };
  float* const maxima = s.maxima.get();
  const auto add = [&](int first, int64_t begin, int64_t end) {
    const float* values = maxima;
    for (int64_t block = begin; block < end; ++block)
      for (int i = 0; i < kRows; ++i, values += kGroup) {
        const Vec found = load(values);
        const uint32_t bits = not_below(found, broadcast(s.lists.threshold(first + i)));
        if (!bits)
          continue;
        Vec lowest = found;
        if constexpr (Queries::kWideBounds)
          if (own_bounds)
            lowest = queries[first / kRows].lowest_of(panel, groups, block, i, found);
        if (s.lists.add(first + i, found, lowest, bits, int32_t(block * kGroup)))
          prune(first + i);
      }
  };
  const int64_t block_bytes = groups * kGroup * panel.query_bytes();
  for_each_run(panel.groups / groups, block_bytes, kScores, [&](int64_t begin, int64_t end) {
    for (int first = 0; first < count; first += kRows) {
      // A block has its place among those of the whole panel.
      queries[first / kRows].block_maxima(panel, groups, begin, end, maxima - begin * kScores);
      add(first, begin, end);
    }
  });
  for (int query = 0; query < count; ++query) {
    if (s.has_nan[query]) {
      choose_first(search, s, position + query, query);
      continue;
    }
    s.lists.prune(query);
    s.codes.clear();
    int64_t scored = 0;
    if (s.lists.has_all_places(query)) {
      s.codes.resize(panel.codes);
      std::iota(s.codes.begin(), s.codes.end(), 0);
    } else if (Queries::kWideBounds &&
               s.lists.count(query) * groups * x.dim >= kMinBestFirst * search.k) {
      const auto [least, best] = score_best(query);
      scored = s.codes.size();
      list_codes(query, [least = least, best = best](float maximum) {
        return !(maximum >= best) && !(maximum < least);
      });
    } else {
      list_codes(query, [](float) { return true; });
    }
    score_codes(search, s, rows[query], scored);
    choose(search, s, position + query, query, s.fine[query]);
  }
}

#endif

template <class T, class C>
void search_panel(TopKSearch<T, C>& search, const CodePanel& panel, int64_t chunk, Chunks& chunks) {
  search.panel = &panel;
  const auto make = [&] {
    TopKScratch scratch(panel, chunk, search.k);
    if (panel.low_precision())
      scratch.rows = Buffer<char>(chunk * search.x.dim * sizeof(OpMath<T>));
    return scratch;
  };
  chunks.search(panel, make, [&](TopKScratch& scratch, int64_t c) {
    const int64_t first = c * chunk;
    const int count = int(std::min(chunk, search.x.count() - first));
    for (int i = 0; i < count; ++i)
      scratch.offsets[i] = search.x.offset(first + i);
    scratch.rescored = 0;
#if defined(GENPERF_HAS_AMX)
    if (panel.packing == Packing::kInt8)
      top_k_columns<Int8Queries>(search, first, count, scratch);
    else if (panel.packing == Packing::kBFloat16)
      top_k_columns<AmxQueries>(search, first, count, scratch);
#endif
    if (!panel.low_precision())
      top_k_fp32(search, first, count, scratch);
    return float(scratch.rescored) / float(count);
  });
}

}  // namespace

template <class T, class C>
void search_top_k(const Positions<T>& x,
                  const Codes<C>& codebook,
                  int64_t k,
                  bool cosine,
                  int64_t* indices,
                  OpMath<T>* distances) {
  TopKSearch<T, C> search(x, codebook, k, cosine, indices, distances);
  const Packing packing = packing_for(x.dim, codebook.count, x.count());
  const int64_t share = x.count() / (4 * torch::stable::get_num_threads());
  const int64_t chunk = std::clamp<int64_t>(share / kRows * kRows, kRows, kMaxQueries);
  for_each_panel(codebook, cosine, packing, [&](const CodePanel& panel, int64_t first_code) {
    if (panel.codes < codebook.count && first_code == 0)
      search.found = Buffer<Found>(x.count() * k);
    search.first_code = first_code;
    search_chunks(
        codebook, panel, (x.count() + chunk - 1) / chunk,
        [&](const CodePanel& p, Chunks& chunks) { search_panel(search, p, chunk, chunks); });
  });
}

#define INSTANTIATE(T, C)                                                                   \
  template void search_top_k(const Positions<T>&, const Codes<C>&, int64_t, bool, int64_t*, \
                             OpMath<T>*);
GENPERF_FOR_SEARCH_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace genperf
