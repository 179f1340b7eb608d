// SPDX-License-Identifier: Apache-2.0
//
// The search in a tree of codes. A distance in float32 tells which codes can be the nearest, and
// float64 decides where several can.
#pragma once

#include <vector>

#include "cpu/search/code_tree.h"
#include "cpu/search/panel_search.h"

namespace genperf {

constexpr int64_t kTreeChunk = 256;   // positions
constexpr float kMostVisited = 0.1f;  // of the leaves, above which a search of all codes is faster

// Buffers of one thread for a search in a tree.
struct TreeScratch {
  explicit TreeScratch(const CodeTree& tree) : visits(tree) {
    for (int i = 0; i < kQueries; ++i)
      starts.emplace_back(tree);
  }

  static constexpr int kQueries = 8;
  float queries[kQueries][kMaxTreeDim];
  int64_t positions[kQueries], offsets[kQueries];
  int count = 0;
  std::vector<CodeTree::Start> starts;
  CodeTree::Visits visits;
};

// Searches the queries of the scratch, and returns how many leaves they visited.
template <class T, class C>
int64_t search_queries(const PanelSearch<T, C>& search, const CodeTree& tree, TreeScratch& s) {
  const CodeTree::Visits& visits = s.visits;
  int64_t visited = 0;
  for (int i = 0; i < s.count; ++i)
    tree.start(s.queries[i], s.starts[i]);
  for (int i = 0; i < s.count; ++i) {
    const float limit = tree.finish(s.queries[i], s.starts[i], search.distance_factor,
                                    search.distance_offset, s.visits);
    typename PanelSearch<T, C>::BestCode nearest(search, s.offsets[i]);
    if (limit < INFINITY) {
      const Vec most = broadcast(limit);
      for (int64_t j = 0; j < visits.count; ++j)
        for (int lane = 0; lane < kLeaf; lane += kLanes)
          for (uint32_t bits = not_below(most, load(&visits.distances[j * kLeaf + lane])); bits;
               bits &= bits - 1)
            nearest.offer(tree.code(visits.leaves[j], lane + __builtin_ctz(bits)));
      visited += visits.count;
    } else {
      for (int64_t k = 0; k < search.codebook.count; ++k)
        nearest.offer(k);
      visited += tree.leaves();
    }
    search.accept(s.positions[i], nearest);
  }
  s.count = 0;
  return visited;
}

// Searches the chunks, of kTreeChunk positions each.
template <class T, class C>
void search_tree(const PanelSearch<T, C>& search, const CodeTree& tree, Chunks& chunks) {
  const Positions<T>& x = search.x;
  chunks.search(
      kMostVisited * float(tree.leaves()), [&] { return TreeScratch(tree); },
      [&](TreeScratch& s, int64_t chunk) {
        const int64_t first = chunk * kTreeChunk, last = std::min(x.count(), first + kTreeChunk);
        int64_t visited = 0, outer = first / x.inner, inner = first % x.inner;
        for (int64_t position = first; position < last; ++position, ++inner) {
          if (inner == x.inner) {
            inner = 0;
            ++outer;
          }
          if (search.mask && !search.mask[position]) {
            search.indices[position] = -1;
            continue;
          }
          const int64_t offset = outer * x.outer_stride + inner * x.inner_stride;
          float* const query = s.queries[s.count];
          float zero = 0;
          for (int64_t d = 0; d < x.dim; ++d) {
            query[d] = float(x.data[offset + d * x.stride]);
            zero += query[d] * 0;
          }
          // All distances of a query with NaN or infinity are infinite, so the first code wins.
          if (tree.empty() || zero != 0) {
            search.accept_first(position);
            continue;
          }
          s.positions[s.count] = position;
          s.offsets[s.count++] = offset;
          if (s.count == TreeScratch::kQueries)
            visited += search_queries(search, tree, s);
        }
        visited += search_queries(search, tree, s);
        return float(visited) / float(last - first);
      });
}

}  // namespace genperf
