// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"
#include "gradient_norm_penalty.h"
#include "interpolate.h"
#include "minibatch_similarity.h"

namespace genperf {
namespace {

void check_samples(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": samples must have shape [B, rows, columns].");
}

void check_weight(const char* op,
                  const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& seed,
                  const Tensor& x) {
  STD_TORCH_CHECK(weight || seed, op, ": needs weights or a seed.");
  if (weight)
    check_vector(op, "weight", *weight, ScalarType::Float, x);
  if (seed)
    check_scalar(op, "seed", *seed, ScalarType::Long, x);
}

Tensor interpolate(Tensor real,
                   std::optional<Tensor> fake,
                   std::optional<Tensor> scale,
                   std::optional<Tensor> weight,
                   std::optional<Tensor> seed) {
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
  params.seed = data_of<int64_t>(seed);
  params.mixed = sample_output(mixed);
  params.shape = sample_shape_of(real);
  launch_interpolate(params, dtype_of(kOp, real), launch.stream());
  return mixed;
}

std::tuple<Tensor, Tensor, Tensor> interpolate_backward(Tensor grad_mixed,
                                                        std::optional<Tensor> real,
                                                        std::optional<Tensor> fake,
                                                        std::optional<Tensor> weight,
                                                        std::optional<Tensor> seed) {
  constexpr const char* kOp = "interpolate_backward";
  check_samples(kOp, grad_mixed);
  check_weight(kOp, weight, seed, grad_mixed);
  STD_TORCH_CHECK(real.has_value() == fake.has_value(), kOp, ": real and fake must come together.");
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
  params.seed = data_of<int64_t>(seed);
  params.grad_real = sample_output(grad_real);
  params.grad_fake = sample_output(grad_fake);
  params.grad_weight = real ? mutable_data_of<float>(grad_weight) : nullptr;
  params.shape = sample_shape_of(grad_mixed);
  const DType type = dtype_of(kOp, grad_mixed);
  const int64_t count = real ? interpolate_backward_partials(params, type) : 0;
  const Tensor partials = torch::stable::new_empty(grad_mixed, {count}, ScalarType::Double);
  params.partials = mutable_data_of<double>(partials);
  launch_interpolate_backward(params, type, launch.stream());
  return {grad_real, grad_fake, grad_weight};
}

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

void check_features(const char* op, const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 3, op, ": features must have shape [N, B, C].");
}

Tensor minibatch_similarity(Tensor features) {
  constexpr const char* kOp = "minibatch_similarity";
  check_features(kOp, features);
  const Launch launch(features);
  features = torch::stable::contiguous(features);
  Tensor similarity = torch::stable::new_empty(features, {features.size(0), features.size(1)});

  MinibatchSimilarityParams params{};
  params.features = features.const_data_ptr();
  params.similarity = similarity.mutable_data_ptr();
  params.samples = features.size(0);
  params.kernels = features.size(1);
  params.channels = features.size(2);
  launch_minibatch_similarity(params, dtype_of(kOp, features), launch.stream());
  return similarity;
}

Tensor minibatch_similarity_backward(Tensor grad_similarity, Tensor features) {
  constexpr const char* kOp = "minibatch_similarity_backward";
  check_features(kOp, features);
  check_same_device(kOp, "grad_similarity", grad_similarity, features);
  STD_TORCH_CHECK(grad_similarity.dim() == 2 && grad_similarity.size(0) == features.size(0) &&
                      grad_similarity.size(1) == features.size(1) &&
                      grad_similarity.scalar_type() == features.scalar_type(),
                  kOp, ": grad_similarity must have shape [N, B] and features' dtype.");
  const Launch launch(features);
  features = torch::stable::contiguous(features);
  grad_similarity = torch::stable::contiguous(grad_similarity);
  Tensor grad_features = torch::stable::empty_like(features);

  MinibatchSimilarityBackwardParams params{};
  params.grad_similarity = grad_similarity.const_data_ptr();
  params.features = features.const_data_ptr();
  params.grad_features = grad_features.mutable_data_ptr();
  params.samples = features.size(0);
  params.kernels = features.size(1);
  params.channels = features.size(2);
  launch_minibatch_similarity_backward(params, dtype_of(kOp, features), launch.stream());
  return grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward));
  m.impl("gradient_norm_penalty", TORCH_BOX(&gradient_norm_penalty));
  m.impl("gradient_norm_penalty_backward", TORCH_BOX(&gradient_norm_penalty_backward));
  m.impl("minibatch_similarity", TORCH_BOX(&minibatch_similarity));
  m.impl("minibatch_similarity_backward", TORCH_BOX(&minibatch_similarity_backward));
}

}  // namespace genperf
