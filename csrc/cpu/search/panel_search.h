// SPDX-License-Identifier: Apache-2.0
//
// The search of one panel: its arguments, its two passes, and the float64 comparison of the
// remaining candidates.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/search/search.h"

namespace genperf {

// The arithmetic of the reference: components in ascending order, in float64, without fused
// multiply-add. NaN counts as infinity.
template <class T, class C>
double exact_distance(const T* x,
                      int64_t x_stride,
                      const C* code,
                      int64_t code_stride,
                      int64_t dim,
                      bool cosine) {
  double sum = 0, norm = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double a = double(x[d * x_stride]), b = double(code[d * code_stride]);
    if (cosine) {
      sum -= a * b;
      norm += b * b;
    } else {
      sum += (a - b) * (a - b);
    }
  }
  if (cosine)
    sum *= std::abs(sum) / (norm > 0 ? norm : 1.0);  // monotonic in the similarity
  return std::isnan(sum) ? INFINITY : sum;
}

// The same of `kCount` codes, whose sums do not wait for each other.
template <int kCount, class T, class C>
void exact_distances(const T* x,
                     int64_t x_stride,
                     const C* const (&codes)[kCount],
                     int64_t code_stride,
                     int64_t dim,
                     bool cosine,
                     double (&distances)[kCount]) {
  double sums[kCount] = {}, norms[kCount] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const double a = double(x[d * x_stride]);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const double b = double(codes[i][d * code_stride]);
      if (cosine) {
        sums[i] -= a * b;
        norms[i] += b * b;
      } else {
        sums[i] += (a - b) * (a - b);
      }
    }
  }
  for (int i = 0; i < kCount; ++i) {
    if (cosine)
      sums[i] *= std::abs(sums[i]) / (norms[i] > 0 ? norms[i] : 1.0);
    distances[i] = std::isnan(sums[i]) ? INFINITY : sums[i];
  }
}

// Calls a macro with the types of vectors and codes that can be searched.
#define GENPERF_FOR_SEARCH_TYPES(F) \
  F(float, float)                   \
  F(double, double)                 \
  F(BFloat16, BFloat16)             \
  F(BFloat16, float)                \
  F(Half, Half)                     \
  F(Half, float)

template <class T, class C>
struct PanelSearch {
  PanelSearch(const Positions<T>& x,
              const Codes<C>& codebook,
              const bool* mask,
              bool cosine,
              int64_t* indices)
      : x(x), codebook(codebook), mask(mask), indices(indices), cosine(cosine) {}

  const C* code(int64_t k) const { return codebook.data + (first_code + k) * codebook.code_stride; }

  double exact(int64_t offset, int64_t k) const {
    return exact_distance(x.data + offset, x.stride, code(k), codebook.stride, x.dim, cosine);
  }

  // The nearest of the codes that are offered, the lowest index on ties. A single code is not
  // compared with anything, so its distance is not computed.
  class BestCode {
   public:
    BestCode(const PanelSearch& search, int64_t offset) : search_(search), offset_(offset) {}

    void offer(int64_t k) {
      if (index_ < 0) {
        index_ = k;
        return;
      }
      const double best = distance(), other = search_.exact(offset_, k);
      if (other < best || (other == best && k < index_)) {
        index_ = k;
        distance_ = other;
      }
    }

    int64_t index() const { return std::max<int64_t>(index_, 0); }

    double distance() {
      if (!has_distance_)
        distance_ = search_.exact(offset_, index());
      has_distance_ = true;
      return distance_;
    }

   private:
    const PanelSearch& search_;
    const int64_t offset_;
    int64_t index_ = -1;
    double distance_ = INFINITY;
    bool has_distance_ = false;
  };

  // Writes the result of a position, unless an earlier panel has a code at least as near.
  void accept(int64_t position, BestCode& best) const {
    if (distances.get()) {
      if (first_code > 0 && !(best.distance() < distances[position]))
        return;
      distances[position] = best.distance();
    }
    indices[position] = first_code + best.index();
  }

  // All distances of a query with a NaN are infinite, so the first code wins.
  void accept_first(int64_t position) const { indices[position] = 0; }

  // A squared distance in float32 is off by (D + 4) roundings of itself and by what underflows. A
  // code whose distance exceeds distance_factor times the smallest one plus distance_offset is not
  // the nearest.
  static float distance_factor_of(int64_t dim) {
    const float relative = 2.5f * float(dim + 6) * 0x1p-24f;
    return relative < 0.2f ? 1 + relative : INFINITY;
  }

  const Positions<T> x;
  const Codes<C> codebook;
  const bool* mask;  // [outer, inner]
  int64_t* indices;  // [outer, inner]
  const bool cosine;
  const float distance_factor = distance_factor_of(x.dim),
              distance_offset = float(x.dim) * 0x1p-120f;
  const CodePanel* panel = nullptr;
  int64_t first_code = 0;    // index of the panel's first code
  Buffer<double> distances;  // to the nearest code so far, if there are several panels
};

// Search the panel for the `count` positions whose offsets are in `scratch`.
template <class T, class C>
void search_fp32(const PanelSearch<T, C>& search, int count, SearchScratch& scratch);

#if defined(GENPERF_HAS_AMX)
template <class T, class C>
void search_low_precision(const PanelSearch<T, C>& search, int count, SearchScratch& scratch);
#endif

// The chunks of a search. A search in 8 bits stops where so many codes of a query are scored again
// that float32 takes less time, as among codes that are nearly equal, and goes on in float32. One
// in a tree stops where queries visit so many leaves that a search of all codes takes less time.
class Chunks {
 public:
  Chunks(int64_t count, bool may_stop) : left_(count), may_stop_(may_stop) {
    std::iota(left_.begin(), left_.end(), 0);
  }

  // Calls f(scratch, chunk) on all threads, each with a scratch of its own from `make`, for the
  // chunks that have not been searched. f returns how many codes of a query were scored again.
  template <class Make, class F>
  void search(const CodePanel& panel, const Make& make, const F& f) {
    search(may_stop_ && panel.packing == Packing::kInt8 ? panel.codes / 4.0f : INFINITY, make, f);
  }

  // The same, until the result of f is above `most`.
  template <class Make, class F>
  void search(float most, const Make& make, const F& f) {
    std::atomic<float> last = 0;  // result
    torch::stable::parallel_for(0, int64_t(left_.size()), 1, [&](int64_t begin, int64_t end) {
      auto scratch = make();
      for (int64_t i = begin; i < end && last <= most; ++i) {
        last = f(scratch, left_[i]);
        left_[i] = -1;
      }
    });
    std::erase(left_, -1);
  }

  bool stopped() const { return !left_.empty(); }

 private:
  std::vector<int64_t> left_;
  const bool may_stop_;
};

// Searches `count` chunks of positions: calls f(panel, chunks), and again with the codebook packed
// in float32 if the search stopped, which it can only where the panel is the whole codebook.
template <class C, class F>
void search_chunks(const Codes<C>& codebook, const CodePanel& panel, int64_t count, const F& f) {
  Chunks chunks(count, panel.codes == codebook.count);
  f(panel, chunks);
  if (chunks.stopped())
    f(*packed_codebook(codebook, panel.cosine, Packing::kFloat32), chunks);
}

// Calls f(panel, first code) for the packed codebook, or for one part of it after the other.
template <class C, class F>
void for_each_panel(const Codes<C>& codebook, bool cosine, Packing packing, const F& f) {
  const int64_t dim = codebook.dim;
  const int64_t most = std::max<int64_t>(kPanelBytes / packed_code_bytes(dim, packing), 2 * kGroup);
  if (codebook.count <= most) {
    f(*packed_codebook(codebook, cosine, packing), 0);
    return;
  }
  const int64_t panels = (codebook.count + most - 1) / most;
  CodePanel panel = prepare_panel(codebook, largest_component(codebook),
                                  (codebook.count + panels - 1) / panels, cosine, packing);
  for (int64_t first = 0; first < codebook.count; first += panel.capacity) {
    pack_panel(panel, codebook, first);
    f(panel, first);
  }
}

// Calls f(first block, last block) for runs of blocks that stay in L2 while all tiles of queries
// pass over them.
template <class F>
void for_each_run(const CodePanel& panel, int64_t code_bytes, const F& f) {
  constexpr int64_t kRunBytes = 192 << 10;
  const int64_t block_bytes = panel.block_groups * kGroup * code_bytes;
  const int64_t step =
      std::max<int64_t>(2, kRunBytes / block_bytes / 2 * 2);  // blocks can be in pairs
  for (int64_t block = 0; block < panel.blocks(); block += step)
    f(block, std::min(block + step, panel.blocks()));
}

}  // namespace genperf
