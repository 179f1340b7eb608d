// SPDX-License-Identifier: Apache-2.0
//
// Exact nearest-code search in three passes, each certain to keep the answer.
//
// 1. Scores s = z.f - b (code_panel.h) in bfloat16 on AMX, or in float32; only the maximum of each
// block of codes is
//    kept. Every score is off by at most a bound that is computed per query, so a block whose
//    maximum lies more than twice the bound below the query's maximum cannot hold the answer.
// 2. The blocks that are left (one or two of hundreds) are scored again in float32, under that
// pass's own bound.
// 3. If more than one code is left, float64 on the original inputs decides, components in ascending
// order, lowest index
//    first: the arithmetic of the reference.
//
// The bound: with z~, f~ for the rounded z, f,
//   |s~ - s| <= |z - z~| max|f| + |z~| max|f - f~| + accumulation + rounding of b,
// plus the rounding of pass 3 itself, which has the last word: (D + 4) 2^-53 |x - code|^2. The
// residual norms are measured rather than estimated, the accumulation of n products costs at most n
// 2^-23 |z~||f~| for any order and for the matrix unit's separate roundings, and subtracting b
// rounds once more. Anything that is not finite makes the bound so, no comparison then excludes a
// code, and float64 decides alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "block_maxima.h"
#include "code_panel.h"
#include "positions.h"
#include "simd.h"

namespace genperf {
namespace {

constexpr int64_t kMaxQueries = 256;        // positions that a thread keeps packed
constexpr int64_t kQueryBytes = 512 << 10;  // ... in at most this much
constexpr int64_t kCodeBytes = 192 << 10;   // codes that are passed over while they stay in L2
constexpr int64_t kPanelBytes = 36 << 20;   // packed codes in all
constexpr int64_t kMinAmxDim = 12;   // below, most of a tile's 32-deep product would be zeros
constexpr double kUnit = 0x1p-24;    // half an ulp of 1 in float32
constexpr double kUnit64 = 0x1p-53;  // ... in float64
constexpr double kTiny = 0x1p-100;   // covers underflow

struct Bounds {
  float coarse[kTile];
  float fine[kTile];
  bool has_nan[kTile];
};

// A tile of queries: z [D, kTile], and its bfloat16 form for AMX.
template <class T>
void pack_queries(const Positions<T>& x,
                  const int64_t* offsets,
                  int count,
                  const CodePanel& panel,
                  float* z) {
  const auto pack = [&](int64_t d, int lane) {
    const Wide<T> value = Wide<T>(x.data[offsets[lane] + d * x.stride]);
    z[d * kTile + lane] = float((value - Wide<T>(panel.centre[d])) * Wide<T>(panel.scale));
  };
  if (x.channels_last()) {
    for (int lane = 0; lane < count; ++lane)
      for (int64_t d = 0; d < x.dim; ++d)
        pack(d, lane);
  } else {
    for (int64_t d = 0; d < x.dim; ++d)
      for (int lane = 0; lane < count; ++lane)
        pack(d, lane);
  }
  for (int64_t d = 0; d < x.dim; ++d)
    std::fill(z + d * kTile + count, z + (d + 1) * kTile, 0.0f);
}

// Components 2r and 2r + 1 of 16 queries lie side by side, as the tile product wants its second
// operand.
void pack_query_halves(const float* z, int64_t dim, int64_t depth, uint16_t* halves) {
#if defined(GENPERF_HAS_AMX)
  const Vec zero{};
  for (int sub = 0; sub < 2; ++sub)
    for (int64_t pair = 0; pair < depth * kDepth / 2; ++pair) {
      const int64_t d = 2 * pair;
      const Vec low = d < dim ? load(z + d * kTile + sub * 16) : zero;
      const Vec high = d + 1 < dim ? load(z + (d + 1) * kTile + sub * 16) : zero;
      const UVec bits = UVec(round_to_bfloat16(low)) >> 16 | UVec(round_to_bfloat16(high));
      std::memcpy(halves + (sub * depth * kDepth / 2 + pair) * 32, &bits, sizeof(bits));
    }
#else
  (void)z, (void)dim, (void)depth, (void)halves;
#endif
}

// Twice the error bound of each pass, for each query of a tile.
Bounds error_bounds(const float* z, const CodePanel& panel, bool cosine, bool use_amx) {
  Vec square[2] = {}, residual[2] = {};
  for (int64_t d = 0; d < panel.dim; ++d)
    for (int v = 0; v < 2; ++v) {
      const Vec value = load(z + d * kTile + v * kLanes);
      const Vec error = value - round_to_bfloat16(value);
      square[v] += value * value;
      residual[v] += error * error;
    }
  // Norms summed in float32, products of bounds: all of relative error far below this.
  const double slack = 1.001 + panel.dim * 4 * kUnit;
  // Squares below 2^-126 are lost from the sums.
  const double lost = std::sqrt(double(panel.dim)) * 0x1p-62;
  Bounds bounds;
  for (int lane = 0; lane < kTile; ++lane) {
    const double norm = (std::sqrt(double(square[lane / kLanes][lane % kLanes])) + lost) * slack;
    const double half_residual =
        (std::sqrt(double(residual[lane / kLanes][lane % kLanes])) + lost) * slack;
    const double reach = norm * panel.norm;
    const double distance = norm + panel.norm;
    const double last_word = (panel.dim + 4) * 2 * kUnit64 * (cosine ? reach : distance * distance);
    const double rounding =
        2 * kUnit * reach + 4 * kUnit * (reach + panel.max_bias) + last_word + kTiny;
    const double fine = rounding + (panel.dim + 2) * 2 * kUnit * reach;
    // In float32 the sum starts at -b, and every addition rounds at that magnitude.
    const double coarse = !use_amx ? fine + panel.dim * 2 * kUnit * panel.max_bias
                                   : rounding + half_residual * panel.norm +
                                         (norm + half_residual) * panel.half_residual +
                                         (panel.depth * kDepth + 2) * 2.1 * kUnit * reach;
    const auto twice = [&](double bound) {
      const float value = float(2.001 * slack * bound);
      return reach < 1e30 && std::isfinite(value) ? value : INFINITY;
    };
    bounds.fine[lane] = twice(fine);
    bounds.coarse[lane] = twice(coarse);
    bounds.has_nan[lane] = std::isnan(norm);
  }
  return bounds;
}

// Scores of two neighbouring groups of codes for one query, in float32; returns the largest of each
// lane.
Vec score_groups(const CodePanel& panel, int64_t group, const float* z, float* scores) {
  constexpr int kVecs = kGroup / kLanes;
  constexpr int kSteps =
      4 / kVecs;  // eight sums in flight, to hide the latency of the multiply-add
  const float* values = panel.values.get() + group * panel.dim * kGroup;
  const int64_t next = panel.dim * kGroup;
  Vec sum[kSteps][2][kVecs] = {};
  const auto add = [&](int64_t d, int step) {
    const Vec component = broadcast(z[d * kTile]);
    for (int g = 0; g < 2; ++g)
      for (int v = 0; v < kVecs; ++v) {
        Vec& s = sum[step][g][v];
        s = fma(load(values + g * next + d * kGroup + v * kLanes), component, s);
      }
  };
  int64_t d = 0;
  for (; d + kSteps <= panel.dim; d += kSteps)
    for (int step = 0; step < kSteps; ++step)
      add(d + step, step);
  for (; d < panel.dim; ++d)
    add(d, 0);
  Vec best = broadcast(-INFINITY);
  for (int g = 0; g < 2; ++g)
    for (int v = 0; v < kVecs; ++v) {
      Vec score = sum[0][g][v];
      for (int step = 1; step < kSteps; ++step)
        score += sum[step][g][v];
      score -= load(panel.bias.get() + (group + g) * kGroup + v * kLanes);
      store(scores + g * kGroup + v * kLanes, score);
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
      : x_(x),
        codebook_(codebook),
        mask_(mask),
        indices_(indices),
        cosine_(cosine),
        use_amx_(amx_allowed() && x.dim >= kMinAmxDim) {}

  void run() {
    const int64_t code_bytes = x_.dim * 4 + (use_amx_ ? (x_.dim + kDepth) * 2 : 0);
    const int64_t most = std::max<int64_t>(kPanelBytes / code_bytes, 2 * kGroup);
    const int64_t panels = (codebook_.count + most - 1) / most;
    panel_ = prepare_panel(codebook_, (codebook_.count + panels - 1) / panels, cosine_, use_amx_);
    if (panels > 1)
      distances_ = Buffer<double>(x_.count());
    for (int64_t first = 0; first < codebook_.count; first += panel_.capacity) {
      pack_panel(panel_, codebook_, first, cosine_, use_amx_);
      first_ = first;
      const int64_t chunk = queries_per_chunk();
      const int64_t chunks = (x_.count() + chunk - 1) / chunk;
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(*this, chunk);
        for (int64_t c = begin; c < end; ++c)
          search_chunk(c * chunk, std::min(x_.count(), (c + 1) * chunk), scratch);
      });
    }
  }

 private:
  struct Scratch {
    Scratch(const Search& search, int64_t chunk)
        : z(chunk * search.x_.dim),
          halves(search.use_amx_ ? chunk * search.panel_.depth * kDepth : 0),
          maxima(chunk * search.panel_.blocks()),
          scores(search.panel_.groups * kGroup),
          survivors(kTile * search.panel_.blocks()) {}

    int64_t positions[kMaxQueries], offsets[kMaxQueries];
    Buffer<float> z;            // [tiles, D, kTile]
    Buffer<uint16_t> halves;    // [tiles, 2, depth, 16, 32]
    Buffer<float> maxima;       // [tiles, blocks, kTile]
    Buffer<float> scores;       // of the surviving blocks of one query
    Buffer<int32_t> survivors;  // [kTile, blocks]
  };

  // Enough chunks to keep the threads evenly busy, each small enough to stay in cache.
  int64_t queries_per_chunk() const {
    const int64_t fit = kQueryBytes / (x_.dim * 4 + panel_.blocks() * 4);
    const int64_t share = x_.count() / (4 * torch::stable::get_num_threads());
    return std::clamp<int64_t>(std::min(fit, share) / kTile * kTile, kTile, kMaxQueries);
  }

  void search_chunk(int64_t begin, int64_t end, Scratch& s) {
    int count = 0;
    for (int64_t position = begin; position < end; ++position) {
      if (mask_ && !mask_[position]) {
        indices_[position] = -1;
        continue;
      }
      s.positions[count] = position;
      s.offsets[count++] = x_.offset(position);
    }
    const int tiles = (count + kTile - 1) / kTile;
    for (int t = 0; t < tiles; ++t) {
      float* z = s.z.get() + t * x_.dim * kTile;
      pack_queries(x_, s.offsets + t * kTile, std::min(kTile, count - t * kTile), panel_, z);
      if (use_amx_)
        pack_query_halves(z, x_.dim, panel_.depth, tile_halves(s, t));
    }
    const int64_t block_bytes =
        panel_.block_groups * kGroup * (use_amx_ ? panel_.depth * kDepth * 2 : x_.dim * 4);
    const int64_t step = std::max<int64_t>(1, kCodeBytes / block_bytes);
    for (int64_t block = 0; block < panel_.blocks(); block += step) {
      const int64_t last = std::min(block + step, panel_.blocks());
      for (int t = 0; t < tiles; ++t) {
        float* maxima = s.maxima.get() + t * panel_.blocks() * kTile;
#if defined(GENPERF_HAS_AMX)
        if (use_amx_) {
          block_maxima_amx(panel_, block, last, tile_halves(s, t), maxima);
          continue;
        }
#endif
        block_maxima_fma(panel_, block, last, s.z.get() + t * x_.dim * kTile, maxima);
      }
    }
    for (int t = 0; t < tiles; ++t)
      finish_tile(t, std::min(kTile, count - t * kTile), s);
  }

  uint16_t* tile_halves(Scratch& s, int t) const {
    return s.halves.get() + t * kTile * panel_.depth * kDepth;
  }

  void finish_tile(int tile, int count, Scratch& s) {
    const int64_t blocks = panel_.blocks();
    const float* z = s.z.get() + tile * x_.dim * kTile;
    const float* maxima = s.maxima.get() + tile * blocks * kTile;
    const Bounds bounds = error_bounds(z, panel_, cosine_, use_amx_);
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
  void decide(Scratch& s,
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
    const int64_t block_codes = panel_.block_groups * kGroup;
    Vec best = broadcast(-INFINITY);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t g = 0; g < panel_.block_groups; g += 2)
        best = max(best, score_groups(panel_, blocks[i] * panel_.block_groups + g, z,
                                      s.scores.get() + i * block_codes + g * kGroup));
    float largest = best[0];
    for (int lane = 1; lane < kLanes; ++lane)
      largest = std::max(largest, best[lane]);
    const Vec threshold = broadcast(largest - bound);
    int64_t candidates = 0, nearest = 0;
    double distance = INFINITY;
    bool known = false;
    for (int64_t i = 0; i < count * block_codes; i += kLanes)
      for (uint32_t left = not_below(load(s.scores.get() + i), threshold); left; left &= left - 1) {
        const int64_t place = i + __builtin_ctz(left);
        const int64_t k = blocks[place / block_codes] * block_codes + place % block_codes;
        if (k >= panel_.codes)
          continue;
        if (++candidates == 1) {  // most often it stays alone, and its distance is of no interest
          nearest = k;
          continue;
        }
        if (!known)
          distance = exact(s.offsets[query], nearest);
        known = true;
        const double other = exact(s.offsets[query], k);
        if (other < distance) {
          distance = other;
          nearest = k;
        }
      }
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
  const bool use_amx_;
  CodePanel panel_;
  int64_t first_ = 0;         // index of the panel's first code
  Buffer<double> distances_;  // to the nearest code so far, if there are several panels
};

Tensor nearest_code(const Tensor& x,
                    const Tensor& codebook,
                    std::optional<Tensor> mask,
                    bool cosine) {
  check_positions(x, codebook);
  Tensor contiguous_mask;
  if (mask.has_value()) {
    STD_TORCH_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->numel() == x.size(0) * x.size(2),
        "mask must be bool [outer, inner]");
    contiguous_mask = torch::stable::contiguous(*mask);
  }
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long);
  if (indices.numel() > 0)
    with_types(x, codebook, [&]<class T, class C>(T*, C*) {
      Search<T, C>(
          Positions<T>(x), Codes<C>(codebook),
          mask.has_value() ? static_cast<const bool*>(contiguous_mask.data_ptr()) : nullptr, cosine,
          static_cast<int64_t*>(indices.data_ptr()))
          .run();
    });
  return indices;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&genperf::nearest_code));
}
