// SPDX-License-Identifier: Apache-2.0
#include "interpolate.h"

#include "bindings.h"

namespace genperf {
namespace {

void check_weight(const char* op,
                  const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& seed,
                  const Tensor& x) {
  STD_TORCH_CHECK(weight || seed, op, ": needs weights or a seed.");
  if (weight)
    check_vector(op, "weight", *weight, ScalarType::Float, x);
}

Tensor interpolate(Tensor real,
                   std::optional<Tensor> fake,
                   std::optional<Tensor> scale,
                   std::optional<Tensor> weight,
                   std::optional<Tensor> seed,
                   int64_t first) {
  constexpr const char* kOp = "interpolate";
  check_samples(kOp, real);
  check_weight(kOp, weight, seed, real);
  if (fake) {
    check_like(kOp, "fake", *fake, real);
  } else {
    STD_TORCH_CHECK(scale && seed, kOp, ": without fake it needs a scale and a seed.");
    check_scalar(kOp, "scale", *scale, ScalarType::Float, real);
  }
  const Launch launch(real);
  weight = contiguous(weight);
  Tensor mixed = torch::stable::empty_like(real);

  InterpolateParams params{};
  params.real = sample_input(real);
  params.fake = sample_input(fake);
  params.scale = data_of<float>(scale);
  params.weight = data_of<float>(weight);
  params.seed = seed_of(kOp, seed, first, real);
  params.mixed = sample_output(mixed);
  params.shape = sample_shape_of(real);
  launch_interpolate(params, dtype_of(kOp, real), launch.stream());
  return mixed;
}

std::tuple<Tensor, Tensor, Tensor> interpolate_backward(Tensor grad_mixed,
                                                        std::optional<Tensor> real,
                                                        std::optional<Tensor> fake,
                                                        std::optional<Tensor> weight,
                                                        std::optional<Tensor> seed,
                                                        int64_t first) {
  constexpr const char* kOp = "interpolate_backward";
  check_samples(kOp, grad_mixed);
  check_weight(kOp, weight, seed, grad_mixed);
  STD_TORCH_CHECK(real.has_value() == fake.has_value(), kOp,
                  ": real and fake must both be given, or neither.");
  if (real) {
    check_like(kOp, "real", *real, grad_mixed);
    check_like(kOp, "fake", *fake, grad_mixed);
  }
  const Launch launch(grad_mixed);
  weight = contiguous(weight);
  Tensor grad_real = torch::stable::empty_like(grad_mixed);
  Tensor grad_fake = torch::stable::empty_like(grad_mixed);
  Tensor grad_weight =
      torch::stable::new_empty(grad_mixed, {real ? grad_mixed.size(0) : 0}, ScalarType::Float);

  InterpolateBackwardParams params{};
  params.grad_mixed = sample_input(grad_mixed);
  params.real = sample_input(real);
  params.fake = sample_input(fake);
  params.weight = data_of<float>(weight);
  params.seed = seed_of(kOp, seed, first, grad_mixed);
  params.grad_real = sample_output(grad_real);
  params.grad_fake = sample_output(grad_fake);
  params.grad_weight = real ? mutable_data_of<float>(grad_weight) : nullptr;
  params.shape = sample_shape_of(grad_mixed);
  const DType type = dtype_of(kOp, grad_mixed);
  const int64_t count = real ? interpolate_backward_partials(params, type) : 0;
  const Tensor partials = torch::stable::new_empty(grad_mixed, {count}, ScalarType::Double);
  params.partials = mutable_data_of<double>(partials);
  const Tensor ticket = ticket_of(grad_mixed, launch);
  params.ticket = mutable_data_of<unsigned>(ticket);
  launch_interpolate_backward(params, type, launch.stream());
  return {grad_real, grad_fake, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward));
}

}  // namespace genperf
