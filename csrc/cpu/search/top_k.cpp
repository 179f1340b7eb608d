// SPDX-License-Identifier: Apache-2.0
//
// The search of the k nearest codes has the passes of search.cpp.
//
// 1. Scores of all codes, in bfloat16 with AMX or in float32, of which the maxima of small blocks
// go
//    through the lists of candidate_lists.h: with AMX of two codes, in float32 of 16. They are
//    taken as they come, so that none is stored.
// 2. The codes at the listed places are scored again in float32. A score that is below the k-th
//    largest by more than the error bound of that arithmetic is dropped.
// 3. If the remaining scores do not prove their order, or if distances are wanted, float64 on the
//    original inputs decides.
#include "cpu/search/top_k.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/search/amx_queries.h"
#include "cpu/search/block_maxima.h"
#include "cpu/search/candidate_lists.h"
#include "cpu/search/fp32_queries.h"
#include "cpu/search/group_scores.h"
#include "cpu/search/panel_search.h"
#include "cpu/search/rescore.h"

namespace genperf {
namespace {

constexpr int64_t kPair = 2;  // groups of a block, the fewest that the kernel of AMX takes
constexpr int64_t kRunBytes = 192 << 10;
constexpr int64_t kRunMaxima = 8 << 10;

struct Found {
  double distance;
  int64_t index;

  bool operator<(const Found& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

struct Scored {
  float score;
  int32_t code;
};

template <class T, class C>
struct TopKSearch : PanelSearch<T, C> {
  TopKSearch(const Positions<T>& x,
             const Codes<C>& codebook,
             int64_t k,
             bool cosine,
             int64_t* indices,
             OpMath<T>* distances)
      : PanelSearch<T, C>(x, codebook, nullptr, cosine, indices), k(k), wanted(distances) {}

  // Codes whose float32 score is below this are farther than one with the given score.
  float lowered(float score, float bound) const {
    return this->panel->bf16 && !this->cosine
               ? score * this->distance_factor - this->distance_offset
               : score - bound;
  }

  // The distances of codes of the panel.
  void exact(int64_t offset, const std::vector<int32_t>& codes, std::vector<Found>& found) const {
    const int64_t count = codes.size();
    found.resize(count);
    for (int64_t i = 0; i < count; i += kCodes) {
      const C* rows[kCodes];
      for (int j = 0; j < kCodes; ++j)
        rows[j] = this->code(codes[std::min(i + j, count - 1)]);
      double distances[kCodes];
      exact_distances(this->x.data + offset, this->x.stride, rows, this->codebook.stride,
                      this->x.dim, this->cosine, distances);
      for (int j = 0; j < kCodes && i + j < count; ++j)
        found[i + j] = {distances[j], this->first_code + codes[i + j]};
    }
  }

  // Takes the nearest of these codes and of those of earlier panels.
  void accept(int64_t position, int64_t offset, std::vector<Found>& given) const {
    Found* const kept = found.get() + position * k;
    if (found.get())
      given.insert(given.end(), kept, kept + std::min(k, this->first_code));
    const int64_t count = std::min<int64_t>(k, given.size());
    std::partial_sort(given.begin(), given.begin() + count, given.end());
    if (this->first_code + this->panel->codes < this->codebook.count) {
      std::copy_n(given.begin(), count, kept);
      return;
    }
    double square = 0;
    if (wanted && this->cosine)
      for (int64_t d = 0; d < this->x.dim; ++d) {
        const double value = double(this->x.data[offset + d * this->x.stride]);
        square += value * value;
      }
    for (int64_t i = 0; i < k; ++i) {
      const double distance = given[i].distance;
      this->indices[position * k + i] = given[i].index;
      if (wanted)
        wanted[position * k + i] =
            OpMath<T>(this->cosine ? cosine_distance(distance, square) : distance);
    }
  }

  // From minus the signed square of the similarity times the squared length of x.
  static double cosine_distance(double order, double square) {
    const double similarity = square > 0 ? std::sqrt(std::abs(order) / square) : 0.0;
    const double distance = order < 0 ? 1 - similarity : 1 + similarity;
    return order == INFINITY || std::isnan(distance) ? INFINITY : distance;
  }

  static constexpr int kCodes = 4;  // whose sums are in flight together

  const int64_t k;
  OpMath<T>* const wanted;
  Buffer<Found> found;  // [positions, k], the nearest so far, if there are several panels
};

// Buffers of one thread.
struct TopKScratch {
  TopKScratch(const CodePanel& panel, int64_t chunk, int64_t k)
      : z(panel.bf16 ? 0 : chunk * panel.dim),
        z_bf16(panel.bf16 ? chunk * panel.depth * kDepth : 0),
        maxima(kRunMaxima),
        lists(chunk, k) {}

  void start(const ErrorBounds& bounds, int first, int count) {
    for (int i = 0; i < kRows; ++i) {
      has_nan[first + i] = bounds.has_nan[i];
      fine[first + i] = bounds.fine[i];
      lists.start(first + i, i < count && !bounds.has_nan[i] ? bounds.coarse[i] : INFINITY);
    }
  }

  int64_t offsets[kMaxQueries];
  bool has_nan[kMaxQueries];
  float fine[kMaxQueries];  // twice the error bound of float32
  Buffer<float> z;          // [tiles, D, kTile], for float32
  Buffer<uint16_t> z_bf16;  // [tiles, 32, depth, 32], for AMX
  Buffer<float> maxima;     // of a tile and a run
  CandidateLists lists;
  Buffer<char> rows;           // of vectors that are not contiguous in memory
  std::vector<int32_t> codes;  // of one query, all that are left
  std::vector<float> scores;
  std::vector<Scored> left;
  std::vector<Found> found;
};

// Whether the first k of the scores, in descending order, are proven to be in the order of the
// distances, and nearer than the rest.
template <class T, class C>
bool proven(const TopKSearch<T, C>& search, const std::vector<Scored>& scored, float bound) {
  const int64_t last = std::min<int64_t>(search.k, int64_t(scored.size()) - 1);
  for (int64_t i = 0; i < last; ++i)
    if (!(scored[i + 1].score < search.lowered(scored[i].score, bound)))
      return false;
  return true;
}

// Chooses among the codes that have been scored in float32.
template <class T, class C>
void choose(const TopKSearch<T, C>& search, TopKScratch& s, int64_t position, int query) {
  const int64_t count = s.codes.size();
  const float bound = s.fine[query];
  const float reached = CandidateLists::reached_by(s.scores.data(), count, search.k);
  const float threshold = search.lowered(reached, bound);
  s.left.clear();
  bool comparable = true;
  for (int64_t i = 0; i < count; ++i)
    if (!(s.scores[i] < threshold)) {
      s.left.push_back({s.scores[i], s.codes[i]});
      comparable &= s.scores[i] > -INFINITY;
    }
  if (comparable && !search.wanted && !search.found.get()) {
    std::sort(s.left.begin(), s.left.end(),
              [](const Scored& a, const Scored& b) { return a.score > b.score; });
    if (proven(search, s.left, bound)) {
      for (int64_t i = 0; i < search.k; ++i)
        search.indices[position * search.k + i] = s.left[i].code;
      return;
    }
  }
  s.codes.clear();
  for (const Scored& each : s.left)
    s.codes.push_back(each.code);
  search.exact(s.offsets[query], s.codes, s.found);
  search.accept(position, s.offsets[query], s.found);
}

// All distances of a query with a NaN are infinite, so the first codes are the nearest.
template <class T, class C>
void choose_first(const TopKSearch<T, C>& search, TopKScratch& s, int64_t position, int query) {
  s.found.clear();
  for (int64_t i = 0; i < std::min(search.k, search.panel->codes); ++i)
    s.found.push_back({INFINITY, search.first_code + i});
  search.accept(position, s.offsets[query], s.found);
}

// Calls f(first, last) for runs of blocks that stay in L2 while all tiles of queries pass over
// them, and whose maxima fit their buffer.
template <class F>
void for_each_run(int64_t blocks, int64_t block_bytes, int64_t maxima_per_block, const F& f) {
  const int64_t step =
      std::clamp<int64_t>(kRunBytes / block_bytes, 1, kRunMaxima / maxima_per_block);
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
    s.start(error_bounds(tile_z(first), panel), first, size);
  }
  float* const maxima = s.maxima.get();
  const auto add = [&](int first, int64_t begin, int64_t end) {
    for (int lane = 0; lane < kTile; lane += kLanes)
      for (int64_t block = begin; block < end; ++block) {
        const float* const found = maxima + (block - begin) * kTile + lane;
        uint32_t bits = not_below(load(found), load(s.lists.thresholds(first + lane)));
        for (; bits; bits &= bits - 1) {
          const int i = __builtin_ctz(bits);
          s.lists.add(first + lane + i, found[i], int32_t(block));
        }
      }
  };
  const int64_t block_bytes = kGroup * panel.dim * sizeof(float);
  for_each_run(panel.groups, block_bytes, kTile, [&](int64_t begin, int64_t end) {
    for (int first = 0; first < count; first += kTile) {
      // A block has its place among those of the whole panel.
      block_maxima_fma(panel, 1, begin, end, tile_z(first), maxima - begin * kTile);
      add(first, begin, end);
    }
  });
  for (int query = 0; query < count; ++query) {
    if (s.has_nan[query]) {
      choose_first(search, s, position + query, query);
      continue;
    }
    s.lists.prune(query);
    const bool all = s.lists.has_all_places(query);
    const int64_t groups = all ? panel.groups : s.lists.count(query);
    const float* const z = tile_z(query / kTile * kTile) + query % kTile;
    s.scores.resize((groups + 1) * kGroup);
    s.codes.clear();
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t group = all ? i : s.lists.places(query)[i];
      score_group(panel, group, z, s.scores.data() + s.codes.size());
      // What follows the last code is overwritten.
      for (int64_t k = group * kGroup; k < std::min((group + 1) * kGroup, panel.codes); ++k)
        s.codes.push_back(int32_t(k));
    }
    choose(search, s, position + query, query);
  }
}

#if defined(GENPERF_HAS_AMX)

template <class T, class C>
void top_k_amx(const TopKSearch<T, C>& search, int64_t position, int count, TopKScratch& s) {
  using W = OpMath<T>;
  constexpr int kScores = kRows * kGroup;
  const Positions<T>& x = search.x;
  const CodePanel& panel = *search.panel;
  const int64_t z_length = panel.depth * kDepth;
  const auto tile_z = [&](int first) { return s.z_bf16.get() + first * z_length; };
  const W* rows[kMaxQueries];
  W* const copies = reinterpret_cast<W*>(s.rows.get());
  for (int first = 0; first < count; first += kRows) {
    const int size = std::min(kRows, count - first);
    Tile<T>(x, s.offsets + first, size).read(copies + first * x.dim, rows + first);
    s.start(pack_rows(rows + first, size, panel, tile_z(first)), first, size);
  }
  float* const maxima = s.maxima.get();
  const auto add = [&](int first, int64_t begin, int64_t end) {
    const float* values = maxima;
    for (int64_t block = begin; block < end; ++block)
      for (int i = 0; i < kRows; ++i, values += kGroup) {
        const Vec found = load(values);
        if (const uint32_t bits = not_below(found, broadcast(s.lists.threshold(first + i))))
          s.lists.add(first + i, found, bits, int32_t(block * kGroup));
      }
  };
  const int64_t block_bytes = kPair * kGroup * z_length * sizeof(uint16_t);
  for_each_run(panel.groups / kPair, block_bytes, kScores, [&](int64_t begin, int64_t end) {
    for (int first = 0; first < count; first += kRows) {
      // A block has its place among those of the whole panel.
      block_maxima_amx(panel, kPair, begin, end, tile_z(first), maxima - begin * kScores);
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
    if (s.lists.has_all_places(query)) {
      for (int64_t k = 0; k < panel.codes; ++k)
        s.codes.push_back(int32_t(k));
    } else {
      const int32_t* const places = s.lists.places(query);
      for (int64_t i = 0; i < s.lists.count(query); ++i)
        for (int64_t g = 0; g < kPair; ++g) {
          const int64_t k = (places[i] / kGroup * kPair + g) * kGroup + places[i] % kGroup;
          if (k < panel.codes)
            s.codes.push_back(int32_t(k));
        }
    }
    const int64_t codes = s.codes.size();
    s.scores.resize(codes + kLanes);
    for (int64_t i = 0; i < codes; i += 4) {
      const C* four[4];
      for (int j = 0; j < 4; ++j)
        four[j] = search.code(s.codes[std::min(i + j, codes - 1)]);
      const Vec4 found = rescore(rows[query], four, x.dim, search.cosine);
      std::memcpy(s.scores.data() + i, &found, sizeof(found));
    }
    choose(search, s, position + query, query);
  }
}

#endif

template <class T, class C>
void search_panel(TopKSearch<T, C>& search, const CodePanel& panel, int64_t first_code) {
  search.panel = &panel;
  search.first_code = first_code;
  const int64_t positions = search.x.count();
  const int64_t share = positions / (4 * torch::stable::get_num_threads());
  const int64_t chunk = std::clamp<int64_t>(share / kRows * kRows, kRows, kMaxQueries);
  const int64_t chunks = (positions + chunk - 1) / chunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    TopKScratch scratch(panel, chunk, search.k);
    if (panel.bf16)
      scratch.rows = Buffer<char>(chunk * search.x.dim * sizeof(OpMath<T>));
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * chunk;
      const int count = int(std::min(chunk, positions - first));
      for (int i = 0; i < count; ++i)
        scratch.offsets[i] = search.x.offset(first + i);
#if defined(GENPERF_HAS_AMX)
      if (panel.bf16) {
        top_k_amx(search, first, count, scratch);
        continue;
      }
#endif
      top_k_fp32(search, first, count, scratch);
    }
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
  for_each_panel(codebook, cosine, [&](const CodePanel& panel, int64_t first_code) {
    if (panel.codes < codebook.count && first_code == 0)
      search.found = Buffer<Found>(x.count() * k);
    search_panel(search, panel, first_code);
  });
}

#define INSTANTIATE(T, C)                                                                   \
  template void search_top_k(const Positions<T>&, const Codes<C>&, int64_t, bool, int64_t*, \
                             OpMath<T>*);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, BFloat16)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, Half)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace genperf
