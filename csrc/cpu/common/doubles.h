// SPDX-License-Identifier: Apache-2.0
//
// The widest double vector of the instruction set that a file is compiled for.
#pragma once

#include "cpu/common/simd.h"

namespace genperf {

constexpr int kDoubles = kLanes / 2;

using DVec = double __attribute__((vector_size(kDoubles * sizeof(double))));
using DBits = uint64_t __attribute__((vector_size(kDoubles * sizeof(uint64_t))));
using DMask = int64_t __attribute__((vector_size(kDoubles * sizeof(int64_t))));

inline DVec load_doubles(const double* p) {
  DVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(double* p, DVec v) {
  std::memcpy(p, &v, sizeof(v));
}

// x - 0 is x for every x, which x + 0 is not, and costs nothing.
inline DVec broadcast(double value) {
  return value - DVec{};
}

inline DVec fma(DVec a, DVec b, DVec c) {
#if defined(__AVX512F__)
  return DVec(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
#elif defined(__FMA__)
  return DVec(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
#else
  return a * b + c;
#endif
}

// c - a * b
inline DVec fnma(DVec a, DVec b, DVec c) {
  return fma(-a, b, c);
}

// Sums of each of kDoubles vectors, as one vector.
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

}  // namespace genperf
