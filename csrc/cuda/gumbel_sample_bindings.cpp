// SPDX-License-Identifier: Apache-2.0
#include "gumbel_sample.h"

#include "bindings.h"

namespace genperf {
namespace {

void check_gumbel(const char* op, const Tensor& logits, const std::optional<Tensor>& temperature) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) > 0 && logits.size(1) <= INT32_MAX, op,
                  ": logits must have shape [outer, K, inner] with 0 < K < 2^31.");
  if (temperature)
    check_scalar(op, "temperature", *temperature, ScalarType::Float, logits);
}

// Fills the fields that both directions share.
template <typename Params>
void fill_gumbel(const char* op,
                 Params& params,
                 const Tensor& logits,
                 const std::optional<Tensor>& temperature,
                 double tau,
                 const std::optional<Tensor>& noise,
                 const std::optional<Tensor>& seed,
                 int64_t first) {
  params.logits = logits.const_data_ptr();
  params.noise = data_of<void>(noise);
  params.seed = seed_of(op, seed, first, logits);
  params.temperature = data_of<float>(temperature);
  params.outer = logits.size(0);
  params.classes = logits.size(1);
  params.inner = logits.size(2);
  params.logits_strides = strides_of(logits);
  if (noise) {
    params.noise_strides = strides_of(*noise);
    params.float32_noise = noise->scalar_type() == ScalarType::Float;
  }
  params.tau = static_cast<float>(tau);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_sample(Tensor logits,
                                                         std::optional<Tensor> temperature,
                                                         double tau,
                                                         std::optional<Tensor> noise,
                                                         std::optional<Tensor> seed,
                                                         int64_t first,
                                                         bool hard,
                                                         bool dense) {
  constexpr const char* kOp = "gumbel_sample";
  check_gumbel(kOp, logits, temperature);
  check_noise(kOp, noise, seed, logits);
  const Launch launch(logits);
  const int64_t outer = logits.size(0);
  const int64_t inner = logits.size(2);
  Tensor sample = dense ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
  Tensor indices = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Long);
  Tensor kl = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(logits, {4, outer, inner}, ScalarType::Float);

  GumbelSampleParams params{};
  fill_gumbel(kOp, params, logits, temperature, tau, noise, seed, first);
  if (dense) {
    params.sample = sample.mutable_data_ptr();
    params.sample_strides = strides_of(sample);
  }
  params.indices = mutable_data_of<int64_t>(indices);
  params.kl = mutable_data_of<float>(kl);
  params.statistics = mutable_data_of<float>(statistics);
  params.hard = hard;
  launch_gumbel_sample(params, dtype_of(kOp, logits), launch.stream());
  return {sample, indices, kl, statistics};
}

void gumbel_sample_backward(Tensor grad_logits,
                            std::optional<Tensor> grad_sample,
                            std::optional<Tensor> grad_kl,
                            Tensor logits,
                            Tensor statistics,
                            std::optional<Tensor> temperature,
                            double tau,
                            std::optional<Tensor> noise,
                            std::optional<Tensor> seed,
                            int64_t first) {
  constexpr const char* kOp = "gumbel_sample_backward";
  check_gumbel(kOp, logits, temperature);
  const int64_t outer = logits.size(0);
  const int64_t inner = logits.size(2);
  check_like(kOp, "grad_logits", grad_logits, logits);
  if (grad_sample) {
    check_like(kOp, "grad_sample", *grad_sample, logits);
    check_noise(kOp, noise, seed, logits);
  }
  if (grad_kl) {
    check_same_device(kOp, "grad_kl", *grad_kl, logits);
    STD_TORCH_CHECK(grad_kl->scalar_type() == ScalarType::Float && grad_kl->dim() == 2 &&
                        grad_kl->size(0) == outer && grad_kl->size(1) == inner,
                    kOp, ": grad_kl must be float32 [outer, inner].");
  }
  check_same_device(kOp, "statistics", statistics, logits);
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.dim() == 3 &&
                      statistics.size(0) == 4 && statistics.size(1) == outer &&
                      statistics.size(2) == inner,
                  kOp, ": statistics must be float32 [4, outer, inner].");
  const Launch launch(logits);
  grad_kl = contiguous(grad_kl);
  statistics = torch::stable::contiguous(statistics);

  GumbelSampleBackwardParams params{};
  fill_gumbel(kOp, params, logits, temperature, tau, noise, seed, first);
  params.grad_sample = data_of<void>(grad_sample);
  if (grad_sample)
    params.grad_sample_strides = strides_of(*grad_sample);
  params.grad_kl = data_of<float>(grad_kl);
  params.statistics = data_of<float>(statistics);
  params.grad_logits = grad_logits.mutable_data_ptr();
  params.grad_logits_strides = strides_of(grad_logits);
  launch_gumbel_sample_backward(params, dtype_of(kOp, logits), launch.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("gumbel_sample", TORCH_BOX(&gumbel_sample));
  m.impl("gumbel_sample_backward", TORCH_BOX(&gumbel_sample_backward));
}

}  // namespace genperf
