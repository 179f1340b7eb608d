// SPDX-License-Identifier: Apache-2.0
//
// Scores of codes from the original inputs, four codes at a time.
#pragma once

#include "cpu/common/simd.h"
#include "cpu/common/vector_rows.h"

namespace genperf {

#if defined(__AVX512F__)

using Vec4 = float __attribute__((vector_size(4 * sizeof(float))));

// Bit i is set where a[i] is not below b, as for NaN.
inline uint32_t not_below(Vec4 a, float b) {
  return uint32_t(_mm_movemask_ps(_mm_cmpnlt_ps(__m128(a), _mm_set1_ps(b))));
}

// The sums of four vectors.
inline Vec4 sums_of(const Vec (&v)[4]) {
  const auto even = lanes([](int lane) { return lane % 2 * kLanes + lane / 2 * 2; });
  const auto odd = lanes([](int lane) { return lane % 2 * kLanes + lane / 2 * 2 + 1; });
  const Vec a = __builtin_shuffle(v[0], v[1], even) + __builtin_shuffle(v[0], v[1], odd);
  const Vec b = __builtin_shuffle(v[2], v[3], even) + __builtin_shuffle(v[2], v[3], odd);
  const auto low = lanes([](int lane) { return lane / 2 % 2 * kLanes + lane / 4 * 4 + lane % 2; });
  const auto high =
      lanes([](int lane) { return lane / 2 % 2 * kLanes + lane / 4 * 4 + 2 + lane % 2; });
  Vec sum = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  sum += __builtin_shuffle(sum, lanes([](int lane) { return lane ^ 8; }));
  sum += __builtin_shuffle(sum, lanes([](int lane) { return lane ^ 4; }));
  Vec4 first;
  std::memcpy(&first, &sum, sizeof(first));
  return first;
}

// Scores of four codes in float32, with sums in any order: minus the squared distance, or the
// cosine similarity times |x|. NaN if a code has no usable direction. The `next` four codes are
// fetched meanwhile: long codes are in several pages, at whose ends the processor's own prefetching
// stops.
template <class C>
inline Vec4 rescore(const float* x,
                    const C* const (&codes)[4],
                    const C* const (&next)[4],
                    int64_t dim,
                    bool cosine) {
  using P = Pack<float>;
  Vec sum[4] = {}, norm[4] = {};
  if (!cosine) {
    for_each_pack<float>(dim, [&](int64_t d, auto n) {
      const Vec a = P::get(x + d, n);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        __builtin_prefetch(next[i] + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec difference = a - P::get(codes[i] + d, n);
        sum[i] = fma(difference, difference, sum[i]);
      }
    });
    return -sums_of(sum);
  }
  for_each_pack<float>(dim, [&](int64_t d, auto n) {
    const Vec a = P::get(x + d, n);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec b = P::get(codes[i] + d, n);
      sum[i] = fma(a, b, sum[i]);
      norm[i] = fma(b, b, norm[i]);
    }
  });
  Vec4 dot = sums_of(sum), square = sums_of(norm);
  for (int i = 0; i < 4; ++i)
    dot[i] = square[i] > 1e-30f && square[i] < 1e30f ? dot[i] / std::sqrt(square[i]) : NAN;
  return dot;
}

// In float64, rounded to float32.
inline Vec4 rescore(const double* x,
                    const double* const (&codes)[4],
                    const double* const (&)[4],
                    int64_t dim,
                    bool cosine) {
  Vec4 found;
  for (int i = 0; i < 4; ++i) {
    DVec sums{}, norms{};
    int64_t d = 0;
    const auto add = [&](const auto& a, const auto& b, auto& sum, auto& norm) {
      sum += cosine ? a * b : (a - b) * (a - b);
      norm += b * b;
    };
    for (; d + kDoubles <= dim; d += kDoubles)
      add(load_doubles(x + d), load_doubles(codes[i] + d), sums, norms);
    double sum = genperf::sum(sums), norm = genperf::sum(norms);
    for (; d < dim; ++d)
      add(x[d], codes[i][d], sum, norm);
    found[i] = float(!cosine ? -sum : norm > 1e-200 && norm < 1e200 ? sum / std::sqrt(norm) : NAN);
  }
  return found;
}

#endif

}  // namespace genperf
