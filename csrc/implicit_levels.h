// SPDX-License-Identifier: Apache-2.0
//
// Codes without a codebook: one source for the threads of the CUDA kernels and the vectors of the
// CPU kernels, so that both choose the same codes. The template parameter A is that of
// elementary.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"

namespace genperf {

constexpr int kMaxChannels = 64;

// The grid of one channel. Digits 0 ... top stand for the values (digit - middle) / divisor.
struct ChannelGrid {
  float shift, half, offset;  // the digit is round(tanh(x + shift) * half - offset) + middle
  float middle, divisor, top;
  float slope;    // of the value, for a tanh of slope 1
  int64_t basis;  // what the digit counts in the index
};

inline ChannelGrid channel_grid(int64_t levels, bool symmetric, bool hard, int64_t basis) {
  const double top = double(levels - 1);
  if (symmetric)
    return {0.0f, float(top), 0.0f, float(top / 2), float(top / 2), float(top), 1.0f, basis};
  const double half = top * 1.001 / 2, offset = levels % 2 ? 0.0 : 0.5, width = double(levels / 2);
  const double shift = hard ? offset / half : std::atanh(offset / half);
  return {float(shift), float(half), float(offset),       float(width),
          float(width), float(top),  float(half / width), basis};
}

// Both for |x| up to 40, and as there beyond. NaN stays.
template <class A>
struct Tanh {
  using F = typename A::F;
  F magnitude, slope;
  typename A::U sign;

  GENPERF_DEVICE explicit Tanh(F x) : sign(A::bits(x) & 0x80000000u) {
    F a = A::from_bits(A::bits(x) & 0x7fffffffu);
    a = a > 40.0f ? A::constant(40.0f) : a;
    const F e = ExpParts<A>(a + a).expm1();
    magnitude = e / (e + 2.0f);
    slope = 4.0f * ((e + 1.0f) / (e + 2.0f)) / (e + 2.0f);
  }

  GENPERF_DEVICE F value() const { return A::from_bits(A::bits(magnitude) | sign); }
};

// To nearest even, for |x| below 2^22.
template <class A>
GENPERF_DEVICE typename A::F round_to_whole(typename A::F x) {
  return (x + 12582912.0f) - 12582912.0f;
}

template <class A>
GENPERF_DEVICE typename A::F between(typename A::F x, typename A::F low, typename A::F high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// The constants of a Level as numbers of A.
template <class A>
struct GridConstants {
  typename A::F shift, half, offset, middle, divisor, top;
};

template <class A>
struct Coded {
  typename A::F value, digit;
};

// NaN becomes digit 0 with the value NaN.
template <class A>
GENPERF_DEVICE Coded<A> quantize_channel(typename A::F x,
                                         const GridConstants<A>& grid,
                                         bool symmetric,
                                         bool hard) {
  using F = typename A::F;
  x = x + grid.shift;
  const F bounded =
      hard ? between<A>(x, A::constant(-1.0f), A::constant(1.0f)) : Tanh<A>(x).value();
  F digit;
  if (symmetric) {
    const F place = grid.half * (bounded + 1.0f) * 0.5f + 0.5f;
    const F nearest = round_to_whole<A>(place);
    digit = nearest > place ? nearest - 1.0f : nearest;
  } else {
    digit = round_to_whole<A>(A::fma(bounded, grid.half, A::constant(0.0f) - grid.offset)) +
            grid.middle;
  }
  digit = between<A>(digit, A::constant(0.0f), grid.top);
  const F value = (digit - grid.middle) / grid.divisor;
  return {value, digit == digit ? digit : A::constant(0.0f)};
}

template <class A>
GENPERF_DEVICE Coded<A> quantize_sign(typename A::F x, float scale) {
  using F = typename A::F;
  const F positive = A::constant(scale), negative = A::constant(-scale);
  const F value = x > 0.0f ? positive : negative;
  return {x == x ? value : x, x > 0.0f ? A::constant(1.0f) : A::constant(0.0f)};
}

// The derivative of a channel's value, the rounding left out.
template <class A>
GENPERF_DEVICE typename A::F channel_slope(typename A::F x,
                                           typename A::F shift,
                                           typename A::F slope,
                                           bool hard) {
  using F = typename A::F;
  x = x + shift;
  if (!hard)
    return Tanh<A>(x).slope * slope;
  const F inside = x >= -1.0f ? slope : A::constant(0.0f);
  return x <= 1.0f ? inside : A::constant(0.0f);
}

}  // namespace genperf
