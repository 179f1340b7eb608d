// SPDX-License-Identifier: Apache-2.0
//
// Several vectors side by side, as one value of the arithmetic of elementary.h. The operations of a
// chain depend on each other, and a processor looks only a few chains ahead, so instructions of
// several chains have to stand next to each other.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/common/simd.h"

namespace genperf {

template <class V, int N>
struct Several {
  V at[N];

  Several() = default;

  // f(0), f(1), ...
  template <class F, int... I>
  [[gnu::always_inline]] Several(const F& f, std::integer_sequence<int, I...>) : at{f(I)...} {}

  // Casts between types of elements of one size.
  template <class W>
  [[gnu::always_inline]] explicit Several(const Several<W, N>& other)
      : Several([&](int i) __attribute__((always_inline)) { return V(other.at[i]); },
                std::make_integer_sequence<int, N>()) {}
};

template <int N, class F>
[[gnu::always_inline]] inline auto several(const F& f) {
  return Several<std::decay_t<decltype(f(0))>, N>(f, std::make_integer_sequence<int, N>());
}

template <class X>
struct CountOf : std::integral_constant<int, 0> {};
template <class V, int N>
struct CountOf<Several<V, N>> : std::integral_constant<int, N> {};

// The value of vector i of x; a vector or number that is no Several is the same for all.
template <class X>
[[gnu::always_inline]] inline auto value_at(const X& x, int i) {
  if constexpr (CountOf<X>::value > 0)
    return x.at[i];
  else
    return x;
}

// f of each vector of the arguments.
template <class F, class... X>
[[gnu::always_inline]] inline auto each(const F& f, const X&... x) {
  constexpr int kCount = std::max({CountOf<X>::value...});
  return several<kCount>([&](int i)
                             __attribute__((always_inline)) { return f(value_at(x, i)...); });
}

template <class... X>
concept AnySeveral = ((CountOf<X>::value > 0) || ...);

#define GENPERF_EACH(op)                                                                     \
  template <class X, class Y>                                                                \
    requires AnySeveral<X, Y>                                                                \
  [[gnu::always_inline]] inline auto operator op(const X& x, const Y& y) {                   \
    return each([](auto a, auto b) __attribute__((always_inline)) { return a op b; }, x, y); \
  }
GENPERF_EACH(+)
GENPERF_EACH(-)
GENPERF_EACH(*)
GENPERF_EACH(&)
GENPERF_EACH(|)
GENPERF_EACH(^)
GENPERF_EACH(<<)
GENPERF_EACH(>>)
GENPERF_EACH(<)
GENPERF_EACH(==)
GENPERF_EACH(!=)
#undef GENPERF_EACH

template <class V, int N>
[[gnu::always_inline]] inline auto operator-(const Several<V, N>& x) {
  return each([](V a) __attribute__((always_inline)) { return -a; }, x);
}

// The vectors of x, then those of y.
template <class V, int N, int M>
[[gnu::always_inline]] inline Several<V, N + M> joined(const Several<V, N>& x,
                                                       const Several<V, M>& y) {
  return several<N + M>(
      [&](int i) __attribute__((always_inline)) { return i < N ? x.at[i] : y.at[i - N]; });
}

// Simd on N vectors.
template <int N>
struct SeveralSimd {
  using F = Several<Vec, N>;
  using U = Several<UVec, N>;
  using I = Several<IVec, N>;
  static constexpr bool kScales = Simd::kScales;

  static F constant(float a) {
    return several<N>([&](int) { return broadcast(a); });
  }
  static F fma(const F& a, const F& b, const F& c) { return each(Simd::fma, a, b, c); }
  static F sqrt(const F& a) { return each(Simd::sqrt, a); }
  static F at_least(const F& x, const F& bound) { return each(Simd::at_least, x, bound); }
  static F at_most(const F& x, const F& bound) { return each(Simd::at_most, x, bound); }
  template <class S = Simd>
  static F scaled_where_at_least(const F& x, float bound, const F& value, const F& exponent) {
    return each([&](auto... v) { return S::scaled_where_at_least(v...); }, x, bound, value,
                exponent);
  }
  static F from_int(const I& a) { return each(Simd::from_int, a); }
  static U bits(const F& a) { return U(a); }
  static F from_bits(const U& a) { return F(a); }
  template <class M>
  static F select(const M& mask, const F& yes, const F& no) {
    return each(Simd::select<IVec>, mask, yes, no);
  }
};

// SimdPairs on N vectors.
template <int N>
struct SeveralPairs {
  using U = Several<SimdPairs::U, N>;

  static void multiply(const U& a, uint32_t b, U& low, U& high) {
    low = each([&](SimdPairs::U x) { return SimdPairs::product(x, b); }, a);
    high = low >> 32;
  }
};

}  // namespace genperf
