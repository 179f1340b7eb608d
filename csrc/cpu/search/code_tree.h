// SPDX-License-Identifier: Apache-2.0
//
// Codes of few dimensions as a tree: 16 codes near each other are a leaf, 16 leaves a branch, and
// each has the box that its codes span. A search looks only into the boxes that are nearer to the
// query than the nearest code so far: at 16,384 codes of D 4 into 1 of 100, of D 8 into 1 of 12.
//
// Distances are those of the original components in float32, without a center or a scale. The error
// of a sum of squares, of a code as of a box, is then relative to the distance itself.
#pragma once

#include "cpu/common/positions.h"
#include "cpu/common/simd.h"

namespace genperf {

constexpr int64_t kMaxTreeDim = 8;
constexpr int kLeaf = 16;    // codes of a leaf, and boxes that are compared at a time
constexpr int kBranch = 16;  // leaves

class CodeTree {
 public:
  // Codes with NaN or infinity are left out: their distances are infinite, and the lowest index
  // wins where all are.
  template <class C>
  explicit CodeTree(const Codes<C>& codebook);

  bool empty() const { return leaves_ == 0; }
  int64_t leaves() const { return leaves_; }
  int64_t branches() const { return branches_; }

  // The nearest branch of a query, and its nearest leaf.
  struct Start {
    explicit Start(const CodeTree& tree) : branch_distances(tree.branch_groups_ * kBranch) {}

    int64_t branch, leaf;
    Buffer<float> branch_distances;  // [branches], rounded up to groups; infinite for `branch`
    alignas(64) float leaf_distances[kBranch], code_distances[kLeaf], best[kLanes];
  };

  // The leaves that a query has visited.
  struct Visits {
    explicit Visits(const CodeTree& tree) : leaves(tree.leaves_), distances(tree.leaves_ * kLeaf) {}

    int64_t count = 0;
    Buffer<int32_t> leaves;   // [count]
    Buffer<float> distances;  // [count, kLeaf], squared
  };

  // Visits the leaves that can hold the nearest code of a query, whose components are finite, in
  // two parts: the first one has no branches, so that those of several queries overlap. Returns the
  // largest squared distance that the nearest code can have: that of the nearest one found times
  // `factor` plus `offset`, which bound the error of a distance. Infinite if float32 overflows: the
  // query has then to be compared with all codes.
  void start(const float* query, Start& start) const;
  float finish(const float* query,
               const Start& start,
               float factor,
               float offset,
               Visits& visits) const;

  // The index of code i of a leaf, -1 for padding.
  int32_t code(int64_t leaf, int i) const { return codes_[leaf * kLeaf + i]; }

 private:
  template <int kDim>
  struct Walk;

  template <int kDim>
  void start_of(const float* query, Start& start) const;

  template <int kDim>
  float finish_of(const float* query,
                  const Start& start,
                  float factor,
                  float offset,
                  Visits& visits) const;

  int64_t dim_, leaves_ = 0, branches_ = 0, branch_groups_ = 0;
  Buffer<int32_t> codes_;       // [leaves, kLeaf]
  Buffer<float> values_;        // [leaves, D, kLeaf]
  Buffer<float> leaf_boxes_;    // [branches, 2, D, kBranch], lower and upper bounds
  Buffer<float> branch_boxes_;  // [branch groups, 2, D, 16]
};

}  // namespace genperf
