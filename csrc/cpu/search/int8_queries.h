// SPDX-License-Identifier: Apache-2.0
//
// A tile of queries z = (x - c) * scale in 8 bits, z = scale * q + rest, for the search with
// AVX-512 VNNI.
#pragma once

#include "cpu/common/vector_rows.h"
#include "cpu/search/block_maxima.h"
#include "cpu/search/code_panel.h"
#include "cpu/search/error_bounds.h"
#include "cpu/search/int8_rows.h"
#include "cpu/search/interleave.h"

namespace genperf {

#if defined(GENPERF_HAS_VNNI)

class Int8Queries {
 public:
  // Packs `count` rows to `packed` [2, units of 4 components, 16, 4], which is kept.
  template <class W>
  void pack(const W* const* rows, int count, const CodePanel& panel, void* packed) {
    const int64_t units = panel.int8_units(), q_length = round_up(panel.dim, 4 * kLanes);
    const float slack = error_slack(panel.dim), lost = lost_length(panel.dim);
    count_ = count;
    z_ = static_cast<int8_t*>(packed);
    Buffer<float> row(round_up(panel.dim, kLanes));
    Buffer<int8_t> q(kGroup * q_length);
    for (int first = 0; first < kRows; first += kGroup) {
      alignas(64) float totals[kGroup] = {}, rests[kGroup] = {};
      std::fill_n(q.get(), kGroup * q_length, 0);
      for (int lane = 0; lane < kGroup; ++lane) {
        scale_[first + lane] = 0;
        if (first + lane >= count)
          continue;
        totals[lane] = center(rows[first + lane], panel, row.get());
        const Int8Row rounded = round_to_int8(row.get(), panel.dim, q.get() + lane * q_length);
        scale_[first + lane] = rounded.scale;
        rests[lane] = rounded.rest;
      }
      int8_t* const z = z_ + first * units * 4;
      interleave(reinterpret_cast<const float*>(q.get()), q_length / 4, units,
                 reinterpret_cast<float*>(z));
      // The packed codes have an offset of 128.
      IVec sums{};
      for (int64_t t = 0; t < units; ++t)
        multiply_add(sums, 0x01010101 - IVec{}, load_bytes(z + t * 4 * kGroup));
      const IVec start = sums * -128;
      std::memcpy(start_ + first, &start, sizeof(start));
      store(square_ + first, load(totals));
      const Vec norm = (sqrt(load(totals)) + lost) * slack;
      store(norm_ + first, norm);
      const Vec rest = (sqrt(load(rests)) + lost) * slack;
      store(rest_ + first, rest);
      const Vec own = panel.cosine ? Vec{} : norm * norm * ((panel.dim + 4) * 8 * kUnit64);
      const Vec twice_constant =
          bounds_are_finite(norm, panel) ? own + 2 * kTiny : broadcast(INFINITY);
      store(twice_constant_ + first, twice_constant);
      bounds.set(first, {load(totals)}, panel);
      const Int8Codes& codes = panel.int8;
      const Vec most = norm * codes.most_rest + rest * codes.most_length + codes.most_bias_error;
      store(bounds.coarse + first, most * (2 * slack) + twice_constant);
    }
  }

  // Computes maxima [blocks, 32, 16] of the largest scores that codes can have.
  void block_maxima(const CodePanel& panel,
                    int64_t block_groups,
                    int64_t begin,
                    int64_t end,
                    float* maxima) const;

  // As in AmxQueries.
  auto lowest(const CodePanel& panel, int64_t block, int first) const {
    const Int8Codes& codes = panel.int8;
    const Vec rest = load(codes.block_rest.get() + block * kGroup) * -2.0f;
    const Vec length = load(codes.block_length.get() + block * kGroup) * -2.0f;
    const Vec bias = load(codes.block_bias_error.get() + block * kGroup) * -2.0f;
    return [=, this](Vec maxima, int i) {
      return maxima +
             fma(broadcast(norm_[first + i]), rest, fma(broadcast(rest_[first + i]), length, bias));
    };
  }

  // The same for one query and blocks of any number of groups, and what it leaves out.
  Vec lowest_of(const CodePanel& panel,
                int64_t block_groups,
                int64_t block,
                int query,
                Vec maxima) const {
    const Int8Codes& codes = panel.int8;
    Vec rest{}, length{}, bias{};
    for (int64_t k = block * block_groups * kGroup; k < (block + 1) * block_groups * kGroup;
         k += kGroup) {
      rest = max(rest, load(codes.rest.get() + k));
      length = max(length, load(codes.length.get() + k));
      bias = max(bias, load(codes.bias_error.get() + k));
    }
    return maxima -
           2.0f * fma(broadcast(norm_[query]), rest, fma(broadcast(rest_[query]), length, bias));
  }

  float margin(int query) const { return twice_constant_[query]; }

  Vec threshold(Vec lowest, int first) const { return lowest - load(twice_constant_ + first); }

  static constexpr bool kWideBounds = true;

  // The least maximum that a code as near as one with this score can have: minus the squared
  // distance in float32, or the cosine similarity times |x|, both in the units of the inputs. Each
  // is off by less than half of `error` of itself and of |z|^2 or |z|.
  float least_maximum(int query, float score, const CodePanel& panel) const {
    const float error = (4 * panel.dim + 32) * kUnit;
    const float norm = norm_[query] * norm_[query];
    const float least = panel.cosine ? score - norm_[query] * error
                                     : 0.5f * (square_[query] - norm * error +
                                               score * panel.scale * panel.scale * (1 + error));
    return least - twice_constant_[query];
  }

  ErrorBounds bounds;  // `coarse` is that of the code with the largest bound

 private:
  // Writes z, padded with zeros to full vectors, and returns |z|^2.
  template <class W>
  static float center(const W* x, const CodePanel& panel, float* z) {
    const float* const center = panel.center.get();
    Vec squares{};
    const auto put = [&](int64_t d, Vec value) {
      store(z + d, value);
      squares = fma(value, value, squares);
    };
    int64_t d = 0;
    for (; d + kLanes <= panel.dim; d += kLanes)
      put(d, centered(x + d, load(center + d), panel.scale));
    if (d < panel.dim)
      put(d, centered(x + d, load(center + d), panel.scale, int(panel.dim - d)));
    return float(Pack<float>::total(squares));
  }

  static auto bounds_are_finite(Vec norm, const CodePanel& panel) {
    return norm * broadcast(float(panel.norm)) < 1e30f && norm * norm < 1e30f &&
           broadcast(float(panel.max_bias)) < 1e30f;
  }

  int8_t* z_;
  int count_;
  float scale_[kRows], square_[kRows], norm_[kRows], rest_[kRows], twice_constant_[kRows];
  int32_t start_[kRows];
};

#endif

}  // namespace genperf
