// SPDX-License-Identifier: Apache-2.0
//
// Exact nearest-code search in three passes, each certain to keep the answer.
//
// 1. Scores s = z.f + b (code_panel.h) in bfloat16 on AMX, or in float32; only the maximum of each
//    block of codes is kept. Every score is off by at most a bound that is computed per query
//    (query_tile.cpp), so a block whose maximum lies more than twice the bound below the query's
//    maximum cannot hold the answer.
// 2. The blocks that are left, one or two of hundreds, are scored again in float32, under that
//    pass's own bound.
// 3. If more than one code is left, float64 on the original inputs decides, components in ascending
//    order, lowest index first: the arithmetic of the reference.
//
// Regimes. AMX takes 16 to 32 scores a cycle up to D = 32 whatever D is, float32 multiply-adds 32 /
// (D
// + 1); below D = 5 they win, and that is exact enough to need no splitting.
#include "nearest_code.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace genperf {
namespace {

constexpr int64_t kQueryBytes = 1 << 20;   // ... in at most this much
constexpr int64_t kCodeBytes = 192 << 10;  // codes that are passed over while they stay in L2
constexpr int64_t kMinAmxDim = 5;

// Scores of a group of codes for one query, in float32; returns the largest of each lane.
Vec score_group(const CodePanel& panel, int64_t group, const float* z, float* scores) {
  constexpr int kVecs = kGroup / kLanes;
  constexpr int kSteps = 8 / kVecs;  // eight sums in flight, to hide the multiply-add's latency
  const float* values = panel.values.get() + group * panel.dim * kGroup;
  Vec sum[kSteps][kVecs];
  const auto component = [&](int64_t d, int v) {
    return load(values + d * kGroup + v * kLanes) * broadcast(z[d * kTile]);
  };
#pragma GCC unroll 8
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      sum[step][v] = step < panel.dim ? component(step, v) : Vec{};
  int64_t d = kSteps;
  for (; d + kSteps <= panel.dim; d += kSteps)
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sum[step][v] = fma(load(values + (d + step) * kGroup + v * kLanes),
                           broadcast(z[(d + step) * kTile]), sum[step][v]);
  for (; d < panel.dim; ++d)
    for (int v = 0; v < kVecs; ++v)
      sum[0][v] += component(d, v);
  Vec best = broadcast(-INFINITY);
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 3
    for (int width = kSteps / 2; width > 0; width /= 2)
#pragma GCC unroll 4
      for (int step = 0; step < width; ++step)
        sum[step][v] += sum[step + width][v];
    const Vec score = sum[0][v] + load(panel.bias.get() + group * kGroup + v * kLanes);
    store(scores + v * kLanes, score);
    best = max(best, score);
  }
  return best;
}

// The reference's arithmetic: components in ascending order, in float64, no fused multiply-add; NaN
// is infinitely far.
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
    sum *= std::abs(sum) / (norm > 0 ? norm : 1.0);  // orders as the similarity does
  return std::isnan(sum) ? INFINITY : sum;
}

template <class T, class C>
class Search {
 public:
  Search(const Positions<T>& x,
         const Codes<C>& codebook,
         const bool* mask,
         bool cosine,
         int64_t* indices)
      : x_(x), codebook_(codebook), mask_(mask), indices_(indices), cosine_(cosine) {}

  void run() {
    const bool halved = searched_with_amx(x_.dim);
    const int64_t most =
        std::max<int64_t>(kPanelBytes / packed_code_bytes(x_.dim, halved), 2 * kGroup);
    if (codebook_.count <= most) {
      const auto packed = packed_codebook(codebook_, cosine_, halved);
      search_panel(*packed, 0);
      return;
    }
    const int64_t panels = (codebook_.count + most - 1) / most;
    CodePanel panel = prepare_panel(codebook_, largest_component(codebook_),
                                    (codebook_.count + panels - 1) / panels, cosine_, halved);
    distances_ = Buffer<double>(x_.count());
    for (int64_t first = 0; first < codebook_.count; first += panel.capacity) {
      pack_panel(panel, codebook_, first);
      search_panel(panel, first);
    }
  }

  // All positions, a chunk at most, on the calling thread.
  void run(const CodePanel& panel, SearchScratch& scratch) {
    panel_ = &panel;
    search_chunk(0, x_.count(), scratch);
  }

 private:
  void search_panel(const CodePanel& panel, int64_t first) {
    panel_ = &panel;
    first_ = first;
    const int64_t chunk = queries_per_chunk(panel, x_.count());
    const int64_t chunks = (x_.count() + chunk - 1) / chunk;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      SearchScratch scratch(panel, chunk);
      for (int64_t c = begin; c < end; ++c)
        search_chunk(c * chunk, std::min(x_.count(), (c + 1) * chunk), scratch);
    });
  }

  void search_chunk(int64_t begin, int64_t end, SearchScratch& s) {
    int count = 0;
    int64_t outer = begin / x_.inner, inner = begin % x_.inner;
    for (int64_t position = begin; position < end; ++position) {
      if (mask_ && !mask_[position]) {
        indices_[position] = -1;
      } else {
        s.positions[count] = position;
        s.offsets[count++] = outer * x_.outer_stride + inner * x_.inner_stride;
      }
      if (++inner == x_.inner) {
        inner = 0;
        ++outer;
      }
    }
    const int tiles = (count + kTile - 1) / kTile;
    const CodePanel& panel = *panel_;
    for (int t = 0; t < tiles; ++t) {
      pack_queries(x_, s.offsets + t * kTile, std::min(kTile, count - t * kTile), panel,
                   tile_values(s, t));
#if defined(GENPERF_HAS_AMX)
      if (panel.halved)
        pack_query_halves(tile_values(s, t), panel, tile_halves(s, t));
#endif
    }
    const int64_t block_bytes =
        panel.block_groups * kGroup * (panel.halved ? panel.depth * kDepth * 2 : panel.dim * 4);
    const int64_t step = std::max<int64_t>(2, kCodeBytes / block_bytes / 2 * 2);
    for (int64_t block = 0; block < panel.blocks(); block += step) {
      const int64_t last = std::min(block + step, panel.blocks());
      for (int t = 0; t < tiles; ++t) {
        float* maxima = s.maxima.get() + t * panel.blocks() * kTile;
#if defined(GENPERF_HAS_AMX)
        if (panel.halved) {
          block_maxima_amx(panel, block, last, tile_halves(s, t), maxima);
          continue;
        }
#endif
        block_maxima_fma(panel, block, last, tile_values(s, t), maxima);
      }
    }
    for (int t = 0; t < tiles; ++t)
      finish_tile(t, std::min(kTile, count - t * kTile), s);
  }

  float* tile_values(SearchScratch& s, int t) const { return s.z.get() + t * kTile * panel_->dim; }

  uint16_t* tile_halves(SearchScratch& s, int t) const {
    return s.halves.get() + t * kTile * panel_->depth * kDepth;
  }

  void finish_tile(int tile, int count, SearchScratch& s) {
    const int64_t blocks = panel_->blocks();
    const float* z = tile_values(s, tile);
    const float* maxima = s.maxima.get() + tile * blocks * kTile;
    const Bounds bounds = error_bounds(z, *panel_);
    int64_t survivors[kTile] = {};
    for (int v = 0; v < 2; ++v) {
      Vec best = broadcast(-INFINITY);
      for (int64_t block = 0; block < blocks; ++block)
        best = max(best, load(maxima + block * kTile + v * kLanes));
      const Vec threshold = best - load(bounds.coarse + v * kLanes);
      for (int64_t block = 0; block < blocks; ++block) {
        uint32_t left = not_below(load(maxima + block * kTile + v * kLanes), threshold);
        for (; left; left &= left - 1) {
          const int lane = v * kLanes + __builtin_ctz(left);
          s.survivors[lane * blocks + survivors[lane]++] = int32_t(block);
        }
      }
    }
    for (int lane = 0; lane < count; ++lane)
      decide(s, tile * kTile + lane, z + lane, bounds.fine[lane], bounds.has_nan[lane],
             s.survivors.get() + lane * blocks, survivors[lane]);
  }

  // Passes 2 and 3 for one query.
  void decide(SearchScratch& s,
              int query,
              const float* z,
              float bound,
              bool has_nan,
              const int32_t* blocks,
              int64_t count) {
    const int64_t position = s.positions[query];
    if (has_nan) {  // every distance is NaN
      indices_[position] = 0;
      return;
    }
    const int64_t block_codes = panel_->block_groups * kGroup;
    Vec best = broadcast(-INFINITY);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t g = 0; g < panel_->block_groups; ++g)
        best = max(best, score_group(*panel_, blocks[i] * panel_->block_groups + g, z,
                                     s.scores.get() + i * block_codes + g * kGroup));
    const Vec threshold = broadcast(largest(best) - bound);
    int64_t candidates = 0, nearest = 0;
    double distance = INFINITY;
    bool known = false;
    const auto consider = [&](int64_t k) {
      if (k >= panel_->codes)
        return;
      if (++candidates == 1) {  // most often it stays alone, and its distance is of no interest
        nearest = k;
        return;
      }
      if (!known)
        distance = exact(s.offsets[query], nearest);
      known = true;
      const double other = exact(s.offsets[query], k);
      if (other < distance) {
        distance = other;
        nearest = k;
      }
    };
    const float* scores = s.scores.get();
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = blocks[i] * block_codes; k < (blocks[i] + 1) * block_codes;
           k += kLanes, scores += kLanes)
        for (uint32_t left = not_below(load(scores), threshold); left; left &= left - 1)
          consider(k + __builtin_ctz(left));
    if (distances_.get()) {
      if (!known)
        distance = exact(s.offsets[query], nearest);
      if (first_ > 0 && !(distance < distances_[position]))
        return;
      distances_[position] = distance;
    }
    indices_[position] = first_ + nearest;
  }

  double exact(int64_t offset, int64_t k) const {
    return exact_distance(x_.data + offset, x_.stride,
                          codebook_.data + (first_ + k) * codebook_.code_stride, codebook_.stride,
                          x_.dim, cosine_);
  }

  const Positions<T> x_;
  const Codes<C> codebook_;
  const bool* mask_;  // [outer, inner]
  int64_t* indices_;  // [outer, inner]
  const bool cosine_;
  const CodePanel* panel_ = nullptr;
  int64_t first_ = 0;         // index of the panel's first code
  Buffer<double> distances_;  // to the nearest code so far, if there are several panels
};

Tensor nearest_code(const Tensor& x,
                    const Tensor& codebook,
                    std::optional<Tensor> mask,
                    bool cosine) {
  const bool heads = x.dim() == 4;
  const int64_t count = heads ? x.size(0) : 1;
  STD_TORCH_CHECK(heads ? codebook.dim() == 3 && codebook.size(0) == count : x.dim() == 3,
                  "x and codebook must be [outer, D, inner] and [K, D], or both with heads first");
  Tensor indices =
      heads ? torch::stable::new_empty(x, {count, x.size(1), x.size(3)}, ScalarType::Long)
            : torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long);
  Tensor contiguous_mask;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == indices.numel(),
                    "mask must be bool, one for each position");
    contiguous_mask = torch::stable::contiguous(*mask);
  }
  // Short rows far apart are what packing and rescoring read badly.
  const Tensor rows =
      codebook.stride(codebook.dim() - 1) == 1 ? codebook : torch::stable::contiguous(codebook);
  for (int64_t head = 0; head < count; ++head) {
    const Tensor vectors = heads ? torch::stable::select(x, 0, head) : x;
    const Tensor codes = heads ? torch::stable::select(rows, 0, head) : rows;
    check_positions(vectors, codes);
    const int64_t positions = vectors.size(0) * vectors.size(2);
    if (positions == 0)
      continue;
    with_types(vectors, codes, [&]<class T, class C>(T*, C*) {
      Search<T, C>(Positions<T>(vectors), Codes<C>(codes),
                   mask.has_value()
                       ? static_cast<const bool*>(contiguous_mask.data_ptr()) + head * positions
                       : nullptr,
                   cosine, static_cast<int64_t*>(indices.data_ptr()) + head * positions)
          .run();
    });
  }
  return indices;
}

}  // namespace

bool searched_with_amx(int64_t dim) {
  return amx_allowed() && dim >= kMinAmxDim;
}

// Enough chunks to keep the threads evenly busy, each small enough to stay in cache.
int64_t queries_per_chunk(const CodePanel& panel, int64_t count) {
  const int64_t fit = kQueryBytes / (panel.dim * 4 + panel.blocks() * 4);
  const int64_t share = count / (4 * torch::stable::get_num_threads());
  return std::clamp<int64_t>(std::min(fit, share) / kTile * kTile, kTile, kMaxQueries);
}

template <class T>
void search_chunk(const Positions<T>& x,
                  const Codes<T>& codebook,
                  const CodePanel& panel,
                  const bool* mask,
                  bool cosine,
                  SearchScratch& scratch,
                  int64_t* indices) {
  Search<T, T>(x, codebook, mask, cosine, indices).run(panel, scratch);
}

template <class T>
void search(const Positions<T>& x,
            const Codes<T>& codebook,
            const bool* mask,
            bool cosine,
            int64_t* indices) {
  Search<T, T>(x, codebook, mask, cosine, indices).run();
}

#define INSTANTIATE(T)                                                                            \
  template void search_chunk(const Positions<T>&, const Codes<T>&, const CodePanel&, const bool*, \
                             bool, SearchScratch&, int64_t*);                                     \
  template void search(const Positions<T>&, const Codes<T>&, const bool*, bool, int64_t*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&genperf::nearest_code));
}
