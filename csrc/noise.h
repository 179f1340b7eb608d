// SPDX-License-Identifier: Apache-2.0
//
// Random numbers as functions of a 64-bit seed and a position, so that a backward pass draws them
// again and does not read them from memory. One source serves CUDA and the CPU, see elementary.h;
// genperf/ops/_noise.py computes the same numbers in plain PyTorch.
#pragma once

#include "elementary.h"

namespace genperf {

template <class A>
struct Words {
  typename A::U word[4];
};

// The keys of the rounds of Philox.
struct Keys {
  static constexpr int kRounds = 10;
  uint32_t first[kRounds], second[kRounds];

  Keys() = default;
  GENPERF_DEVICE Keys(uint64_t seed) {
    GENPERF_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      first[round] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * 0x9e3779b9u;
      second[round] =
          static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * 0xbb67ae85u;
    }
  }
};

// Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
template <class A, class K>
GENPERF_DEVICE Words<A> philox(Words<A> counter, const K& keys) {
  using U = typename A::U;
  GENPERF_UNROLL
  for (int round = 0; round < Keys::kRounds; ++round) {
    U low0, high0, low1, high1;
    A::multiply(counter.word[0], 0xd2511f53u, low0, high0);
    A::multiply(counter.word[2], 0xcd9e8d57u, low1, high1);
    counter = {{high1 ^ counter.word[1] ^ keys.first[round], low1,
                high0 ^ counter.word[3] ^ keys.second[round], low0}};
  }
  return counter;
}

// The four words of quad number `quad` in the stream of row number `row`.
template <class A>
GENPERF_DEVICE Words<A> random_words(typename A::U quad_low,
                                     typename A::U quad_high,
                                     typename A::U row_low,
                                     typename A::U row_high,
                                     const Keys& keys) {
  return philox<A>({{quad_low, quad_high, row_low, row_high}}, keys);
}

// Uniform on [0, 1), as a multiple of 2^-24.
template <class A>
GENPERF_DEVICE typename A::F uniform(typename A::U word) {
  return A::from_int(typename A::I(word >> 8)) * 0x1p-24f;
}

// -log((word + 1/2) / 2^32), a standard exponential variate, accurate to a few ulp at both ends:
// above 1/2 it is computed from the difference to 1, which is small and therefore not rounded to 0.
template <class A>
GENPERF_DEVICE typename A::F exponential(typename A::U word) {
  using F = typename A::F;
  using I = typename A::I;
  // (word + 1/2) / 2^32, less 1 in the upper half.
  const F signed_part = A::fma(A::from_int(I(word)), A::constant(0x1p-32f), A::constant(0x1p-33f));
  const LogParts<A> parts(A::select(I(word) < 0, signed_part + 1.0f, signed_part));
  // Above sqrt(1/2) the exponent is 0.
  return minus_log_of_parts<A>(parts.exponent,
                               A::select(parts.exponent == 0u, signed_part, parts.f));
}

// Standard Gumbel variate.
template <class A>
GENPERF_DEVICE typename A::F gumbel(typename A::U word) {
  return minus_log<A>(exponential<A>(word));
}

// Two independent standard normal variates by the Box-Muller method, at most 6.8 in magnitude.
template <class A>
GENPERF_DEVICE void normal_pair(typename A::U radius,
                                typename A::U angle,
                                typename A::F& first,
                                typename A::F& second) {
  const typename A::F length = A::sqrt(2.0f * exponential<A>(radius));
  sincos<A>(angle, second, first);
  first = first * length;
  second = second * length;
}

// Four independent standard normal variates from the words.
template <class A>
GENPERF_DEVICE void normals(const Words<A>& words, typename A::F (&values)[4]) {
  normal_pair<A>(words.word[0], words.word[1], values[0], values[1]);
  normal_pair<A>(words.word[2], words.word[3], values[2], values[3]);
}

}  // namespace genperf
