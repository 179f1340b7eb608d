// SPDX-License-Identifier: Apache-2.0
//
// The k nearest among the codes that the scores of a query leave.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/search/amx_queries.h"
#include "cpu/search/candidate_lists.h"
#include "cpu/search/panel_search.h"

namespace genperf {

constexpr int64_t kRunMaxima = 8 << 10;  // of a tile of queries and a run of codes

// From this D on codes in 8 bits have bounds of their own, since the largest one leaves too many.
constexpr int64_t kOwnBoundsDim = 128;

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
    return this->panel->low_precision() && !this->cosine
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
      : z(panel.low_precision() ? 0 : chunk * panel.dim),
        packed(panel.low_precision() ? chunk * panel.query_bytes() : 0),
        maxima(kRunMaxima),
        lists(chunk, k, panel.packing == Packing::kInt8 && panel.dim >= kOwnBoundsDim) {}

  // Starts the lists of a tile of kQueries queries, of which the first `count` are there.
  template <int kQueries>
  void start(const ErrorBounds& bounds, int first, int count) {
    for (int i = 0; i < kQueries; ++i) {
      has_nan[first + i] = bounds.has_nan[i];
      coarse[first + i] = bounds.coarse[i];
      fine[first + i] = bounds.fine[i];
      lists.start(first + i, i < count && !bounds.has_nan[i] ? bounds.coarse[i] : INFINITY);
    }
  }

  int64_t offsets[kMaxQueries];
  bool has_nan[kMaxQueries];
  float coarse[kMaxQueries], fine[kMaxQueries];  // of ErrorBounds
  Buffer<float> z;                               // [tiles, D, kTile], in float32
  Buffer<char> packed;                           // tiles of 32 queries, in low precision
  Buffer<float> maxima;                          // of a tile and a run
  CandidateLists lists;
  Buffer<char> rows;           // of vectors that are not contiguous in memory
  int64_t rescored = 0;        // codes scored again in low precision
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
void choose(const TopKSearch<T, C>& search,
            TopKScratch& s,
            int64_t position,
            int query,
            float bound) {
  const int64_t count = s.codes.size();
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

}  // namespace genperf
