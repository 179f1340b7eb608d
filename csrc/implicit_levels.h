// SPDX-License-Identifier: Apache-2.0
//
// Finite scalar and lookup-free quantization of one element, from one source for the threads of the
// CUDA kernels and the vectors of the CPU kernels, so that both give the same codes. The template
// parameter A is that of elementary.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"

namespace genperf {

constexpr int kMaxChannels = 64;

// The grid of one channel. Digits 0 ... top represent the values (digit - middle) / divisor.
struct ChannelGrid {
  float shift, half, offset;  // the digit is round(tanh(x + shift) * half - offset) + middle
  float middle, divisor, top;
  float slope;    // of the value, for tanh with slope 1
  int64_t basis;  // weight of the digit in the index
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

// Division by a number. CUDA multiplies by the inverse and corrects the product by its remainder,
// as its own division does where nothing underflows or overflows, and without the check for that.
// Then the quotient is rounded correctly (Markstein, "Computation of elementary functions on the
// IBM RISC System/6000 processor", 1990).
template <class A>
struct Divisor {
  typename A::F value;

  GENPERF_DEVICE Divisor(typename A::F value_) : value(value_) {}
  GENPERF_DEVICE Divisor(typename A::F value_, typename A::F) : value(value_) {}
  GENPERF_DEVICE typename A::F divide(typename A::F a) const { return a / value; }
};

GENPERF_DEVICE float corrected_quotient(float a, float divisor, float inverse) {
  const float quotient = a * inverse;
  return Scalar::fma(inverse, Scalar::fma(-divisor, quotient, a), quotient);
}

#if defined(__CUDA_ARCH__)
template <>
struct Divisor<Scalar> {
  float value, inverse;

  GENPERF_DEVICE Divisor(float value_) : value(value_) {
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(value));
    inverse = Scalar::fma(estimate, Scalar::fma(-value, estimate, 1.0f), estimate);
  }
  GENPERF_DEVICE Divisor(float value_, float inverse_) : value(value_), inverse(inverse_) {}
  GENPERF_DEVICE float divide(float a) const { return corrected_quotient(a, value, inverse); }
};
#endif

// tanh and its derivative for |x| up to 40, constant beyond. NaN is kept.
template <class A>
struct Tanh {
  using F = typename A::F;
  F magnitude, slope;
  typename A::U sign;

  GENPERF_DEVICE explicit Tanh(F x) : sign(A::bits(x) & 0x80000000u) {
    F a = A::from_bits(A::bits(x) & 0x7fffffffu);
    a = A::at_most(a, A::constant(40.0f));
    const F e = ExpParts<A, true>(a + a).expm1();
    const Divisor<A> divisor(e + 2.0f);
    magnitude = divisor.divide(e);
    slope = divisor.divide(4.0f * divisor.divide(e + 1.0f));
  }

  GENPERF_DEVICE F value() const { return A::from_bits(A::bits(magnitude) | sign); }
};

// Rounds to nearest even, for |x| below 2^22.
template <class A>
GENPERF_DEVICE typename A::F round_to_integer(typename A::F x) {
  return (x + 12582912.0f) - 12582912.0f;
}

template <class A>
GENPERF_DEVICE typename A::F between(typename A::F x, typename A::F low, typename A::F high) {
  return A::at_most(A::at_least(x, low), high);
}

// The constants of a ChannelGrid as numbers of A.
template <class A>
struct GridConstants {
  typename A::F shift, half, offset, middle;
  Divisor<A> divisor;
  typename A::F top;
};

template <class A>
struct Coded {
  typename A::F value, digit;
};

// NaN gives digit 0 and the value NaN.
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
    const F level = grid.half * (bounded + 1.0f) * 0.5f + 0.5f;
    const F rounded = round_to_integer<A>(level);
    digit = rounded > level ? rounded - 1.0f : rounded;
  } else {
    digit = round_to_integer<A>(A::fma(bounded, grid.half, A::constant(0.0f) - grid.offset)) +
            grid.middle;
  }
  digit = between<A>(digit, A::constant(0.0f), grid.top);
  const F value = grid.divisor.divide(digit - grid.middle);
  return {value, digit == digit ? digit : A::constant(0.0f)};
}

template <class A>
GENPERF_DEVICE Coded<A> quantize_sign(typename A::F x, float scale) {
  using F = typename A::F;
  const F positive = A::constant(scale), negative = A::constant(-scale);
  const F value = x > 0.0f ? positive : negative;
  return {x == x ? value : x, x > 0.0f ? A::constant(1.0f) : A::constant(0.0f)};
}

// The derivative of a channel's value without the rounding.
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
