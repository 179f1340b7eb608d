// SPDX-License-Identifier: Apache-2.0
//
// Tensors as vectors at positions, with a constant stride between the components of a vector; and a
// codebook as codes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

namespace genperf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [outer, D, inner], any strides.
template <class T>
struct Positions {
  T* data;
  int64_t outer, dim, inner;
  int64_t outer_stride, stride, inner_stride;

  explicit Positions(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())),
        outer(x.size(0)),
        dim(x.size(1)),
        inner(x.size(2)),
        outer_stride(x.stride(0)),
        stride(x.stride(1)),
        inner_stride(x.stride(2)) {}

  // Contiguous rows [count, dim].
  Positions(T* rows, int64_t count, int64_t dim)
      : data(rows),
        outer(count),
        dim(dim),
        inner(1),
        outer_stride(dim),
        stride(1),
        inner_stride(1) {}

  int64_t count() const { return outer * inner; }

  int64_t offset(int64_t position) const {
    return position / inner * outer_stride + position % inner * inner_stride;
  }

  // Whether the components of a vector are contiguous.
  bool channels_last() const { return stride == 1; }

  // The same vectors, with those of adjacent positions in one row where a row holds only one.
  Positions merged() const {
    Positions x = *this;
    if (inner == 1) {
      std::swap(x.outer, x.inner);
      std::swap(x.outer_stride, x.inner_stride);
    }
    return x;
  }

  T* at(int64_t o, int64_t i) const { return data + o * outer_stride + i * inner_stride; }

  // Calls f(position, count, o, i) for positions first ... last - 1, at most `limit` of one row o
  // at a time.
  template <class F>
  void for_each_run(int64_t first, int64_t last, int64_t limit, const F& f) const {
    int64_t o = first / std::max<int64_t>(inner, 1), i = first - o * inner;
    while (first < last) {
      const int64_t count = std::min({limit, last - first, inner - i});
      f(first, int(count), o, i);
      first += count;
      i += count;
      if (i == inner) {
        i = 0;
        ++o;
      }
    }
  }
};

// [K, D], any strides.
template <class T>
struct Codes {
  T* data;
  int64_t count, dim;
  int64_t code_stride, stride;

  explicit Codes(const Tensor& codebook)
      : data(static_cast<T*>(codebook.data_ptr())),
        count(codebook.size(0)),
        dim(codebook.size(1)),
        code_stride(codebook.stride(0)),
        stride(codebook.stride(1)) {}
};

// The dtype of arithmetic on values of T.
template <class T>
using OpMath = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with null pointers to the element types of x and the codebook.
template <class F>
auto with_types(const Tensor& x, const Tensor& codebook, const F& f) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const ScalarType a = x.scalar_type(), b = codebook.scalar_type();
  if (a == ScalarType::Float && b == ScalarType::Float)
    return f((float*)nullptr, (float*)nullptr);
  if (a == ScalarType::Double && b == ScalarType::Double)
    return f((double*)nullptr, (double*)nullptr);
  if (a == ScalarType::BFloat16 && b == ScalarType::BFloat16)
    return f((BFloat16*)nullptr, (BFloat16*)nullptr);
  if (a == ScalarType::BFloat16 && b == ScalarType::Float)
    return f((BFloat16*)nullptr, (float*)nullptr);
  if (a == ScalarType::Half && b == ScalarType::Half)
    return f((Half*)nullptr, (Half*)nullptr);
  if (a == ScalarType::Half && b == ScalarType::Float)
    return f((Half*)nullptr, (float*)nullptr);
  STD_TORCH_CHECK(false, "unsupported pair of dtypes for x and codebook");
}

// The dtype of losses and sums for an input of x's dtype.
inline ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialized memory, aligned to cache lines.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_)
      throw std::bad_alloc();
  }

  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

inline void check_positions(const Tensor& x, const Tensor& codebook) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(codebook.dim() == 2 && codebook.numel() > 0 && codebook.size(1) == x.size(1),
                  "codebook must be [K, D] with the D of x");
}

inline void check_indices(const Tensor& indices, const Tensor& x) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 2 &&
                      indices.size(0) == x.size(0) && indices.size(1) == x.size(2) &&
                      indices.is_contiguous(),
                  "indices must be contiguous int64 [outer, inner]");
}

inline void check_range(const int64_t* indices, int64_t count, int64_t num_codes) {
  uint64_t largest = 0;  // of index + 1
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, uint64_t(indices[i]) + 1);
  STD_TORCH_CHECK(largest <= uint64_t(num_codes), "indices must be in -1 ... ", num_codes - 1);
}

inline void check_gradient(const Tensor& gradient, const Tensor& x) {
  STD_TORCH_CHECK(gradient.scalar_type() == x.scalar_type() && gradient.dim() == 3 &&
                      gradient.size(0) == x.size(0) && gradient.size(1) == x.size(1) &&
                      gradient.size(2) == x.size(2),
                  "grad_quantized must have the shape and dtype of x");
}

}  // namespace genperf
