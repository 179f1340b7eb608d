// SPDX-License-Identifier: Apache-2.0
//
// Tensor elements of any dtype and stride as float vectors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "cpu/common/simd.h"

namespace genperf {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Loads `count` elements; the rest of the vector is zero.
template <class T>
inline Vec read(const T* p, int64_t stride, int count) {
  Vec v{};
  for (int i = 0; i < count; ++i)
    v[i] = float(p[i * stride]);
  return v;
}

template <class T>
inline void write(T* p, int64_t stride, int count, Vec v) {
  for (int i = 0; i < count; ++i)
    p[i * stride] = T(v[i]);
}

inline Vec load(const BFloat16* p) {
  using Narrow = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  Narrow bits;
  std::memcpy(&bits, p, sizeof(bits));
  return Vec(__builtin_convertvector(bits, UVec) << 16);
}

inline void store(BFloat16* p, Vec v) {
  using Narrow = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  const UVec rounded = v == v ? UVec(round_to_bfloat16(v)) : UVec{} + 0x7fc00000u;
  const Narrow bits = __builtin_convertvector(rounded >> 16, Narrow);
  std::memcpy(p, &bits, sizeof(bits));
}

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return Vec(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return Vec(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->x))));
#else
  return read(p, 1, kLanes);
#endif
}

inline void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->x, vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(v))));
#else
  write(p, 1, kLanes, v);
#endif
}

inline double sum(Vec v) {
  double sums[4] = {};
  for (int i = 0; i < kLanes; ++i)
    sums[i % 4] += v[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Calls f with a null pointer to x's element type.
template <class F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f((float*)nullptr);
    case ScalarType::BFloat16:
      return f((BFloat16*)nullptr);
    case ScalarType::Half:
      return f((Half*)nullptr);
    default:
      STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
  }
}

// The element count of a full vector whose elements are contiguous.
struct FullVector {
  constexpr operator int() const { return kLanes; }
};

// A tensor [B, rows, columns] of T, or of float32 if that flag is set. The data is null if the
// tensor is absent.
template <class T>
struct Rows {
  char* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, stride = 0;
  bool float32 = false;

  Rows() = default;
  explicit Rows(const std::optional<Tensor>& x) {
    if (!x.has_value())
      return;
    data = static_cast<char*>(x->data_ptr());
    batch_stride = x->stride(0);
    row_stride = x->stride(1);
    stride = x->stride(2);
    float32 = x->scalar_type() == ScalarType::Float;
  }

  explicit operator bool() const { return data != nullptr; }

  Rows transposed() const {
    Rows swapped = *this;
    std::swap(swapped.row_stride, swapped.stride);
    return swapped;
  }

  bool vectorizable() const { return !data || stride == 1; }

  // Whether get_expanded() takes full vectors.
  bool vectorizable_expanded() const { return vectorizable() || stride == 0; }

  // The elements of a row, starting at a column.
  Rows at(int64_t sample, int64_t row, int64_t column) const {
    Rows moved = *this;
    if (data)
      moved.data += (sample * batch_stride + row * row_stride + column * stride) *
                    int64_t(float32 ? sizeof(float) : sizeof(T));
    return moved;
  }

  // Elements i ... i + count - 1.
  Vec get(int64_t i, int count) const {
    return float32 ? get_as<float>(i, count) : get_as<T>(i, count);
  }

  void set(int64_t i, int count, Vec v) const {
    if (float32)
      set_as<float>(i, count, v);
    else
      set_as<T>(i, count, v);
  }

  Vec get(int64_t i, FullVector) const {
    return std::is_same_v<T, float> || float32 ? load(reinterpret_cast<const float*>(data) + i)
                                               : load(reinterpret_cast<const T*>(data) + i);
  }

  // get() of a tensor that may be expanded along its columns, such as the gradient of a sum.
  template <class N>
  Vec get_expanded(int64_t i, N n) const {
    return stride == 0 && n == kLanes ? broadcast(get(0, 1)[0]) : get(i, n);
  }

  void set(int64_t i, FullVector, Vec v) const {
    if (std::is_same_v<T, float> || float32)
      store(reinterpret_cast<float*>(data) + i, v);
    else
      store(reinterpret_cast<T*>(data) + i, v);
  }

 private:
  template <class E>
  Vec get_as(int64_t i, int count) const {
    const E* p = reinterpret_cast<const E*>(data) + i * stride;
    return stride == 1 && count == kLanes ? load(p) : read(p, stride, count);
  }

  template <class E>
  void set_as(int64_t i, int count, Vec v) const {
    E* p = reinterpret_cast<E*>(data) + i * stride;
    if (stride == 1 && count == kLanes)
      store(p, v);
    else
      write(p, stride, count, v);
  }
};

// Calls f(i, n) for every vector of `count` elements. n is a FullVector if all tensors are
// vectorizable, else an int.
template <class F>
inline void for_each_vector(int64_t count, bool vectorizable, const F& f) {
  int64_t i = 0;
  if (vectorizable)
    for (; i + kLanes <= count; i += kLanes)
      f(i, FullVector{});
  for (; i < count; i += kLanes)
    f(i, int(count - i < kLanes ? count - i : kLanes));
}

inline void check_rows(const Tensor& x, const Tensor& like, bool same_type, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                      x.size(2) == like.size(2),
                  name, " must be [B, rows, columns], of one shape with the rest");
  STD_TORCH_CHECK(
      x.scalar_type() == like.scalar_type() || (!same_type && x.scalar_type() == ScalarType::Float),
      name, " has the wrong dtype");
}

}  // namespace genperf
