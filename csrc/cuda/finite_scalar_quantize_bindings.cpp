// SPDX-License-Identifier: Apache-2.0
#include "finite_scalar_quantize.h"

#include <vector>

#include "bindings.h"

namespace genperf {
namespace {

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("finite_scalar_quantize", TORCH_BOX(&finite_scalar_quantize));
  m.impl("finite_scalar_quantize_backward", TORCH_BOX(&finite_scalar_quantize_backward));
}

}  // namespace genperf
