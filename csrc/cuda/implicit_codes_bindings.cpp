// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "bindings.h"
#include "implicit_codes.h"

namespace genperf {
namespace {

void check_channels(const char* op, const Tensor& x, int64_t most) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1 && x.size(1) <= most, op,
                  ": x must have shape [outer, D, inner] and at most ", most, " channels.");
}

template <typename Params>
void set_shape(Params& params, const Tensor& x) {
  params.x = x.const_data_ptr();
  params.x_strides = strides_of(x);
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
}

template <typename Params>
void set_levels(const char* op,
                Params& params,
                const std::vector<int64_t>& levels,
                bool symmetric,
                bool hard) {
  STD_TORCH_CHECK(static_cast<int64_t>(levels.size()) == params.channels, op,
                  ": levels must name every channel.");
  for (size_t d = 0; d < levels.size(); ++d) {
    STD_TORCH_CHECK(levels[d] >= 2 && levels[d] <= 1 << 20, op,
                    ": a channel must have 2 to 2^20 levels.");
    params.levels[d] = static_cast<int32_t>(levels[d]);
  }
  params.symmetric = symmetric;
  params.hard = hard;
}

template <typename Params>
Tensor quantized_of(Params& params, const Tensor& x) {
  Tensor quantized = torch::stable::empty_like(x);
  params.quantized = quantized.mutable_data_ptr();
  params.quantized_strides = strides_of(quantized);
  return quantized;
}

template <typename Params>
Tensor gradient_of(const char* op, Params& params, const Tensor& grad_quantized, const Tensor& x) {
  check_like(op, "grad_quantized", grad_quantized, x);
  Tensor grad_x = torch::stable::empty_like(x);
  params.grad_quantized = grad_quantized.const_data_ptr();
  params.grad_quantized_strides = strides_of(grad_quantized);
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_x_strides = strides_of(grad_x);
  return grad_x;
}

std::tuple<Tensor, Tensor> finite_scalar_quantize(Tensor x,
                                                  std::vector<int64_t> levels,
                                                  bool symmetric,
                                                  bool hard,
                                                  bool indexed) {
  constexpr const char* kOp = "finite_scalar_quantize";
  check_channels(kOp, x, kMaxChannels);
  const Launch launch(x);
  FiniteScalarQuantizeParams params{};
  set_shape(params, x);
  set_levels(kOp, params, levels, symmetric, hard);
  Tensor quantized = quantized_of(params, x);
  Tensor indices = indexed ? torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long)
                           : torch::stable::new_empty(x, {0}, ScalarType::Long);
  params.indices = indexed ? mutable_data_of<int64_t>(indices) : nullptr;
  launch_finite_scalar_quantize(params, dtype_of(kOp, x), launch.stream());
  return {quantized, indices};
}

Tensor finite_scalar_quantize_backward(Tensor grad_quantized,
                                       Tensor x,
                                       std::vector<int64_t> levels,
                                       bool symmetric,
                                       bool hard) {
  constexpr const char* kOp = "finite_scalar_quantize_backward";
  check_channels(kOp, x, kMaxChannels);
  const Launch launch(x);
  FiniteScalarQuantizeBackwardParams params{};
  set_shape(params, x);
  set_levels(kOp, params, levels, symmetric, hard);
  Tensor grad_x = gradient_of(kOp, params, grad_quantized, x);
  launch_finite_scalar_quantize_backward(params, dtype_of(kOp, x), launch.stream());
  return grad_x;
}

std::tuple<Tensor, Tensor> lookup_free_quantize(Tensor x, double scale, bool spherical) {
  constexpr const char* kOp = "lookup_free_quantize";
  check_channels(kOp, x, kMaxChannels - 1);
  const Launch launch(x);
  LookupFreeQuantizeParams params{};
  set_shape(params, x);
  const double length = std::sqrt(static_cast<double>(x.size(1)));
  params.size = static_cast<float>(spherical ? scale / length : scale);
  Tensor quantized = quantized_of(params, x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long);
  params.indices = mutable_data_of<int64_t>(indices);
  launch_lookup_free_quantize(params, dtype_of(kOp, x), launch.stream());
  return {quantized, indices};
}

Tensor lookup_free_quantize_backward(Tensor grad_quantized, Tensor x, double scale) {
  constexpr const char* kOp = "lookup_free_quantize_backward";
  check_channels(kOp, x, kMaxChannels - 1);
  const Launch launch(x);
  LookupFreeQuantizeBackwardParams params{};
  set_shape(params, x);
  params.scale = static_cast<float>(scale);
  Tensor grad_x = gradient_of(kOp, params, grad_quantized, x);
  launch_lookup_free_quantize_backward(params, dtype_of(kOp, x), launch.stream());
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("finite_scalar_quantize", TORCH_BOX(&finite_scalar_quantize));
  m.impl("finite_scalar_quantize_backward", TORCH_BOX(&finite_scalar_quantize_backward));
  m.impl("lookup_free_quantize", TORCH_BOX(&lookup_free_quantize));
  m.impl("lookup_free_quantize_backward", TORCH_BOX(&lookup_free_quantize_backward));
}

}  // namespace genperf
