// SPDX-License-Identifier: Apache-2.0
//
// Vectors and runs of the random numbers of noise.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "cpu/common/several.h"
#include "cpu/common/simd.h"
#include "noise.h"

namespace genperf {

// Quads that a lane draws side by side: as many as the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kQuads = 2;
#else
constexpr int kQuads = 1;
#endif

// Numbers per step of draw(), at most.
constexpr int kDrawn = 4 * kQuads * kLanes;

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

// The keys of Philox for words in 64-bit lanes.
struct PairKeys {
  uint64_t first[Keys::kRounds], second[Keys::kRounds];

  explicit PairKeys(uint64_t seed) {
    const Keys keys(seed);
    std::copy_n(keys.first, Keys::kRounds, first);
    std::copy_n(keys.second, Keys::kRounds, second);
  }
};

template <int N>
using PairsOf = Several<SimdPairs::U, N>;

// The even lanes of N vectors, then the odd ones.
template <int N>
[[gnu::always_inline]] inline PairsOf<2 * N> pairs_of(const Several<UVec, N>& x) {
  return several<2 * N>([&](int i) __attribute__((always_inline)) {
    return i < N ? SimdPairs::U(x.at[i]) : SimdPairs::U(x.at[i - N]) >> 32;
  });
}

// The same word in all lanes of vectors i and N + i. Equal vectors are multiplied once.
template <int N, class F>
[[gnu::always_inline]] inline PairsOf<2 * N> uniform_pairs(const F& word) {
  return several<2 * N>([&](int i) __attribute__((always_inline)) {
    return SimdPairs::U{} + uint64_t{uint32_t(word(i % N))};
  });
}

// Vectors of the even and the odd lanes, of which the lower halves count, as one.
[[gnu::always_inline]] inline UVec interleaved(SimdPairs::U even, SimdPairs::U odd) {
#if defined(__AVX512F__)
  return UVec(_mm512_mask_moveldup_ps(__m512(even), 0xaaaa, __m512(odd)));
#else
  return UVec((even & 0xffffffffu) | (odd << 32));
#endif
}

// random_words() of N quads in every lane.
template <int N>
[[gnu::always_inline]] inline Words<SeveralSimd<N>> lane_words(const PairsOf<2 * N>& quad_low,
                                                               const PairsOf<2 * N>& quad_high,
                                                               const PairsOf<2 * N>& row_low,
                                                               const PairsOf<2 * N>& row_high,
                                                               const PairKeys& keys) {
  const auto drawn = philox<SeveralPairs<2 * N>>({{quad_low, quad_high, row_low, row_high}}, keys);
  Words<SeveralSimd<N>> words;
  for (int w = 0; w < 4; ++w)
    words.word[w] = several<N>([&](int i) __attribute__((always_inline)) {
      return interleaved(drawn.word[w].at[i], drawn.word[w].at[N + i]);
    });
  return words;
}

// first + offset in every lane, as the low and the high half of a 64-bit number.
struct Counters {
  UVec low, high;

  Counters(int64_t first, UVec offsets)
      : low(split_low(first) + offsets),
        high(split_high(first) + (low < split_low(first) ? UVec{} + 1u : UVec{})) {}
};

// The words of N * kLanes quads starting at `quad`, each kLanes in the order of quad_of_lane().
template <int N>
[[gnu::always_inline]] inline Words<SeveralSimd<N>> draw_words(const PairKeys& keys,
                                                               int64_t row,
                                                               int64_t quad) {
  const auto quads = several<N>([&](int i) __attribute__((always_inline)) {
    return Counters(quad + i * kLanes, quad_of_lane());
  });
  const auto low = several<N>([&](int i) { return quads.at[i].low; });
  const auto high = several<N>([&](int i) { return quads.at[i].high; });
  return lane_words<N>(pairs_of(low), pairs_of(high), uniform_pairs<N>([&](int) { return row; }),
                       uniform_pairs<N>([&](int) { return uint64_t(row) >> 32; }), keys);
}

// Writes at least `count` numbers of a row, starting at number `first`, and returns a pointer to
// number `first`. `out` holds count + kDrawn + 4 numbers. `transform` maps all words to numbers.
template <class Transform>
const float* draw(uint64_t seed,
                  int64_t row,
                  int64_t first,
                  int64_t count,
                  float* out,
                  const Transform& transform) {
  const PairKeys keys(seed);
  const int64_t quad = first / 4;
  const int64_t skipped = first % 4;
  int64_t i = 0;
  const auto step = [&]<int N>(std::integral_constant<int, N>) {
    const Words<SeveralSimd<N>> words = draw_words<N>(keys, row, quad + i / 4);
    const Several<Vec, 4 * N> values = transform(words);
    for (int n = 0; n < N; ++n, i += 4 * kLanes)
      in_order({values.at[n], values.at[N + n], values.at[2 * N + n], values.at[3 * N + n]},
               out + i);
  };
  while (count + skipped - i > 4 * kLanes)
    step(std::integral_constant<int, kQuads>());
  if (i < count + skipped)
    step(std::integral_constant<int, 1>());
  return out + skipped;
}

// The words of one number, then those of the next.
template <int N>
[[gnu::always_inline]] inline Several<UVec, 4 * N> all_words(const Words<SeveralSimd<N>>& words) {
  return joined(joined(words.word[0], words.word[1]), joined(words.word[2], words.word[3]));
}

template <int N>
[[gnu::always_inline]] inline Several<Vec, 4 * N> gumbels(const Words<SeveralSimd<N>>& words) {
  return gumbel<SeveralSimd<4 * N>>(all_words(words));
}

inline const float* draw_gumbels(uint64_t seed,
                                 int64_t row,
                                 int64_t first,
                                 int64_t count,
                                 float* out) {
  return draw(seed, row, first, count, out, [](const auto& words) { return gumbels(words); });
}

template <int N>
[[gnu::always_inline]] inline Several<Vec, 4 * N> normals_of(const Words<SeveralSimd<N>>& words) {
  Several<Vec, 2 * N> cosines, sines;
  normal_pair<SeveralSimd<2 * N>>(joined(words.word[0], words.word[2]),
                                  joined(words.word[1], words.word[3]), cosines, sines);
  return several<4 * N>([&](int i) {
    const int number = i / N, place = number / 2 * N + i % N;
    return number % 2 ? sines.at[place] : cosines.at[place];
  });
}

inline const float* draw_normals(uint64_t seed,
                                 int64_t row,
                                 int64_t first,
                                 int64_t count,
                                 float* out) {
  return draw(seed, row, first, count, out, [](const auto& words) { return normals_of(words); });
}

inline const float* draw_uniforms(uint64_t seed,
                                  int64_t row,
                                  int64_t first,
                                  int64_t count,
                                  float* out) {
  return draw(seed, row, first, count, out, []<int N>(const Words<SeveralSimd<N>>& words) {
    return uniform<SeveralSimd<4 * N>>(all_words(words));
  });
}

// Writes the interpolation weights of samples first, first + 1, ... `out` holds count + kQuads *
// kLanes numbers.
inline void draw_weights(uint64_t seed, int64_t first, int64_t count, float* out) {
  constexpr int kStep = kQuads * kLanes;
  const PairKeys keys(seed);
  UVec lanes{};
  for (int lane = 0; lane < kLanes; ++lane)
    lanes[lane] = uint32_t(lane);
  for (int64_t i = 0; i < count; i += kStep) {
    const auto rows =
        several<kQuads>([&](int q) { return Counters(first + i + q * kLanes, lanes); });
    const auto low = several<kQuads>([&](int q) { return rows.at[q].low; });
    const auto high = several<kQuads>([&](int q) { return rows.at[q].high; });
    const auto words = lane_words<kQuads>(uniform_pairs<kQuads>([](int) { return 0; }),
                                          uniform_pairs<kQuads>([](int) { return 0x80000000u; }),
                                          pairs_of(low), pairs_of(high), keys);
    const Several<Vec, kQuads> weights = uniform<SeveralSimd<kQuads>>(words.word[0]);
    for (int q = 0; q < kQuads; ++q)
      store(out + i + q * kLanes, weights.at[q]);
  }
}

}  // namespace genperf
