// SPDX-License-Identifier: Apache-2.0
#include "gradient_norm_penalty.h"

#include "bindings.h"

namespace genperf {
namespace {

std::tuple<Tensor, Tensor> gradient_norm_penalty(Tensor gradients, double center, bool one_sided) {
  constexpr const char* kOp = "gradient_norm_penalty";
  check_samples(kOp, gradients);
  const Launch launch(gradients);
  Tensor penalty = torch::stable::new_empty(gradients, {}, ScalarType::Float);
  Tensor norms = torch::stable::new_empty(gradients, {gradients.size(0)}, ScalarType::Float);

  GradientNormPenaltyParams params{};
  params.gradients = sample_input(gradients);
  params.norms = mutable_data_of<float>(norms);
  params.penalty = mutable_data_of<float>(penalty);
  params.shape = sample_shape_of(gradients);
  params.center = static_cast<float>(center);
  params.one_sided = one_sided;
  const DType type = dtype_of(kOp, gradients);
  const Tensor partials = torch::stable::new_empty(
      gradients, {gradient_norm_penalty_partials(params, type)}, ScalarType::Double);
  params.partials = mutable_data_of<double>(partials);
  const Tensor ticket = ticket_of(gradients, launch);
  params.ticket = mutable_data_of<unsigned>(ticket);
  launch_gradient_norm_penalty(params, type, launch.stream());
  return {penalty, norms};
}

Tensor gradient_norm_penalty_backward(Tensor grad_penalty,
                                      Tensor gradients,
                                      Tensor norms,
                                      double center,
                                      bool one_sided) {
  constexpr const char* kOp = "gradient_norm_penalty_backward";
  check_samples(kOp, gradients);
  check_scalar(kOp, "grad_penalty", grad_penalty, ScalarType::Float, gradients);
  check_vector(kOp, "norms", norms, ScalarType::Float, gradients);
  const Launch launch(gradients);
  norms = torch::stable::contiguous(norms);
  Tensor grad_gradients = torch::stable::empty_like(gradients);

  GradientNormPenaltyBackwardParams params{};
  params.grad_penalty = data_of<float>(grad_penalty);
  params.gradients = sample_input(gradients);
  params.norms = data_of<float>(norms);
  params.grad_gradients = sample_output(grad_gradients);
  params.shape = sample_shape_of(gradients);
  params.center = static_cast<float>(center);
  params.one_sided = one_sided;
  launch_gradient_norm_penalty_backward(params, dtype_of(kOp, gradients), launch.stream());
  return grad_gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&gradient_norm_penalty));
  m.impl("gradient_norm_penalty_backward", TORCH_BOX(&gradient_norm_penalty_backward));
}

}  // namespace genperf
