// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"
#include "gaussian_sample.h"
#include "gumbel_sample.h"

namespace genperf {
namespace {

void check_gaussian(const char* op,
                    const Tensor& mean,
                    const Tensor& logvar,
                    const std::optional<Tensor>& prior_mean,
                    const std::optional<Tensor>& prior_logvar) {
  STD_TORCH_CHECK(mean.dim() == 3, op, ": mean must have shape [B, rows, columns].");
  check_like(op, "logvar", logvar, mean);
  STD_TORCH_CHECK(prior_mean.has_value() == prior_logvar.has_value(), op,
                  ": the prior must be absent or whole.");
  if (prior_mean) {
    check_like(op, "prior_mean", *prior_mean, mean);
    check_like(op, "prior_logvar", *prior_logvar, mean);
  }
}

std::tuple<Tensor, Tensor> gaussian_sample(Tensor mean,
                                           Tensor logvar,
                                           std::optional<Tensor> prior_mean,
                                           std::optional<Tensor> prior_logvar,
                                           std::optional<Tensor> noise,
                                           std::optional<Tensor> seed,
                                           double free_bits,
                                           bool float32_sample) {
  constexpr const char* kOp = "gaussian_sample";
  check_gaussian(kOp, mean, logvar, prior_mean, prior_logvar);
  check_noise(kOp, noise, seed, mean);
  const Launch launch(mean);
  Tensor sample = empty_like(mean, float32_sample ? ScalarType::Float : mean.scalar_type());
  Tensor kl = torch::stable::new_empty(mean, {mean.size(0)}, ScalarType::Float);

  GaussianSampleParams params{};
  params.mean = sample_input(mean);
  params.logvar = sample_input(logvar);
  params.prior_mean = sample_input(prior_mean);
  params.prior_logvar = sample_input(prior_logvar);
  params.noise = sample_input(noise);
  params.seed = data_of<int64_t>(seed);
  params.sample = sample_output(sample);
  params.kl = mutable_data_of<float>(kl);
  params.shape = sample_shape_of(mean);
  params.free_bits = static_cast<float>(free_bits);
  const DType type = dtype_of(kOp, mean);
  const Tensor partials =
      torch::stable::new_empty(mean, {gaussian_sample_partials(params, type)}, ScalarType::Double);
  params.partials = mutable_data_of<double>(partials);
  launch_gaussian_sample(params, type, launch.stream());
  return {sample, kl};
}

void gaussian_sample_backward(Tensor grad_mean,
                              Tensor grad_logvar,
                              std::optional<Tensor> grad_prior_mean,
                              std::optional<Tensor> grad_prior_logvar,
                              std::optional<Tensor> grad_sample,
                              std::optional<Tensor> grad_kl,
                              Tensor mean,
                              Tensor logvar,
                              std::optional<Tensor> prior_mean,
                              std::optional<Tensor> prior_logvar,
                              std::optional<Tensor> noise,
                              std::optional<Tensor> seed,
                              double free_bits) {
  constexpr const char* kOp = "gaussian_sample_backward";
  check_gaussian(kOp, mean, logvar, prior_mean, prior_logvar);
  check_like(kOp, "grad_mean", grad_mean, mean);
  check_like(kOp, "grad_logvar", grad_logvar, mean);
  if (grad_prior_mean)
    check_like(kOp, "grad_prior_mean", *grad_prior_mean, mean);
  if (grad_prior_logvar)
    check_like(kOp, "grad_prior_logvar", *grad_prior_logvar, mean);
  if (grad_sample) {
    check_like(kOp, "grad_sample", *grad_sample, mean, true);
    check_noise(kOp, noise, seed, mean);
  }
  if (grad_kl)
    check_vector(kOp, "grad_kl", *grad_kl, ScalarType::Float, mean);
  const Launch launch(mean);
  grad_kl = contiguous(grad_kl);

  GaussianSampleBackwardParams params{};
  params.grad_sample = sample_input(grad_sample);
  params.grad_kl = data_of<float>(grad_kl);
  params.mean = sample_input(mean);
  params.logvar = sample_input(logvar);
  params.prior_mean = sample_input(prior_mean);
  params.prior_logvar = sample_input(prior_logvar);
  params.noise = sample_input(noise);
  params.seed = data_of<int64_t>(seed);
  params.grad_mean = sample_output(grad_mean);
  params.grad_logvar = sample_output(grad_logvar);
  params.grad_prior_mean = sample_output(grad_prior_mean);
  params.grad_prior_logvar = sample_output(grad_prior_logvar);
  params.shape = sample_shape_of(mean);
  params.free_bits = static_cast<float>(free_bits);
  launch_gaussian_sample_backward(params, dtype_of(kOp, mean), launch.stream());
}

void check_gumbel(const char* op, const Tensor& logits, const std::optional<Tensor>& temperature) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) > 0 && logits.size(1) <= INT32_MAX, op,
                  ": logits must have shape [outer, K, inner] with 0 < K < 2^31.");
  if (temperature)
    check_scalar(op, "temperature", *temperature, ScalarType::Float, logits);
}

// What both directions' params have.
template <typename Params>
void fill_gumbel(Params& params,
                 const Tensor& logits,
                 const std::optional<Tensor>& temperature,
                 double tau,
                 const std::optional<Tensor>& noise,
                 const std::optional<Tensor>& seed) {
  params.logits = logits.const_data_ptr();
  params.noise = data_of<void>(noise);
  params.seed = data_of<int64_t>(seed);
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
  fill_gumbel(params, logits, temperature, tau, noise, seed);
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
                            std::optional<Tensor> seed) {
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
  fill_gumbel(params, logits, temperature, tau, noise, seed);
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
  m.impl("gaussian_sample", TORCH_BOX(&gaussian_sample));
  m.impl("gaussian_sample_backward", TORCH_BOX(&gaussian_sample_backward));
  m.impl("gumbel_sample", TORCH_BOX(&gumbel_sample));
  m.impl("gumbel_sample_backward", TORCH_BOX(&gumbel_sample_backward));
}

}  // namespace genperf
