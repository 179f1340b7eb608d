// SPDX-License-Identifier: Apache-2.0
//
// Lookup-free quantization: the sign of each channel; backward is the gradient of the
// normalization.
#include "cpu/common/implicit_codes.h"
#include "cpu/common/outputs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace genperf {
namespace {

float code_scale(double scale, bool spherical, const Tensor& x) {
  return float(spherical ? scale / std::sqrt(double(x.size(1))) : scale);
}

std::tuple<Tensor, Tensor> lookup_free_quantize(const Tensor& x, double scale, bool spherical) {
  check_channels(x);
  STD_TORCH_CHECK(x.size(1) < kMaxChannels, "x must have at most 63 channels");
  const float step = code_scale(scale, spherical, x);
  std::vector<int64_t> basis;
  for (int64_t d = x.size(1) - 1; d >= 0; --d)
    basis.push_back(int64_t{1} << d);
  Tensor quantized = output_like(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long);
  with_type(x, [&]<class T>(T*) {
    const auto [in, out] = lines_of<T>(x, quantized);
    quantize(in, out, in.is_contiguous() && out.is_contiguous(), basis,
             static_cast<int64_t*>(indices.data_ptr()),
             [&](int, Vec v) { return quantize_sign<Simd>(v, step); });
  });
  return {quantized, indices};
}

// The gradient through x / |x|, which is orthogonal to x.
template <class T>
void normalize_backward(const Positions<T>& gradient,
                        const Positions<T>& x,
                        double scale,
                        const Positions<T>& out) {
  constexpr double kLeast = 1e-12;  // as in torch.nn.functional.normalize
  const auto one = [&](int64_t position) {
    const T* const a = x.data + x.offset(position);
    const T* const g = gradient.data + gradient.offset(position);
    T* const to = out.data + out.offset(position);
    double square = 0, product = 0;
    for (int64_t d = 0; d < x.dim; ++d) {
      const double value = double(float(a[d * x.stride]));
      square += value * value;
      product += value * double(float(g[d * gradient.stride]));
    }
    const double norm = std::sqrt(square);
    const float factor = float(scale / (norm < kLeast ? kLeast : norm));
    const float along = norm < kLeast ? 0.0f : float(product / square);
    for (int64_t d = 0; d < x.dim; ++d)
      to[d * out.stride] =
          T(factor * (float(g[d * gradient.stride]) - along * float(a[d * x.stride])));
  };
  torch::stable::parallel_for(0, x.count(), std::max<int64_t>(1, kGrain / x.dim),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t position = begin; position < end; ++position)
                                  one(position);
                              });
}

Tensor lookup_free_quantize_backward(const Tensor& grad_quantized, const Tensor& x, double scale) {
  check_channels(x);
  check_gradient(grad_quantized, x);
  Tensor grad_x = output_like(x);
  with_type(x, [&]<class T>(T*) {
    normalize_backward(Positions<T>(grad_quantized), Positions<T>(x), scale, Positions<T>(grad_x));
  });
  return grad_x;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("lookup_free_quantize", TORCH_BOX(&genperf::lookup_free_quantize));
  m.impl("lookup_free_quantize_backward", TORCH_BOX(&genperf::lookup_free_quantize_backward));
}
