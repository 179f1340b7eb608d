// SPDX-License-Identifier: Apache-2.0
//
// log, exp, sin and cos in float32, from one source for the threads of the CUDA kernels and the
// vectors of the CPU kernels, so that noise is the same on every device: bitwise, if the processor
// has fused multiply-add. The template parameter A is the arithmetic: Scalar here, Simd in
// cpu/common/simd.h. Polynomials are minimax fits of the relative error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GENPERF_DEVICE __device__ __forceinline__
#define GENPERF_UNROLL _Pragma("unroll")
#else
#define GENPERF_UNROLL _Pragma("GCC unroll 16")
#define GENPERF_DEVICE inline __attribute__((always_inline))
#endif

namespace genperf {

struct Scalar {
  using F = float;
  using U = uint32_t;
  using I = int32_t;
  static constexpr bool kScales = false;

  static GENPERF_DEVICE float constant(float a) { return a; }
  static GENPERF_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  // For positive normal numbers, the operations of CUDA's square root without its check for others.
  static GENPERF_DEVICE float sqrt(float a) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
    const float root = a * inverse;
    return ::fmaf(::fmaf(-root, root, a), 0.5f * inverse, root);
#else
    return ::sqrtf(a);
#endif
  }
  // x, but at least or at most a bound. NaN is kept.
  static GENPERF_DEVICE float at_least(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
    return x;
#else
    return x < bound ? bound : x;
#endif
  }
  static GENPERF_DEVICE float at_most(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
    return x;
#else
    return x > bound ? bound : x;
#endif
  }
  static GENPERF_DEVICE float select(bool condition, float yes, float no) {
    return condition ? yes : no;
  }
  static GENPERF_DEVICE float from_int(int32_t a) { return static_cast<float>(a); }
  static GENPERF_DEVICE uint32_t bits(float a) {
    uint32_t result;
    std::memcpy(&result, &a, sizeof(a));
    return result;
  }
  static GENPERF_DEVICE float from_bits(uint32_t a) {
    float result;
    std::memcpy(&result, &a, sizeof(a));
    return result;
  }
  // The low and the high half of the product.
  static GENPERF_DEVICE void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
    const uint64_t product = uint64_t{a} * b;
    low = static_cast<uint32_t>(product);
    high = static_cast<uint32_t>(product >> 32);
  }
};

template <class A, int kCount>
GENPERF_DEVICE typename A::F polynomial(typename A::F x, const float (&descending)[kCount]) {
  typename A::F value = A::constant(descending[0]);
  GENPERF_UNROLL
  for (int i = 1; i < kCount; ++i)
    value = A::fma(value, x, A::constant(descending[i]));
  return value;
}

// x = 2^exponent * (1 + f), for positive, finite, normal x, with 1 + f between sqrt(1/2) and
// sqrt(2).
template <class A>
struct LogParts {
  typename A::U exponent;  // in the bits of the exponent of a float, that is times 2^23
  typename A::F f;

  GENPERF_DEVICE explicit LogParts(typename A::F x)
      : exponent((A::bits(x) - 0x3f3504f3u) & 0xff800000u),
        f(A::from_bits(A::bits(x) - exponent) - 1.0f) {}
};

// -exponent / 2^23 * log(2) - log(1 + f). float32 holds log(2) to 2^-28, so that its product with
// an exponent needs no second part.
template <class A>
GENPERF_DEVICE typename A::F minus_log_of_parts(typename A::U exponent, typename A::F f) {
  const float coefficients[] = {0.0764610618f, -0.127791151f, 0.13164185f,  -0.14199695f,
                                0.166227654f,  -0.200012922f, 0.250008374f, -0.333333313f};
  using F = typename A::F;
  const F tail = A::fma(polynomial<A>(f, coefficients), f, A::constant(0.5f));
  return A::fma(A::from_int(typename A::I(exponent)), A::constant(-0.693147182f * 0x1p-23f),
                A::fma(f * f, tail, -f));
}

// -log(x), for positive, finite, normal x.
template <class A>
GENPERF_DEVICE typename A::F minus_log(typename A::F x) {
  const LogParts<A> parts(x);
  return minus_log_of_parts<A>(parts.exponent, parts.f);
}

// e^x = scale * (1 + rest), where scale is a power of two and rest = e^r - 1 with |r| <= log(2) /
// 2. x must not exceed 88, and is raised to at least -87 unless it is known to be. NaN is kept.
template <class A, bool kAtLeastLowest = false>
struct ExpParts {
  typename A::F scale, rest, whole;  // scale = 2^whole

  GENPERF_DEVICE explicit ExpParts(typename A::F x) {
    using F = typename A::F;
    const float coefficients[] = {0.00138825225f, 0.00836651400f, 0.0416672006f, 0.166665435f,
                                  0.49999997f};
    if constexpr (!kAtLeastLowest)
      x = A::at_least(x, A::constant(-87.0f));
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const F shifted = A::fma(x, A::constant(1.44269504f), A::constant(12582912.0f));
    whole = shifted - 12582912.0f;
    F r = A::fma(whole, A::constant(-0.693359375f), x);
    r = A::fma(whole, A::constant(2.12194440e-4f), r);
    scale = A::from_bits((A::bits(shifted) + 127u) << 23);
    rest = A::fma(polynomial<A>(r, coefficients), r * r, r);
  }

  GENPERF_DEVICE typename A::F exp() const { return A::fma(scale, rest, scale); }
  GENPERF_DEVICE typename A::F expm1() const { return A::fma(scale, rest, scale - 1.0f); }
};

template <class A>
GENPERF_DEVICE typename A::F exp(typename A::F x) {
  return ExpParts<A>(x).exp();
}

// e^x, or exactly 0 if x < -87.
template <class A>
GENPERF_DEVICE typename A::F exp_or_zero(typename A::F x) {
  if constexpr (A::kScales) {
    const ExpParts<A, true> parts(x);
    return A::scaled_where_at_least(x, -87.0f, 1.0f + parts.rest, parts.whole);
  }
  const typename A::F value = exp<A>(x);
  return A::select(x < -87.0f, A::constant(0.0f), value);
}

// e^x - 1 and e^(x/2) from one polynomial, for |x| <= 80. It is the polynomial of e^(r/2), whose
// square is close enough to 1 to be accurate.
template <class A>
struct ExpAndRoot {
  typename A::F expm1, root;

  GENPERF_DEVICE explicit ExpAndRoot(typename A::F x) {
    using F = typename A::F;
    using U = typename A::U;
    using I = typename A::I;
    const float coefficients[] = {0.00833464135f, 0.0417185761f, 0.166666761f, 0.499999613f};
    const F shifted = A::fma(x, A::constant(1.44269504f), A::constant(12582912.0f));
    const F whole = shifted - 12582912.0f;
    F r = A::fma(whole, A::constant(-0.693359375f), x);
    r = A::fma(whole, A::constant(2.12194440e-4f), r) * 0.5f;
    const F p = A::fma(polynomial<A>(r, coefficients), r * r, r);
    const U exponent = A::bits(shifted) - 0x4b400000u;
    const F scale = A::from_bits((exponent + 127u) << 23);
    const F even_root = A::from_bits((U(I(exponent) >> 1) + 127u) << 23);
    const F scale_root = A::select((exponent & 1u) != 0u, even_root * 1.41421356f, even_root);
    expm1 = A::fma(scale, A::fma(p, p, p + p), scale - 1.0f);
    root = A::fma(scale_root, p, scale_root);
  }
};

// sin and cos of 2 pi angle / 2^32.
template <class A>
GENPERF_DEVICE void sincos(typename A::U angle, typename A::F& sin, typename A::F& cos) {
  using F = typename A::F;
  using U = typename A::U;
  const float sin_coefficients[] = {-0.00460162573f, 0.0796800256f, -0.64596343f, 1.57079637f};
  const float cos_coefficients[] = {0.000903356553f, -0.0208599325f, 0.253669173f, -1.23370051f,
                                    1.0f};
  const U quadrant = (angle + 0x20000000u) >> 30;
  const F rest = A::from_int(typename A::I(angle - (quadrant << 30))) * 0x1p-30f;
  const F square = rest * rest;
  const F s = rest * polynomial<A>(square, sin_coefficients);
  const F c = polynomial<A>(square, cos_coefficients);
  const U sin_sign = (quadrant & 2u) << 30;
  const U cos_sign = ((quadrant + 1u) & 2u) << 30;
  const auto swapped = (quadrant & 1u) != 0u;
  sin = A::from_bits(A::bits(A::select(swapped, c, s)) ^ sin_sign);
  cos = A::from_bits(A::bits(A::select(swapped, s, c)) ^ cos_sign);
}

}  // namespace genperf
