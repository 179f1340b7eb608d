// SPDX-License-Identifier: Apache-2.0
#include "lookup_free_quantize.h"

#include <cmath>

#include "bindings.h"
#include "implicit_levels.h"

namespace genperf {
namespace {

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
  m.impl("lookup_free_quantize", TORCH_BOX(&lookup_free_quantize));
  m.impl("lookup_free_quantize_backward", TORCH_BOX(&lookup_free_quantize_backward));
}

}  // namespace genperf
