// SPDX-License-Identifier: Apache-2.0
//
// Vectors and runs of the random numbers of noise.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/common/simd.h"
#include "noise.h"

namespace genperf {

// Numbers per step of draw(): one quad in each lane.
constexpr int kDrawn = 4 * kLanes;

inline UVec split_low(int64_t value) {
  return UVec{} + uint32_t(uint64_t(value));
}
inline UVec split_high(int64_t value) {
  return UVec{} + uint32_t(uint64_t(value) >> 32);
}

inline uint64_t seed_of(const std::optional<torch::stable::Tensor>& seed) {
  if (!seed.has_value())
    return 0;
  STD_TORCH_CHECK(seed->scalar_type() == torch::headeronly::ScalarType::Long && seed->numel() == 1,
                  "seed must be one int64");
  return *static_cast<const uint64_t*>(seed->const_data_ptr());
}

// Stores the words of kLanes quads in the order of the quads. Lane 4 i + j of words[w] holds word w
// of quad j * kLanes / 4 + i.
inline void in_order(const Vec (&words)[4], float* out) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
#define GENPERF_UNPACK(which, a, b) _mm512_maskz_unpack##which(-1, a, b)
  using Singles = __m512;
  using Pairs = __m512d;
#elif defined(__AVX2__)
#define GENPERF_UNPACK(which, a, b) _mm256_unpack##which(a, b)
  using Singles = __m256;
  using Pairs = __m256d;
#else
#define GENPERF_UNPACK(which, a, b) _mm_unpack##which(a, b)
  using Singles = __m128;
  using Pairs = __m128d;
#endif
  const Singles a(words[0]), b(words[1]), c(words[2]), d(words[3]);
  const Pairs ab0(Pairs(GENPERF_UNPACK(lo_ps, a, b))), ab2(Pairs(GENPERF_UNPACK(hi_ps, a, b)));
  const Pairs cd0(Pairs(GENPERF_UNPACK(lo_ps, c, d))), cd2(Pairs(GENPERF_UNPACK(hi_ps, c, d)));
  store(out, Vec(GENPERF_UNPACK(lo_pd, ab0, cd0)));
  store(out + kLanes, Vec(GENPERF_UNPACK(hi_pd, ab0, cd0)));
  store(out + 2 * kLanes, Vec(GENPERF_UNPACK(lo_pd, ab2, cd2)));
  store(out + 3 * kLanes, Vec(GENPERF_UNPACK(hi_pd, ab2, cd2)));
#undef GENPERF_UNPACK
#else
  static_assert(kLanes == 4);
  Vec quads[4] = {words[0], words[1], words[2], words[3]};
  transpose(quads);
  for (int i = 0; i < 4; ++i)
    store(out + i * kLanes, quads[i]);
#endif
}

// The quad that in_order() expects in each lane, relative to the first.
inline UVec quad_of_lane() {
  UVec quads{};
  for (int lane = 0; lane < kLanes; ++lane)
    quads[lane] = uint32_t(lane % 4 * (kLanes / 4) + lane / 4);
  return quads;
}

// random_words() in every lane.
[[gnu::always_inline]] inline Words<Simd> lane_words(UVec quad_low,
                                                     UVec quad_high,
                                                     UVec row_low,
                                                     UVec row_high,
                                                     uint64_t seed) {
  using Pairs = SimdPairs::U;
  constexpr uint64_t kLower = 0xffffffffu;
  const UVec counter[4] = {quad_low, quad_high, row_low, row_high};
  Words<SimdPairs> even, odd;
  for (int w = 0; w < 4; ++w) {
    even.word[w] = Pairs(counter[w]);
    odd.word[w] = Pairs(counter[w]) >> 32;
  }
  even = philox<SimdPairs>(even, seed);
  odd = philox<SimdPairs>(odd, seed);
  Words<Simd> words;
  for (int w = 0; w < 4; ++w)
    words.word[w] = UVec((even.word[w] & kLower) | (odd.word[w] << 32));
  return words;
}

// first + offset in every lane, as the low and the high half of a 64-bit number.
struct Counters {
  UVec low, high;

  Counters(int64_t first, UVec offsets)
      : low(split_low(first) + offsets),
        high(split_high(first) + (low < split_low(first) ? UVec{} + 1u : UVec{})) {}
};

// The words of kLanes quads starting at `quad`, in the order of quad_of_lane().
[[gnu::always_inline]] inline Words<Simd> draw_words(uint64_t seed, int64_t row, int64_t quad) {
  const Counters quads(quad, quad_of_lane());
  return lane_words(quads.low, quads.high, split_low(row), split_high(row), seed);
}

// Writes at least `count` numbers of a row, starting at number `first`, and returns a pointer to
// number `first`. `out` holds count + kDrawn + 4 numbers.
template <class Transform>
const float* draw(uint64_t seed,
                  int64_t row,
                  int64_t first,
                  int64_t count,
                  float* out,
                  const Transform& transform) {
  const int64_t quad = first / 4;
  const int64_t skipped = first % 4;
  for (int64_t i = 0; i < count + skipped; i += kDrawn) {
    Vec values[4];
    transform(draw_words(seed, row, quad + i / 4), values);
    in_order(values, out + i);
  }
  return out + skipped;
}

inline const float* draw_normals(uint64_t seed,
                                 int64_t row,
                                 int64_t first,
                                 int64_t count,
                                 float* out) {
  return draw(seed, row, first, count, out,
              [](const Words<Simd>& words, Vec(&values)[4]) { normals<Simd>(words, values); });
}

inline const float* draw_uniforms(uint64_t seed,
                                  int64_t row,
                                  int64_t first,
                                  int64_t count,
                                  float* out) {
  return draw(seed, row, first, count, out, [](const Words<Simd>& words, Vec(&values)[4]) {
    for (int w = 0; w < 4; ++w)
      values[w] = uniform<Simd>(words.word[w]);
  });
}

// The interpolation weight of a sample.
inline float draw_weight(uint64_t seed, int64_t row) {
  const Words<Scalar> words = random_words<Scalar>(0, 0x80000000u, uint32_t(uint64_t(row)),
                                                   uint32_t(uint64_t(row) >> 32), seed);
  return uniform<Scalar>(words.word[0]);
}

}  // namespace genperf
