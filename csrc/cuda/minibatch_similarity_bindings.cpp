// SPDX-License-Identifier: Apache-2.0
#include "minibatch_similarity.h"

#include "bindings.h"

namespace genperf {
namespace {

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
  m.impl("minibatch_similarity", TORCH_BOX(&minibatch_similarity));
  m.impl("minibatch_similarity_backward", TORCH_BOX(&minibatch_similarity_backward));
}

}  // namespace genperf
