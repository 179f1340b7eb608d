// SPDX-License-Identifier: Apache-2.0
//
// Gather of the codes with the squared error, and the gradient of the input. Positions are taken 16
// at a time, so that both layouts are read and written along their contiguous dimension. The error
// is summed in float64 over chunks of positions that do not depend on the number of threads, so it
// is the same in every run.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "positions.h"

namespace genperf {
namespace {

constexpr int kTile = 16;
constexpr int64_t kChunk = 1024;  // positions to a partial sum

// Calls f(lane, d) for every lane < count and every component, along the contiguous dimension
// first.
template <class F>
void for_each_component(bool channels_last, int count, int64_t dim, const F& f) {
  if (channels_last) {
    for (int lane = 0; lane < count; ++lane)
      for (int64_t d = 0; d < dim; ++d)
        f(lane, d);
  } else {
    for (int64_t d = 0; d < dim; ++d)
      for (int lane = 0; lane < count; ++lane)
        f(lane, d);
  }
}

// Copies a code over a vector's place and returns their squared distance; everything contiguous.
template <class T, class C>
double copy_code(const T* x, const C* code, int64_t dim, T* out) {
  constexpr int kSums = 16;  // independent sums, so that the compiler can use vectors
  double sums[kSums] = {};
  const auto take = [&](int64_t d, int i) {
    const C value = code[d];
    out[d] = T(value);
    const double difference = double(Wide<T>(x[d]) - Wide<T>(value));
    sums[i] += difference * difference;
  };
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums)
    for (int i = 0; i < kSums; ++i)
      take(d + i, i);
  for (; d < dim; ++d)
    take(d, 0);
  double total = 0;
  for (double sum : sums)
    total += sum;
  return total;
}

// The same for a tile of vectors with any strides; a null code leaves zeros.
template <class T, class C>
double copy_codes(const T* const* x,
                  int64_t stride,
                  const C* const* codes,
                  int64_t code_stride,
                  int count,
                  int64_t dim,
                  T* const* out,
                  int64_t out_stride) {
  double total = 0;
  for (int64_t d = 0; d < dim; ++d)
    for (int lane = 0; lane < count; ++lane) {
      const C value = codes[lane] ? codes[lane][d * code_stride] : C(0.0f);
      out[lane][d * out_stride] = T(value);
      const double difference =
          codes[lane] ? double(Wide<T>(x[lane][d * stride]) - Wide<T>(value)) : 0.0;
      total += difference * difference;
    }
  return total;
}

template <class T, class C>
void quantize(const Positions<T>& x,
              const Codes<C>& codebook,
              const int64_t* indices,
              const Positions<T>& out,
              double* errors,
              int64_t* valid) {
  const bool contiguous = x.stride == 1 && out.stride == 1 && codebook.stride == 1;
  const int64_t chunks = (x.count() + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(x.count(), (chunk + 1) * kChunk);
      double error = 0;
      int64_t found = 0;
      for (int64_t first = chunk * kChunk; first < last; first += kTile) {
        const int count = int(std::min<int64_t>(kTile, last - first));
        const T* in[kTile];
        T* to[kTile];
        const C* code[kTile];
        for (int lane = 0; lane < count; ++lane) {
          const int64_t k = indices[first + lane];
          in[lane] = x.data + x.offset(first + lane);
          to[lane] = out.data + out.offset(first + lane);
          code[lane] = k < 0 ? nullptr : codebook.data + k * codebook.code_stride;
          found += k >= 0;
        }
        if (!contiguous) {
          error += copy_codes(in, x.stride, code, codebook.stride, count, x.dim, to, out.stride);
          continue;
        }
        for (int lane = 0; lane < count; ++lane)
          if (code[lane])
            error += copy_code(in[lane], code[lane], x.dim, to[lane]);
          else
            std::fill_n(to[lane], x.dim, T(0.0f));
      }
      errors[chunk] = error;
      valid[chunk] = found;
    }
  });
}

// What the gradient of one quantized vector becomes on its way to x; the rotation trick needs five
// inner products.
struct Carry {
  double gradient = 1, x = 0, code = 0;
};

template <class T, class C>
Carry rotation(const T* x,
               int64_t x_stride,
               const C* code,
               int64_t code_stride,
               const T* gradient,
               int64_t gradient_stride,
               int64_t dim) {
  double xx = 0, ee = 0, xe = 0, gx = 0, ge = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double a = double(x[d * x_stride]), b = double(code[d * code_stride]),
                 g = double(gradient[d * gradient_stride]);
    xx += a * a;
    ee += b * b;
    xe += a * b;
    gx += g * a;
    ge += g * b;
  }
  const double x_norm = std::sqrt(xx), code_norm = std::sqrt(ee);
  const double half_square = 2 + 2 * xe / (x_norm * code_norm);  // |x/|x| + code/|code||^2
  if (!(x_norm > 0 && code_norm > 0 && half_square > 1e-6))
    return {};
  const double along_half = 2 * (gx / x_norm + ge / code_norm) / half_square;
  const double ratio = code_norm / x_norm;
  return {ratio, ratio * (2 * ge / code_norm - along_half) / x_norm,
          -ratio * along_half / code_norm};
}

template <class T, class C>
void quantize_backward(const Positions<T>* gradient,
                       const Positions<T>& x,
                       const Codes<C>& codebook,
                       const int64_t* indices,
                       Wide<T> pull,
                       bool rotate,
                       const Positions<T>& out) {
  torch::stable::parallel_for(
      0, (x.count() + kTile - 1) / kTile, 32, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kTile; first < std::min(x.count(), end * kTile);
             first += kTile) {
          const int count = int(std::min<int64_t>(kTile, x.count() - first));
          const T* in[kTile];
          const T* from[kTile];
          T* to[kTile];
          const C* code[kTile];
          Wide<T> carried[kTile], along_x[kTile], along_code[kTile];
          for (int lane = 0; lane < count; ++lane) {
            const int64_t k = indices[first + lane];
            in[lane] = x.data + x.offset(first + lane);
            to[lane] = out.data + out.offset(first + lane);
            from[lane] = gradient ? gradient->data + gradient->offset(first + lane) : nullptr;
            code[lane] = k < 0 ? nullptr : codebook.data + k * codebook.code_stride;
            Carry carry;
            if (rotate && gradient && code[lane])
              carry = rotation(in[lane], x.stride, code[lane], codebook.stride, from[lane],
                               gradient->stride, x.dim);
            carried[lane] = Wide<T>(carry.gradient);
            along_x[lane] = Wide<T>(carry.x);
            along_code[lane] = Wide<T>(carry.code);
          }
          for_each_component(x.channels_last(), count, x.dim, [&](int lane, int64_t d) {
            Wide<T> value = 0;
            if (code[lane]) {
              const Wide<T> a = Wide<T>(in[lane][d * x.stride]),
                            b = Wide<T>(code[lane][d * codebook.stride]);
              value = pull * (a - b);
              if (gradient)
                value += carried[lane] * Wide<T>(from[lane][d * gradient->stride]);
              if (rotate && gradient)
                value += along_x[lane] * a + along_code[lane] * b;
            }
            to[lane][d * out.stride] = T(value);
          });
        }
      });
}

void set_scalar(Tensor& scalar, double value) {
  if (scalar.scalar_type() == ScalarType::Double)
    *static_cast<double*>(scalar.data_ptr()) = value;
  else
    *static_cast<float*>(scalar.data_ptr()) = float(value);
}

double get_scalar(const Tensor& scalar) {
  STD_TORCH_CHECK(scalar.numel() == 1, "grad_mse must hold one value");
  if (scalar.scalar_type() == ScalarType::Double)
    return *static_cast<const double*>(scalar.data_ptr());
  STD_TORCH_CHECK(scalar.scalar_type() == ScalarType::Float, "grad_mse must be float32 or float64");
  return *static_cast<const float*>(scalar.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> vector_quantize(const Tensor& x,
                                                   const Tensor& codebook,
                                                   const Tensor& indices) {
  check_positions(x, codebook);
  check_indices(indices, x);
  const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
  check_range(index, indices.numel(), codebook.size(0));
  Tensor quantized = torch::stable::empty_like(x);
  Tensor mse = torch::stable::new_empty(x, {}, accumulator_type(x));
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const int64_t chunks = (indices.numel() + kChunk - 1) / kChunk;
  std::vector<double> errors(chunks);
  std::vector<int64_t> found(chunks);
  with_types(x, codebook, [&]<class T, class C>(T*, C*) {
    quantize(Positions<T>(x), Codes<C>(codebook), index, Positions<T>(quantized), errors.data(),
             found.data());
  });
  double error = 0;
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    error += errors[chunk];
    count += found[chunk];
  }
  set_scalar(mse, count ? error / (double(count) * double(x.size(1))) : 0.0);
  *static_cast<int64_t*>(valid.data_ptr()) = count;
  return {quantized, mse, valid};
}

Tensor vector_quantize_backward(std::optional<Tensor> grad_quantized,
                                std::optional<Tensor> grad_mse,
                                const Tensor& x,
                                const Tensor& codebook,
                                const Tensor& indices,
                                const Tensor& valid,
                                double commitment_weight,
                                bool rotation) {
  check_positions(x, codebook);
  check_indices(indices, x);
  const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
  check_range(index, indices.numel(), codebook.size(0));
  STD_TORCH_CHECK(valid.scalar_type() == ScalarType::Long && valid.numel() == 1,
                  "valid must be one int64");
  const int64_t count = std::max<int64_t>(*static_cast<const int64_t*>(valid.data_ptr()), 1);
  const double pull = grad_mse.has_value() ? 2 * commitment_weight * get_scalar(*grad_mse) /
                                                 (double(count) * double(x.size(1)))
                                           : 0.0;
  Tensor grad_x = torch::stable::empty_like(x);
  with_types(x, codebook, [&]<class T, class C>(T*, C*) {
    std::optional<Positions<T>> gradient;
    if (grad_quantized.has_value()) {
      STD_TORCH_CHECK(grad_quantized->scalar_type() == x.scalar_type() &&
                          grad_quantized->dim() == 3 && grad_quantized->size(0) == x.size(0) &&
                          grad_quantized->size(1) == x.size(1) &&
                          grad_quantized->size(2) == x.size(2),
                      "grad_quantized must have the shape and dtype of x");
      gradient.emplace(*grad_quantized);
    }
    quantize_backward(gradient ? &*gradient : nullptr, Positions<T>(x), Codes<C>(codebook), index,
                      Wide<T>(pull), rotation, Positions<T>(grad_x));
  });
  return grad_x;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&genperf::vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&genperf::vector_quantize_backward));
}
