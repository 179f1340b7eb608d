// SPDX-License-Identifier: Apache-2.0
//
// Exact nearest-code search in three passes, each certain to keep the answer.
//
// 1. Scores s = z.f + b (code_panel.h) in bfloat16 on AMX, or in float32; only the maxima of each
//    block of codes are kept: one, or on AMX one for each of its 16 columns. Every score is off by
//    at most a bound that is computed per query (error_bounds.cpp), so a maximum that lies more
//    than twice the bound below the query's largest one cannot be the answer's.
// 2. The codes behind the maxima that are left, one or two of hundreds, are scored again in
//    float32, under that pass's own bound: from the packed codes, or after AMX from the original
//    inputs, row by row, which are then all that is read of most of them.
// 3. If more than one code is left, float64 on the original inputs decides, components in ascending
//    order, lowest index first: the arithmetic of the reference.
//
// Regimes. AMX takes 16 to 32 scores a cycle up to D = 32 whatever D is, float32 multiply-adds
// 32 / (D + 1); below D = 5 they win, and that is exact enough to need no splitting.
#include "cpu/search/search.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/search/amx_queries.h"
#include "cpu/search/fp32_queries.h"
#include "cpu/search/rescore.h"

namespace genperf {
namespace {

constexpr int64_t kQueryBytes = 1 << 20;   // queries to a chunk, with their maxima
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
  using W = Wide<T>;

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
#if defined(GENPERF_HAS_AMX)
    if (panel_->halved)
      return search_rows(count, s);
#endif
    search_lanes(count, s);
  }

  // Calls f(first block, last block) for runs of blocks that stay in L2 while all tiles pass.
  template <class F>
  void for_each_run(int64_t code_bytes, const F& f) const {
    const int64_t block_bytes = panel_->block_groups * kGroup * code_bytes;
    const int64_t step = std::max<int64_t>(1, kCodeBytes / block_bytes);
    for (int64_t block = 0; block < panel_->blocks(); block += step)
      f(block, std::min(block + step, panel_->blocks()));
  }

  // Float32 in both passes; the queries along the lanes, a maximum for each query and block.
  void search_lanes(int count, SearchScratch& s) {
    const int tiles = (count + kTile - 1) / kTile;
    const CodePanel& panel = *panel_;
    const auto tile_values = [&](int t) { return s.z.get() + t * kTile * panel.dim; };
    const auto tile_maxima = [&](int t) { return s.maxima.get() + t * panel.blocks() * kTile; };
    for (int t = 0; t < tiles; ++t)
      pack_queries(x_, s.offsets + t * kTile, std::min(kTile, count - t * kTile), panel,
                   tile_values(t));
    for_each_run(panel.dim * sizeof(float), [&](int64_t block, int64_t last) {
      for (int t = 0; t < tiles; ++t)
        block_maxima_fma(panel, block, last, tile_values(t), tile_maxima(t));
    });
    for (int t = 0; t < tiles; ++t) {
      const float* z = tile_values(t);
      const ErrorBounds bounds = error_bounds(z, panel);
      int64_t survivors[kTile] = {};
      for (int first = 0; first < kTile; first += kLanes) {
        const float* maxima = tile_maxima(t) + first;
        Vec best = broadcast(-INFINITY);
        for (int64_t block = 0; block < panel.blocks(); ++block)
          best = max(best, load(maxima + block * kTile));
        const Vec threshold = best - load(bounds.coarse + first);
        for (int64_t block = 0; block < panel.blocks(); ++block)
          for (uint32_t left = not_below(load(maxima + block * kTile), threshold); left;
               left &= left - 1) {
            const int lane = first + __builtin_ctz(left);
            s.survivors[lane * panel.blocks() + survivors[lane]++] = int32_t(block);
          }
      }
      for (int lane = 0; lane < std::min(kTile, count - t * kTile); ++lane)
        if (bounds.has_nan[lane])
          choose_first(s, t * kTile + lane);
        else
          score_blocks(s, t * kTile + lane, z + lane, bounds.fine[lane],
                       s.survivors.get() + lane * panel.blocks(), survivors[lane]);
    }
  }

  void score_blocks(SearchScratch& s,
                    int query,
                    const float* z,
                    float bound,
                    const int32_t* blocks,
                    int64_t count) {
    const int64_t block_codes = panel_->block_groups * kGroup;
    Vec best = broadcast(-INFINITY);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t g = 0; g < panel_->block_groups; ++g)
        best = max(best, score_group(*panel_, blocks[i] * panel_->block_groups + g, z,
                                     s.scores.get() + i * block_codes + g * kGroup));
    const Vec threshold = broadcast(largest(best) - bound);
    Choice choice(*this, s.offsets[query]);
    const float* scores = s.scores.get();
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = blocks[i] * block_codes; k < (blocks[i] + 1) * block_codes;
           k += kLanes, scores += kLanes)
        for (uint32_t left = not_below(load(scores), threshold); left; left &= left - 1)
          if (k + __builtin_ctz(left) < panel_->codes)
            choice.consider(k + __builtin_ctz(left));
    accept(s.positions[query], choice);
  }

#if defined(GENPERF_HAS_AMX)
  // Bfloat16 on the matrix unit, the queries on its rows, then float32 on the original inputs (T =
  // double: float64); sixteen maxima for each query and block.
  void search_rows(int count, SearchScratch& s) {
    constexpr int kScores = kRows * kGroup;
    const CodePanel& panel = *panel_;
    const int tiles = (count + kRows - 1) / kRows;
    const int64_t half_length = panel.depth * kDepth;
    const auto tile_halves = [&](int t) { return s.halves.get() + t * kRows * half_length; };
    const auto tile_maxima = [&](int t) { return s.maxima.get() + t * panel.blocks() * kScores; };
    const W* rows[kMaxQueries];
    ErrorBounds bounds[kMaxQueries / kRows];
    W* const copies = static_cast<W*>(s.copies(count * x_.dim * sizeof(W)));
    for (int t = 0; t < tiles; ++t) {
      const int first = t * kRows, size = std::min(kRows, count - first);
      Tile<T>(x_, s.offsets + first, size).read(copies + first * x_.dim, rows + first);
      bounds[t] = pack_rows(rows + first, size, panel, tile_halves(t));
    }
    for_each_run(half_length * sizeof(uint16_t), [&](int64_t block, int64_t last) {
      for (int t = 0; t < tiles; ++t)
        block_maxima_amx(panel, block, last, tile_halves(t), tile_maxima(t));
    });
    const int64_t words = s.words(panel);
    for (int t = 0; t < tiles; ++t) {
      for (int first = 0; first < kRows; first += kGroup) {
        const float* maxima = tile_maxima(t) + first * kGroup;
        Vec best[kGroup];
        std::fill_n(best, kGroup, broadcast(-INFINITY));
        for (int64_t block = 0; block < panel.blocks(); ++block)
#pragma GCC unroll 16
          for (int i = 0; i < kGroup; ++i)
            best[i] = max(best[i], load(maxima + block * kScores + i * kGroup));
        transpose(best);
#pragma GCC unroll 16
        for (int i = 1; i < kGroup; ++i)
          best[0] = max(best[0], best[i]);
        const Vec threshold = best[0] - load(bounds[t].coarse + first);
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i)
          best[i] = broadcast(threshold[i]);
        uint16_t* const left = reinterpret_cast<uint16_t*>(s.left.get() + first * words);
        for (int64_t block = 0; block < panel.blocks(); ++block)
#pragma GCC unroll 16
          for (int i = 0; i < kGroup; ++i)
            left[i * words * 4 + block] =
                uint16_t(not_below(load(maxima + block * kScores + i * kGroup), best[i]));
      }
      for (int i = 0; i < std::min(kRows, count - t * kRows); ++i)
        if (bounds[t].has_nan[i])
          choose_first(s, t * kRows + i);
        else
          score_codes(s, t * kRows + i, rows[t * kRows + i], bounds[t].fine[i],
                      s.left.get() + i * words, words);
    }
  }

  void score_codes(SearchScratch& s,
                   int query,
                   const W* row,
                   float bound,
                   const uint64_t* entries,
                   int64_t words) {
    const int64_t last = panel_->codes - 1;
    int64_t scored = 0;
    float* const scores = s.scores.get();
    Quad best = Quad{} - INFINITY;
    for (int64_t word = 0; word < words; ++word)
      for (uint64_t left = entries[word]; left; left &= left - 1) {
        const int64_t block = word * 4 + __builtin_ctzll(left) / kGroup;
        int64_t k = block * panel_->block_groups * kGroup + __builtin_ctzll(left) % kGroup;
        for (int64_t g = 0; g < panel_->block_groups; g += 4, scored += 4) {
          const C* codes[4];
          for (int c = 0; c < 4; ++c, k += kGroup) {
            s.codes[scored + c] = int32_t(k);
            codes[c] = code(std::min(k, last));
          }
          const Quad found = near(row, codes, x_.dim, cosine_);
          std::memcpy(scores + scored, &found, sizeof(found));
          best = found > best ? found : best;
        }
      }
    const float top = std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
    const float threshold = cosine_ ? top - bound : top * reach_ - lost_;
    Choice choice(*this, s.offsets[query]);
    for (int64_t i = 0; i < scored; i += 4) {
      Quad found;
      std::memcpy(&found, scores + i, sizeof(found));
      for (uint32_t left = kept(found, threshold); left; left &= left - 1)
        if (const int64_t k = s.codes[i + __builtin_ctz(left)]; k <= last)
          choice.consider(k);
    }
    accept(s.positions[query], choice);
  }
#endif

  // The nearest of the codes that it is shown, by float64, which is not needed while there is one.
  class Choice {
   public:
    Choice(const Search& search, int64_t offset) : search_(search), offset_(offset) {}

    void consider(int64_t k) {
      if (nearest_ < 0) {
        nearest_ = k;
        return;
      }
      const double nearest = distance(), other = search_.exact(offset_, k);
      if (other < nearest || (other == nearest && k < nearest_)) {
        nearest_ = k;
        distance_ = other;
      }
    }

    int64_t nearest() const { return std::max<int64_t>(nearest_, 0); }

    double distance() {
      if (!known_)
        distance_ = search_.exact(offset_, nearest());
      known_ = true;
      return distance_;
    }

   private:
    const Search& search_;
    const int64_t offset_;
    int64_t nearest_ = -1;
    double distance_ = INFINITY;
    bool known_ = false;
  };

  void accept(int64_t position, Choice& choice) {
    if (distances_.get()) {
      if (first_ > 0 && !(choice.distance() < distances_[position]))
        return;
      distances_[position] = choice.distance();
    }
    indices_[position] = first_ + choice.nearest();
  }

  // For a query with a NaN, every distance is NaN.
  void choose_first(const SearchScratch& s, int query) { indices_[s.positions[query]] = 0; }

  const C* code(int64_t k) const { return codebook_.data + (first_ + k) * codebook_.code_stride; }

  double exact(int64_t offset, int64_t k) const {
    return exact_distance(x_.data + offset, x_.stride, code(k), codebook_.stride, x_.dim, cosine_);
  }

  // A squared distance in float32 is off by (D + 4) roundings of itself, and by what underflows;
  // what is farther than this times the least one, and the rest, is not the nearest.
  static float reach_of(int64_t dim) {
    const float relative = 2.5f * float(dim + 6) * 0x1p-24f;
    return relative < 0.2f ? 1 + relative : INFINITY;
  }

  const Positions<T> x_;
  const Codes<C> codebook_;
  const bool* mask_;  // [outer, inner]
  int64_t* indices_;  // [outer, inner]
  const bool cosine_;
  const float reach_ = reach_of(x_.dim), lost_ = float(x_.dim) * 0x1p-120f;
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

// Enough chunks to keep the threads evenly busy, each small enough to stay in cache; but codes that
// do not stay there themselves are read from memory for each.
int64_t queries_per_chunk(const CodePanel& panel, int64_t count) {
  const int64_t bytes = std::clamp(panel.bytes() / 2, kQueryBytes, 4 * kQueryBytes);
  const int64_t fit = bytes / SearchScratch::query_bytes(panel);
  const int64_t share = count / (4 * torch::stable::get_num_threads());
  return std::clamp<int64_t>(std::min(fit, share) / kRows * kRows, kRows, kMaxQueries);
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
