// SPDX-License-Identifier: Apache-2.0
//
// Gathers the codes with the squared error, and computes the gradient of the input. Channels-first
// data are read and written component by component, many positions at a time, and the codes are
// transposed for them. The error is summed in float64 over chunks that do not depend on the number
// of threads, so it is the same in every run.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/outputs.h"
#include "cpu/common/planes.h"
#include "cpu/common/positions.h"
#include "cpu/common/vector_rows.h"

namespace genperf {
namespace {

constexpr int64_t kChunk = 1024;  // positions per partial sum

// Copies a code to `out` and returns its squared distance to x; all are contiguous.
template <class T, class C>
double copy_code(const T* x, const C* code, int64_t dim, T* out) {
  constexpr int kSums = 16;  // independent sums, so that the compiler can vectorize
  double sums[kSums] = {};
  const auto add = [&](int64_t d, int i) {
    const C value = code[d];
    out[d] = T(value);
    const double difference = double(OpMath<T>(x[d]) - OpMath<T>(value));
    sums[i] += difference * difference;
  };
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums)
    for (int i = 0; i < kSums; ++i)
      add(d + i, i);
  for (; d < dim; ++d)
    add(d, 0);
  double total = 0;
  for (double sum : sums)
    total += sum;
  return total;
}

// The same for a tile of vectors with any strides. A null code gives zeros.
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
          codes[lane] ? double(OpMath<T>(x[lane][d * stride]) - OpMath<T>(value)) : 0.0;
      total += difference * difference;
    }
  return total;
}

// Pointers to the codes of `count` <= kLanes positions, null for negative indices. Returns a mask
// of the others.
template <class C>
IVec codes_of(const Codes<C>& codebook, const int64_t* indices, int count, const C** codes) {
  IVec known{};
  for (int lane = 0; lane < count; ++lane) {
    const int64_t k = indices[lane];
    codes[lane] = k < 0 ? nullptr : codebook.data + k * codebook.code_stride;
    known[lane] = k < 0 ? 0 : -1;
  }
  return known;
}

// Copies the codes of positions first ... last - 1, and returns their squared distance to x. Both
// are in_planes().
template <class T, class C>
double copy_codes_to_planes(const Positions<T>& x,
                            const Codes<C>& codebook,
                            const int64_t* indices,
                            int64_t first,
                            int64_t last,
                            const Positions<T>& out) {
  using Half = float __attribute__((vector_size(kDoubles * sizeof(float))));
  DVec sums[2] = {};
  x.for_each_run(first, last, kLanes, [&](int64_t position, int count, int64_t o, int64_t i) {
    const C* codes[kLanes];
    const IVec known = codes_of(codebook, indices + position, count, codes);
    DVec low = sums[0], high = sums[1];
    for (int64_t d = 0; d < x.dim; d += kLanes) {
      const T* const in = x.at(o, i) + d * x.stride;
      T* const to = out.at(o, i) + d * out.stride;
      const int n = int(std::min<int64_t>(kLanes, x.dim - d));
      Vec code[kLanes];
      get_components(codes, count, d, n, code);
      for (int c = 0; c < n; ++c) {
        const Vec difference = known ? get_lanes(in + c * x.stride, count) - code[c] : Vec{};
        Half halves[2];
        std::memcpy(halves, &difference, sizeof(difference));
        const DVec a = __builtin_convertvector(halves[0], DVec),
                   b = __builtin_convertvector(halves[1], DVec);
        low += a * a;
        high += b * b;
        set_lanes(to + c * out.stride, count, code[c]);
      }
    }
    sums[0] = low;
    sums[1] = high;
  });
  return sum(sums[0]) + sum(sums[1]);
}

template <class T, class C>
void quantize(const Positions<T>& x,
              const Codes<C>& codebook,
              const int64_t* indices,
              const Positions<T>& out,
              double* errors,
              int64_t* valid) {
  const bool contiguous = x.stride == 1 && out.stride == 1 && codebook.stride == 1;
  const bool planes = in_planes(x) && in_planes(out) && codebook.stride == 1;
  const int64_t chunks = (x.count() + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(x.count(), (chunk + 1) * kChunk);
      double error = 0;
      int64_t found = 0;
      if constexpr (!std::is_same_v<T, double>)
        if (planes) {
          errors[chunk] = copy_codes_to_planes(x, codebook, indices, chunk * kChunk, last, out);
          valid[chunk] = std::count_if(indices + chunk * kChunk, indices + last,
                                       [](int64_t k) { return k >= 0; });
          continue;
        }
      for (int64_t first = chunk * kChunk; first < last; first += kRows) {
        const int count = int(std::min<int64_t>(kRows, last - first));
        const T* in[kRows];
        T* to[kRows];
        const C* code[kRows];
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

// The straight-through gradient at positions first ... last - 1. x and `out` are in_planes(); the
// gradient has an inner stride of 1, or 0 as an expanded tensor.
template <class T, class C>
void quantize_planes_backward(const Positions<T>* gradient,
                              const Positions<T>& x,
                              const Codes<C>& codebook,
                              const int64_t* indices,
                              int64_t first,
                              int64_t last,
                              float commitment_scale,
                              const Positions<T>& out) {
  x.for_each_run(first, last, kLanes, [&](int64_t position, int count, int64_t o, int64_t i) {
    const C* codes[kLanes];
    const IVec known = codes_of(codebook, indices + position, count, codes);
    const Vec scale = broadcast(commitment_scale);
    for (int64_t d = 0; d < x.dim; d += kLanes) {
      const T* const in = x.at(o, i) + d * x.stride;
      const T* const from = gradient ? gradient->at(o, i) + d * gradient->stride : nullptr;
      T* const to = out.at(o, i) + d * out.stride;
      const int n = int(std::min<int64_t>(kLanes, x.dim - d));
      Vec code[kLanes];
      get_components(codes, count, d, n, code);
      for (int c = 0; c < n; ++c) {
        Vec value = scale * (get_lanes(in + c * x.stride, count) - code[c]);
        if (gradient) {
          const T* const p = from + c * gradient->stride;
          value += gradient->inner_stride == 0 ? broadcast(float(*p)) : get_lanes(p, count);
        }
        set_lanes(to + c * out.stride, count, known ? value : Vec{});
      }
    }
  });
}

template <class T, class C>
void quantize_backward(const Positions<T>* gradient,
                       const Positions<T>& x,
                       const Codes<C>& codebook,
                       const int64_t* indices,
                       OpMath<T> commitment_scale,
                       bool rotate,
                       const Positions<T>& out) {
  using W = OpMath<T>;
  using P = Pack<W>;
  const int64_t dim = x.dim;
  if constexpr (std::is_same_v<W, float>)
    if (in_planes(x) && in_planes(out) && (!gradient || (!rotate && gradient->inner_stride <= 1))) {
      torch::stable::parallel_for(0, x.count(), 32 * kRows, [&](int64_t begin, int64_t end) {
        quantize_planes_backward(gradient, x, codebook, indices, begin, end, commitment_scale, out);
      });
      return;
    }
  torch::stable::parallel_for(
      0, (x.count() + kRows - 1) / kRows, 32, [&](int64_t begin, int64_t end) {
        Buffer<W> buffer(3 * kRows * dim);
        W* const to = buffer.get() + 2 * kRows * dim;
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * kRows;
          const int count = int(std::min<int64_t>(kRows, x.count() - first));
          const W *in[kRows], *from[kRows];
          W* rows[kRows];
          Tile(x, first, count).read(buffer.get(), in);
          if (gradient)
            Tile(*gradient, first, count).read(buffer.get() + kRows * dim, from);
          const Tile target(out, first, count);
          target.output_rows(to, rows);
          for (int lane = 0; lane < count; ++lane) {
            const int64_t k = indices[first + lane];
            if (k < 0) {
              std::fill_n(rows[lane], dim, W(0));
              continue;
            }
            const C* const code = codebook.data + k * codebook.code_stride;
            const bool rotated = gradient && rotate;
            const GradientCoefficients<W> coefficients =
                rotated ? rotation(in[lane], code, from[lane], dim) : GradientCoefficients<W>();
            const auto scale = P::constant(commitment_scale),
                       along_gradient = P::constant(coefficients.gradient),
                       along_x = P::constant(coefficients.x),
                       along_code = P::constant(coefficients.code);
            for_each_pack<W>(dim, [&](int64_t d, auto n) {
              const auto a = P::get(in[lane] + d, n), b = P::get(code + d, n);
              auto value = scale * (a - b);
              if (gradient)
                value += along_gradient * P::get(from[lane] + d, n);
              if (rotated)
                value += along_x * a + along_code * b;
              P::set(rows[lane] + d, n, value);
            });
          }
          target.write(to);
        }
      });
}

void set_product(Tensor& scalar, double value, double weight) {
  if (scalar.scalar_type() == ScalarType::Double)
    *static_cast<double*>(scalar.data_ptr()) = value * weight;
  else
    *static_cast<float*>(scalar.data_ptr()) = float(value) * float(weight);
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
                                                   const Tensor& indices,
                                                   double weight) {
  check_positions(x, codebook);
  check_indices(indices, x);
  const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
  check_range(index, indices.numel(), codebook.size(0));
  const Tensor rows = codebook.stride(1) == 1 ? codebook : torch::stable::contiguous(codebook);
  Tensor quantized = output_like(x);
  Tensor loss = torch::stable::new_empty(x, {}, accumulator_type(x));
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const int64_t chunks = (indices.numel() + kChunk - 1) / kChunk;
  std::vector<double> errors(chunks);
  std::vector<int64_t> found(chunks);
  with_types(x, codebook, [&]<class T, class C>(T*, C*) {
    quantize(Positions<T>(x).merged(), Codes<C>(rows), index, Positions<T>(quantized).merged(),
             errors.data(), found.data());
  });
  double error = 0;
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    error += errors[chunk];
    count += found[chunk];
  }
  set_product(loss, count ? error / (double(count) * double(x.size(1))) : 0.0, weight);
  *static_cast<int64_t*>(valid.data_ptr()) = count;
  return {quantized, loss, valid};
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
  const double commitment_scale =
      grad_mse.has_value()
          ? 2 * commitment_weight * get_scalar(*grad_mse) / (double(count) * double(x.size(1)))
          : 0.0;
  const Tensor rows = codebook.stride(1) == 1 ? codebook : torch::stable::contiguous(codebook);
  Tensor grad_x = output_like(x);
  with_types(x, codebook, [&]<class T, class C>(T*, C*) {
    std::optional<Positions<T>> gradient;
    if (grad_quantized.has_value()) {
      check_gradient(*grad_quantized, x);
      gradient.emplace(Positions<T>(*grad_quantized).merged());
    }
    quantize_backward(gradient ? &*gradient : nullptr, Positions<T>(x).merged(), Codes<C>(rows),
                      index, OpMath<T>(commitment_scale), rotation, Positions<T>(grad_x).merged());
  });
  return grad_x;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&genperf::vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&genperf::vector_quantize_backward));
}
