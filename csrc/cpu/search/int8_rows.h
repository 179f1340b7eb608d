// SPDX-License-Identifier: Apache-2.0
//
// Rows of components in 8 bits: row = scale * q + rest with q = -127 ... 127.
#pragma once

#include "cpu/common/simd.h"
#include "cpu/common/vector_rows.h"

namespace genperf {

#if defined(__AVX512F__)

struct Int8Row {
  float scale;
  float rest;  // |rest|^2
};

// sum += products of unsigned and signed bytes, four to a lane. GCC copies registers around the
// intrinsic, which also needs its instruction set for the whole function.
inline void multiply_add(IVec& sum, IVec unsigned_bytes, IVec signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

inline IVec load_bytes(const void* p) {
  IVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Rounds a row, which is padded with zeros to full vectors, to `q`, which is padded in the same
// way. A row with NaN or infinity gives a `rest` that is not finite.
inline Int8Row round_to_int8(const float* row, int64_t dim, int8_t* q) {
  UVec largest{};  // the bits of magnitudes are ordered like the magnitudes
  for (int64_t d = 0; d < dim; d += kLanes) {
    const UVec magnitude = UVec(load(row + d)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float most = genperf::largest(Vec(largest));
  Int8Row result{most / 127, 0};
  const Vec inverse = broadcast(most > 0x1p-100f ? 127 / most : 0), scale = broadcast(result.scale);
  Vec squares{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec value = load(row + d);
    const __m512i rounded = _mm512_maskz_cvtps_epi32(0xffff, __m512(value * inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + d),
                     _mm512_maskz_cvtsepi32_epi8(0xffff, rounded));
    const Vec rest = fma(-scale, __builtin_convertvector(IVec(rounded), Vec), value);
    squares = fma(rest, rest, squares);
  }
  result.rest = float(Pack<float>::total(squares));
  return result;
}

#endif

}  // namespace genperf
