// SPDX-License-Identifier: Apache-2.0
//
// For each query of a chunk, the places of a panel that can hold one of its k nearest codes, with
// the maxima of the scores there.
//
// A list has a threshold: the k-th largest maximum so far, less twice the error bound of a score.
// No code below it is among the k nearest, so only maxima that reach it are added. Where places
// have bounds of their own, each comes with the least that its largest score can be, and the k-th
// largest of these takes the place of that of the maxima. A list is pruned when it is full, which
// raises the threshold; with codes in random order that happens a few times. A list that stays
// full, as among many equal codes, is given up, and stands for all places.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/common/positions.h"
#include "cpu/common/simd.h"

namespace genperf {

class CandidateLists {
 public:
  CandidateLists(int64_t queries, int64_t k, bool own_bounds)
      : k_(k),
        own_bounds_(own_bounds),
        usual_limit_(std::max<int64_t>(64, 4 * k)),
        largest_limit_(16 * usual_limit_),
        // An odd number of pairs of cache lines spreads the lists over the sets of the cache.
        stride_(largest_limit_ + 32),
        lists_(queries),
        values_(queries * stride_),
        lowest_(own_bounds ? queries * stride_ : 0),
        places_(queries * stride_) {}

  // Empties the list of a query. `margin` is twice the bound, or what the places' own bounds leave
  // out; with an infinite one, the list stands for all places.
  void start(int64_t query, float margin) {
    lists_[query] = {0, usual_limit_, margin};
    set_threshold(query, margin < INFINITY ? -INFINITY : INFINITY);
  }

  bool own_bounds() const { return own_bounds_; }
  bool has_all_places(int64_t query) const { return threshold(query) == INFINITY; }
  float threshold(int64_t query) const { return thresholds_[query]; }
  const float* thresholds(int64_t query) const { return thresholds_ + query; }
  int64_t count(int64_t query) const { return lists_[query].count; }

  // Whether pruning leaves more places than a list usually has.
  bool is_long(int64_t query) const { return count(query) > largest_limit_ / 4; }
  const int32_t* places(int64_t query) const { return places_.get() + query * stride_; }
  const float* values(int64_t query) const { return values_.get() + query * stride_; }

  // A maximum that at least k of the list reach, close to the k-th largest.
  float reached(int64_t query) {
    return reached_by(values_.get() + query * stride_, count(query), k_);
  }

  // Returns whether the list is full, and has to be pruned.
  [[nodiscard]] bool add(int64_t query, float value, int32_t place) {
    List& list = lists_[query];
    values_[query * stride_ + list.count] = value;
    places_[query * stride_ + list.count] = place;
    return ++list.count > list.limit;
  }

#if defined(__AVX512F__)
  // Adds the lanes in `bits`, which are at consecutive places from `first` on; `lowest` counts
  // where places have bounds of their own.
  [[nodiscard]] bool add(int64_t query, Vec found, Vec lowest, uint32_t bits, int32_t first) {
    List& list = lists_[query];
    const IVec place = first + lanes([](int lane) { return lane; });
    const int64_t at = query * stride_ + list.count;
    _mm512_storeu_ps(values_.get() + at, _mm512_maskz_compress_ps(bits, __m512(found)));
    if (own_bounds_)
      _mm512_storeu_ps(lowest_.get() + at, _mm512_maskz_compress_ps(bits, __m512(lowest)));
    _mm512_storeu_si512(places_.get() + at, _mm512_maskz_compress_epi32(bits, __m512i(place)));
    list.count += __builtin_popcount(bits);
    return list.count > list.limit;
  }
#endif

  // Raises the threshold to that of the entries, and drops those below it.
  void prune(int64_t query) {
    List& list = lists_[query];
    if (has_all_places(query))
      list.count = 0;
    float* const low = (own_bounds_ ? lowest_ : values_).get() + query * stride_;
    drop_below(query, reached_by(low, list.count, k_) - list.margin);
  }

  // Raises the threshold to `least`, and drops what is below it.
  void drop_below(int64_t query, float least) {
    List& list = lists_[query];
    float* const value = values_.get() + query * stride_;
    float* const low = lowest_.get() + query * stride_;
    int32_t* const place = places_.get() + query * stride_;
    if (least > threshold(query))
      set_threshold(query, least);
    const float threshold = this->threshold(query);
    int64_t kept = 0;
    for (int64_t i = 0; i < list.count; ++i) {
      const bool keep = value[i] >= threshold;
      if (own_bounds_)
        low[kept] = low[i];
      value[kept] = value[i];
      place[kept] = place[i];
      kept += keep;
    }
    list.count = kept;
    list.limit = std::max(usual_limit_, 2 * kept);
    if (list.limit > largest_limit_) {
      list.count = 0;
      list.limit = usual_limit_;
      set_threshold(query, INFINITY);
    }
  }

  // A number that at least k of the values reach, and no more than k unless they are equal;
  // -infinity if there are fewer. Up to kLanes values behind the last are overwritten. NaN does not
  // count.
  static float reached_by(float* values, int64_t count, int64_t k) {
    if (count < k)
      return -INFINITY;
    store(values + count, broadcast(-INFINITY));
    Vec highest = load(values);
    for (int64_t i = kLanes; i < count; i += kLanes)
      highest = max(highest, load(values + i));
    // Bisects integers that have the order of the floats.
    int64_t reached = ordered(-INFINITY), above = ordered(largest(highest)) + int64_t{1};
    int64_t middle = above - (int64_t{1} << 22);
    while (above - reached > 1) {
      middle = std::max(middle, reached + 1);
      const Vec limit = broadcast(from_ordered(int32_t(middle)));
      IVec numbers{};
      for (int64_t i = 0; i < count; i += kLanes)
        numbers -= load(values + i) >= limit;
      int64_t number = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        number += numbers[lane];
      if (number == k)
        return from_ordered(int32_t(middle));
      (number < k ? above : reached) = middle;
      middle = reached + (above - reached) / 2;
    }
    return from_ordered(int32_t(reached));
  }

  // The k-th largest of the values, which can be far above what reached_by() finds if few follow.
  static float kth_largest(float* values, int64_t count, int64_t k) {
    const float found = reached_by(values, count, k);
    if (found == -INFINITY)
      return found;
    Vec lowest = broadcast(INFINITY);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec value = load(values + i);
      lowest = value >= found && value < lowest ? value : lowest;
    }
    return -largest(-lowest);
  }

 private:
  static constexpr int64_t kMostQueries = 512;

  struct List {
    int64_t count, limit;
    float margin;
  };

  static int32_t ordered(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits < 0 ? bits ^ 0x7fffffff : bits;
  }

  static float from_ordered(int32_t order) {
    const int32_t bits = order < 0 ? order ^ 0x7fffffff : order;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  void set_threshold(int64_t query, float value) { thresholds_[query] = value; }

  const int64_t k_;
  const bool own_bounds_;
  const int64_t usual_limit_, largest_limit_, stride_;
  alignas(64) float thresholds_[kMostQueries];
  Buffer<List> lists_;
  Buffer<float> values_, lowest_;
  Buffer<int32_t> places_;
};

}  // namespace genperf
