// SPDX-License-Identifier: Apache-2.0
//
// Vectors as rows of contiguous components, for any layout and dtype of the tensor, and the
// arithmetic of the quantizers on rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"

namespace genperf {

constexpr int kRows = 32;  // vectors per tile: two cache lines of floats in channels-first data

// Vectors for arithmetic in W. Components past `count` are read as zero and not written.
template <class W>
struct Pack;

template <>
struct Pack<float> {
  using V = Vec;
  static constexpr int kWidth = kLanes;

  template <class E>
  static V get(const E* p, FullVector) {
    return load(p);
  }
  template <class E>
  static V get(const E* p, int count) {
    return read(p, 1, count);
  }
#if defined(__AVX512F__)
  static V get(const float* p, int count) {
    return V(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
  }
  static void set(float* p, int count, V v) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(v));
  }
#endif
  template <class E>
  static void set(E* p, FullVector, V v) {
    store(p, v);
  }
  template <class E>
  static void set(E* p, int count, V v) {
    write(p, 1, count, v);
  }
  static V constant(float value) { return broadcast(value); }
  static V multiply_add(V a, V b, V c) { return fma(a, b, c); }
  template <int kStep = kLanes / 2>
  static double total(V v) {
    v += __builtin_shuffle(v, lanes([](int lane) { return lane ^ kStep; }));
    if constexpr (kStep > 1)
      return total<kStep / 2>(v);
    return v[0];
  }
};

template <>
struct Pack<double> {
  using V = double;
  static constexpr int kWidth = 1;

  template <class N>
  static V get(const double* p, N) {
    return *p;
  }
  template <class N>
  static void set(double* p, N, V v) {
    *p = v;
  }
  static V constant(double value) { return value; }
  static V multiply_add(V a, V b, V c) { return a * b + c; }
  static double total(V v) { return v; }
};

// Calls f(d, n) for every vector of a row's components; n is a FullVector, or the number of
// remaining components.
template <class W, class F>
inline void for_each_pack(int64_t dim, const F& f) {
  int64_t d = 0;
  for (; d + Pack<W>::kWidth <= dim; d += Pack<W>::kWidth)
    f(d, FullVector{});
  if (d < dim)
    f(d, int(dim - d));
}

// A tile of at most kRows vectors of a tensor, at consecutive or arbitrary positions.
template <class T>
class Tile {
 public:
  using W = OpMath<T>;

  Tile(const Positions<T>& x, int64_t first, int count) : x_(x), count_(count) {
    for (int lane = 0; lane < count; ++lane)
      at_[lane] = x.data + x.offset(first + lane);
  }

  Tile(const Positions<T>& x, const int64_t* offsets, int count) : x_(x), count_(count) {
    for (int lane = 0; lane < count; ++lane)
      at_[lane] = x.data + offsets[lane];
  }

  // Pointers to the vectors as rows: in place if they are rows already, else copied to `buffer`
  // [kRows, D].
  void read(W* buffer, const W** rows) const {
    for (int lane = 0; lane < count_; ++lane)
      rows[lane] = in_place() ? reinterpret_cast<const W*>(at_[lane]) : buffer + lane * x_.dim;
    if (!in_place())
      copy(buffer);
  }

  // Copies the vectors to `rows` [count, D].
  void copy(W* rows) const {
    if (x_.stride == 0) {  // an expanded tensor
      for (int lane = 0; lane < count_; ++lane)
        std::fill_n(rows + lane * x_.dim, x_.dim, W(*at_[lane]));
      return;
    }
    for_each_block([&](T* p, int64_t lane, int64_t d,
                       auto n) { Pack<W>::set(rows + lane * x_.dim + d, n, Pack<W>::get(p, n)); },
                   [&](auto* p, int64_t lane, int64_t d) {
                     Vec block[kLanes];
                     for (int i = 0; i < kLanes; ++i) {
                       block[i] = load(p + i * x_.stride);
                       __builtin_prefetch(p + i * x_.stride + kRows);
                     }
                     transpose(block);
                     for (int i = 0; i < kLanes; ++i)
                       store(reinterpret_cast<float*>(rows) + (lane + i) * x_.dim + d, block[i]);
                   },
                   [&](T* p, int64_t lane, int64_t d) { rows[lane * x_.dim + d] = W(*p); });
  }

  // Pointers to the rows for results: in place, or in `buffer` [kRows, D], from which write()
  // copies them to the tensor.
  void output_rows(W* buffer, W** rows) const {
    for (int lane = 0; lane < count_; ++lane)
      rows[lane] = in_place() ? reinterpret_cast<W*>(at_[lane]) : buffer + lane * x_.dim;
  }

  void write(const W* buffer) const {
    if (in_place())
      return;
    for_each_block([&](T* p, int64_t lane, int64_t d,
                       auto n) { Pack<W>::set(p, n, Pack<W>::get(buffer + lane * x_.dim + d, n)); },
                   [&](auto* p, int64_t lane, int64_t d) {
                     Vec block[kLanes];
                     for (int i = 0; i < kLanes; ++i)
                       block[i] =
                           load(reinterpret_cast<const float*>(buffer) + (lane + i) * x_.dim + d);
                     transpose(block);
                     for (int i = 0; i < kLanes; ++i) {
                       store(p + i * x_.stride, block[i]);
                       __builtin_prefetch(p + i * x_.stride + kRows, 1);
                     }
                   },
                   [&](T* p, int64_t lane, int64_t d) { *p = T(buffer[lane * x_.dim + d]); });
  }

 private:
  bool in_place() const { return std::is_same_v<T, W> && x_.stride == 1; }

  // Covers the tile with calls of along(p, lane, d, n) for contiguous components, square(p, lane,
  // d) for kLanes components of kLanes adjacent vectors, and one(p, lane, d) for single elements; p
  // points into the tensor.
  template <class Along, class Square, class One>
  void for_each_block(const Along& along, const Square& square, const One& one) const {
    if (x_.stride == 1) {
      for (int lane = 0; lane < count_; ++lane)
        for_each_pack<W>(x_.dim, [&](int64_t d, auto n) { along(at_[lane] + d, lane, d, n); });
      return;
    }
    for (int64_t d = 0; d < x_.dim; d += kLanes)
      for (int lane = 0; lane < count_; lane += kLanes) {
        const int64_t last = std::min<int64_t>(x_.dim, d + kLanes);
        const int end = std::min(count_, lane + kLanes);
        if constexpr (std::is_same_v<W, float>)
          if (last - d == kLanes && end - lane == kLanes && x_.inner_stride == 1 &&
              at_[end - 1] - at_[lane] == kLanes - 1) {
            square(at_[lane] + d * x_.stride, lane, d);
            continue;
          }
        for (int64_t c = d; c < last; ++c)
          for (int i = lane; i < end; ++i)
            one(at_[i] + c * x_.stride, i, c);
      }
  }

  const Positions<T>& x_;
  const int count_;
  T* at_[kRows];
};

// The gradient of x is a linear combination of the gradient of the quantized vector, x and the
// code.
template <class W>
struct GradientCoefficients {
  W gradient = 1, x = 0, code = 0;
};

// Coefficients of the rotation trick, from five inner products.
template <class W, class C>
GradientCoefficients<W> rotation(const W* x, const C* code, const W* gradient, int64_t dim) {
  using P = Pack<W>;
  typename P::V xx{}, ee{}, xe{}, gx{}, ge{};
  for_each_pack<W>(dim, [&](int64_t d, auto n) {
    const auto a = P::get(x + d, n), b = P::get(code + d, n), g = P::get(gradient + d, n);
    xx = P::multiply_add(a, a, xx);
    ee = P::multiply_add(b, b, ee);
    xe = P::multiply_add(a, b, xe);
    gx = P::multiply_add(g, a, gx);
    ge = P::multiply_add(g, b, ge);
  });
  const double x_norm = std::sqrt(P::total(xx)), code_norm = std::sqrt(P::total(ee));
  const double per_x = 1 / x_norm, per_code = 1 / code_norm;
  const double half_square = 2 + 2 * P::total(xe) * per_x * per_code;  // |x/|x| + code/|code||^2
  if (!(x_norm > 0 && code_norm > 0 && half_square > 1e-6))
    return {};
  const double along_code = P::total(ge) * per_code;
  const double along_half = 2 * (P::total(gx) * per_x + along_code) / half_square;
  const double ratio = code_norm * per_x;
  return {W(ratio), W(ratio * (2 * along_code - along_half) * per_x),
          W(-ratio * along_half * per_code)};
}

}  // namespace genperf
