// SPDX-License-Identifier: Apache-2.0
//
// The widest float and double vectors of the instruction set that a file is compiled for.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace genperf {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using UVec = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using IVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr int kDoubles = kLanes / 2;

using DVec = double __attribute__((vector_size(kDoubles * sizeof(double))));
using DBits = uint64_t __attribute__((vector_size(kDoubles * sizeof(uint64_t))));
using DMask = int64_t __attribute__((vector_size(kDoubles * sizeof(int64_t))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof(v));
}

// x - 0 equals x for every x, unlike x + 0, so the compiler removes the subtraction.
inline Vec broadcast(float value) {
  return value - Vec{};
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Vec(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

// Of a NaN and a number, b on x86-64 and the number on aarch64.
inline Vec max(Vec a, Vec b) {
#if defined(__aarch64__)
  return Vec(vmaxnmq_f32(float32x4_t(a), float32x4_t(b)));
#else
  return a > b ? a : b;
#endif
}

// Bit i is set where a[i] is not below b[i], as for NaN.
inline uint32_t not_below(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(__m256(a), __m256(b), _CMP_NLT_UQ));
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpnlt_ps(__m128(a), __m128(b)));
#elif defined(__aarch64__)
  return vaddvq_u32(uint32x4_t(a < b ? UVec{} : UVec{1, 2, 4, 8}));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i)
    mask |= uint32_t(!(a[i] < b[i])) << i;
  return mask;
#endif
}

// Rounds to bfloat16, to nearest even; the result is a float.
inline Vec round_to_bfloat16(Vec v) {
  const UVec bits = UVec(v);
  return Vec((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// A vector of f(0), f(1), ... that is a compile-time constant, as shuffles require.
template <class F>
inline IVec lanes(const F&) {
  struct Values {
    int32_t at[kLanes];
  };
  static constexpr Values values = [] {
    Values v{};
    for (int lane = 0; lane < kLanes; ++lane)
      v.at[lane] = F{}(lane);
    return v;
  }();
  IVec v;
  std::memcpy(&v, values.at, sizeof(v));
  return v;
}

template <int kStep>
inline void transpose_pairs(Vec (&rows)[kLanes]) {
  const IVec low = lanes([](int lane) { return lane & kStep ? kLanes + lane - kStep : lane; });
  const IVec high = lanes([](int lane) { return lane & kStep ? kLanes + lane : lane + kStep; });
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) {
      const Vec a = rows[i], b = rows[i + kStep];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + kStep] = __builtin_shuffle(a, b, high);
    }
}

inline void transpose(Vec (&rows)[kLanes]) {
  transpose_pairs<1>(rows);
  transpose_pairs<2>(rows);
  if constexpr (kLanes > 4)
    transpose_pairs<4>(rows);
  if constexpr (kLanes > 8)
    transpose_pairs<8>(rows);
}

template <int kStep = kLanes / 2>
inline float largest(Vec v) {
  v = max(v, __builtin_shuffle(v, lanes([](int lane) { return lane ^ kStep; })));
  if constexpr (kStep > 1)
    return largest<kStep / 2>(v);
  return v[0];
}

// Correctly rounded square roots.
inline Vec sqrt(Vec v) {
#if defined(__AVX512F__)
  return Vec(_mm512_maskz_sqrt_ps(0xffff, __m512(v)));
#elif defined(__AVX2__)
  return Vec(_mm256_sqrt_ps(__m256(v)));
#elif defined(__SSE__)
  return Vec(_mm_sqrt_ps(__m128(v)));
#elif defined(__aarch64__)
  return Vec(vsqrtq_f32(float32x4_t(v)));
#else
  for (int i = 0; i < kLanes; ++i)
    v[i] = std::sqrt(v[i]);
  return v;
#endif
}

inline DVec load_doubles(const double* p) {
  DVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(double* p, DVec v) {
  std::memcpy(p, &v, sizeof(v));
}

// As above.
inline DVec broadcast(double value) {
  return value - DVec{};
}

inline DVec fma(DVec a, DVec b, DVec c) {
#if defined(__AVX512F__)
  return DVec(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
#elif defined(__FMA__)
  return DVec(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
#elif defined(__aarch64__)
  return DVec(vfmaq_f64(float64x2_t(c), float64x2_t(a), float64x2_t(b)));
#else
  return a * b + c;
#endif
}

// c - a * b
inline DVec fnma(DVec a, DVec b, DVec c) {
  return fma(-a, b, c);
}

// The sums of kDoubles vectors, as one vector.
inline DVec sums_of(const DVec (&v)[kDoubles]) {
  DMask even{}, odd{};
  for (int i = 0; i < kDoubles; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  DVec level[kDoubles];
  for (int i = 0; i < kDoubles; ++i)
    level[i] = v[i];
#pragma GCC unroll 3
  for (int count = kDoubles / 2; count >= 1; count /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const DVec a = level[2 * i], b = level[2 * i + 1];
      level[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  return level[0];
}

inline double sum(DVec v) {
  double total = 0;
  for (int i = 0; i < kDoubles; ++i)
    total += v[i];
  return total;
}

// The arithmetic of elementary.h on vectors.
struct Simd {
  using F = Vec;
  using U = UVec;
  using I = IVec;
#if defined(__AVX512F__)
  static constexpr bool kScales = true;
#else
  static constexpr bool kScales = false;
#endif

  static Vec constant(float a) { return broadcast(a); }
  static Vec fma(Vec a, Vec b, Vec c) { return genperf::fma(a, b, c); }
  static Vec sqrt(Vec a) { return genperf::sqrt(a); }
#if defined(__AVX512F__)
  // Of a NaN and a number, the instructions return the second operand.
  static Vec at_least(Vec x, Vec bound) {
    return Vec(_mm512_maskz_max_ps(0xffff, __m512(bound), __m512(x)));
  }
  static Vec at_most(Vec x, Vec bound) {
    return Vec(_mm512_maskz_min_ps(0xffff, __m512(bound), __m512(x)));
  }
  // value * 2^exponent where x is not below the bound, else 0.
  static Vec scaled_where_at_least(Vec x, float bound, Vec value, Vec exponent) {
    return Vec(
        _mm512_maskz_scalef_ps(not_below(x, broadcast(bound)), __m512(value), __m512(exponent)));
  }
#else
  static Vec at_least(Vec x, Vec bound) { return x < bound ? bound : x; }
  static Vec at_most(Vec x, Vec bound) { return x > bound ? bound : x; }
#endif
  template <class M>
  static Vec select(M mask, Vec yes, Vec no) {
    return mask ? yes : no;
  }
  static Vec from_int(IVec a) { return __builtin_convertvector(a, Vec); }
  static UVec bits(Vec a) { return UVec(a); }
  static Vec from_bits(UVec a) { return Vec(a); }
};

// Arithmetic of philox() on 64-bit lanes whose lower half holds the word. Products then come as
// pairs, without shuffles between the rounds.
struct SimdPairs {
  using U = uint64_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

  static U product(U a, uint32_t b) {
#if defined(__AVX512F__)
    // The masked form avoids a GCC warning about the undefined operand of the plain one.
    return U(_mm512_maskz_mul_epu32(0xff, __m512i(a), _mm512_set1_epi32(int(b))));
#elif defined(__AVX2__)
    return U(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi32(int(b))));
#elif defined(__SSE2__)
    return U(_mm_mul_epu32(__m128i(a), _mm_set1_epi32(int(b))));
#elif defined(__aarch64__)
    return U(vmull_u32(vmovn_u64(uint64x2_t(a)), vdup_n_u32(b)));
#else
    return (a & 0xffffffffu) * uint64_t{b};
#endif
  }
};

}  // namespace genperf
