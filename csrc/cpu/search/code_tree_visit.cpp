// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/search/code_tree.h"

namespace genperf {
namespace {

constexpr int kVecs = kLeaf / kLanes;

// Of numbers.
inline Vec min(Vec a, Vec b) {
#if defined(__aarch64__)
  return Vec(vminnmq_f32(float32x4_t(a), float32x4_t(b)));
#else
  return a < b ? a : b;
#endif
}

// The smallest lane, in all lanes.
template <int kStep = kLanes / 2>
inline Vec smallest(Vec v) {
  v = min(v, __builtin_shuffle(v, lanes([](int lane) { return lane ^ kStep; })));
  if constexpr (kStep > 1)
    return smallest<kStep / 2>(v);
  return v;
}

// Squared distances of a query, each component of which is in all lanes, to kLanes boxes.
template <int kDim>
inline Vec box_distances(const float* boxes, const Vec (&query)[kDim]) {
  Vec sums[2] = {};
#pragma GCC unroll 8
  for (int d = 0; d < kDim; ++d) {
    const Vec lower = load(boxes + d * kLeaf), upper = load(boxes + (kDim + d) * kLeaf);
    const Vec difference = query[d] - min(max(query[d], lower), upper);
    sums[d % 2] = fma(difference, difference, sums[d % 2]);
  }
  return sums[0] + sums[1];
}

// Bit i is set where value i of 16 is not above the limit.
inline uint32_t within(const float* values, Vec limit) {
  uint32_t bits = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v)
    bits |= not_below(limit, load(values + v * kLanes)) << (v * kLanes);
  return bits;
}

}  // namespace

template <int kDim>
struct CodeTree::Walk {
  Walk(const CodeTree& tree, const float* query) : tree(tree) {
#pragma GCC unroll 8
    for (int d = 0; d < kDim; ++d)
      z[d] = broadcast(query[d]);
  }

  Vec leaf_distances(int64_t branch, float* distances) const {
    return distances_to(tree.leaf_boxes_.get() + branch * 2 * kDim * kBranch, distances);
  }

  Vec distances_to(const float* boxes, float* distances) const {
    Vec nearest = broadcast(INFINITY);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec found = box_distances(boxes + v * kLanes, z);
      store(distances + v * kLanes, found);
      nearest = min(nearest, found);
    }
    return nearest;
  }

  // Writes the distances to the codes of a leaf, and returns the smallest of each lane and `best`.
  Vec code_distances(int64_t leaf, float* distances, Vec best) const {
    const float* values = tree.values_.get() + leaf * kDim * kLeaf;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec sums[2] = {};
#pragma GCC unroll 8
      for (int d = 0; d < kDim; ++d) {
        const Vec difference = z[d] - load(values + d * kLeaf + v * kLanes);
        sums[d % 2] = fma(difference, difference, sums[d % 2]);
      }
      const Vec found = sums[0] + sums[1];
      store(distances + v * kLanes, found);
      best = min(best, found);
    }
    return best;
  }

  const CodeTree& tree;
  Vec z[kDim];
};

template <int kDim>
void CodeTree::start_of(const float* query, Start& start) const {
  const Walk<kDim> walk(*this, query);
  float* const distances = start.branch_distances.get();
  Vec nearest = broadcast(INFINITY);
  IVec group_of{};
  for (int64_t group = 0; group < branch_groups_; ++group) {
    const Vec found = walk.distances_to(branch_boxes_.get() + group * 2 * kDim * kBranch,
                                        distances + group * kBranch);
    group_of = found < nearest ? IVec{} + int32_t(group) : group_of;
    nearest = min(nearest, found);
  }
  const uint32_t lowest = not_below(smallest(nearest), nearest);
  const int64_t group = group_of[__builtin_ctz(lowest)];
  start.branch =
      group * kBranch + __builtin_ctz(within(distances + group * kBranch, smallest(nearest)));
  distances[start.branch] = INFINITY;
  const Vec least = smallest(walk.leaf_distances(start.branch, start.leaf_distances));
  start.leaf = start.branch * kBranch + __builtin_ctz(within(start.leaf_distances, least));
  store(start.best, walk.code_distances(start.leaf, start.code_distances, broadcast(INFINITY)));
}

template <int kDim>
float CodeTree::finish_of(const float* query,
                          const Start& start,
                          float factor,
                          float offset,
                          Visits& visits) const {
  const Walk<kDim> walk(*this, query);
  float* const code_distances = visits.distances.get();
  int32_t* const leaves = visits.leaves.get();
  std::memcpy(code_distances, start.code_distances, sizeof(start.code_distances));
  leaves[0] = int32_t(start.leaf);
  int64_t count = 1;
  Vec best = load(start.best);
  const auto visit = [&](int64_t branch, uint32_t bits) {
    for (; bits; bits &= bits - 1) {
      const int64_t leaf = branch * kBranch + __builtin_ctz(bits);
      best = walk.code_distances(leaf, code_distances + count * kLeaf, best);
      leaves[count++] = int32_t(leaf);
    }
  };
  const auto limit_of = [&] { return fma(smallest(best), broadcast(factor), broadcast(offset)); };
  Vec limit = limit_of();
  visits.count = count;
  if (!(limit[0] < INFINITY))
    return INFINITY;
  visit(start.branch, within(start.leaf_distances, limit) & ~(1u << start.leaf % kBranch));
  limit = limit_of();
  Vec next = limit;  // found while the branch before is visited
  for (int64_t group = 0; group < branch_groups_; ++group)
    for (uint32_t bits = within(start.branch_distances.get() + group * kBranch, limit); bits;
         bits &= bits - 1) {
      const int64_t branch = group * kBranch + __builtin_ctz(bits);
      alignas(64) float distances[kBranch];
      walk.leaf_distances(branch, distances);
      visit(branch, within(distances, limit));
      limit = next;
      next = limit_of();
    }
  visits.count = count;
  return limit_of()[0];
}

void CodeTree::start(const float* query, Start& start) const {
  using F = void (CodeTree::*)(const float*, Start&) const;
  static constexpr F of[] = {&CodeTree::start_of<1>, &CodeTree::start_of<2>, &CodeTree::start_of<3>,
                             &CodeTree::start_of<4>, &CodeTree::start_of<5>, &CodeTree::start_of<6>,
                             &CodeTree::start_of<7>, &CodeTree::start_of<8>};
  (this->*of[dim_ - 1])(query, start);
}

float CodeTree::finish(const float* query,
                       const Start& start,
                       float factor,
                       float offset,
                       Visits& visits) const {
  using F = float (CodeTree::*)(const float*, const Start&, float, float, Visits&) const;
  static constexpr F of[] = {&CodeTree::finish_of<1>, &CodeTree::finish_of<2>,
                             &CodeTree::finish_of<3>, &CodeTree::finish_of<4>,
                             &CodeTree::finish_of<5>, &CodeTree::finish_of<6>,
                             &CodeTree::finish_of<7>, &CodeTree::finish_of<8>};
  return (this->*of[dim_ - 1])(query, start, factor, offset, visits);
}

}  // namespace genperf
