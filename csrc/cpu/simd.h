// SPDX-License-Identifier: Apache-2.0
//
// The widest float vector of the instruction set that a file is compiled for.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof(v));
}

inline Vec broadcast(float value) {
  return Vec{} + value;
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

// Bit i is set where lane i of `a` is not below lane i of `b`; a NaN is not below anything.
inline uint32_t not_below(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(__m256(a), __m256(b), _CMP_NLT_UQ));
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpnlt_ps(__m128(a), __m128(b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i)
    mask |= uint32_t(!(a[i] < b[i])) << i;
  return mask;
#endif
}

// The value rounded to bfloat16 (to nearest even), still as a float.
inline Vec round_to_bfloat16(Vec v) {
  const UVec bits = UVec(v);
  return Vec((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

}  // namespace genperf
