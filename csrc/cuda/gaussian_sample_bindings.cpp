// SPDX-License-Identifier: Apache-2.0
#include "gaussian_sample.h"

#include "bindings.h"

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
                  ": prior_mean and prior_logvar must both be given, or neither.");
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
                                           int64_t first,
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
  params.seed = seed_of(kOp, seed, first, mean);
  params.sample = sample_output(sample);
  params.kl = mutable_data_of<float>(kl);
  params.shape = sample_shape_of(mean);
  params.free_bits = static_cast<float>(free_bits);
  const DType type = dtype_of(kOp, mean);
  const Tensor partials =
      torch::stable::new_empty(mean, {gaussian_sample_partials(params, type)}, ScalarType::Double);
  params.partials = mutable_data_of<double>(partials);
  const Tensor ticket = ticket_of(mean, launch);
  params.ticket = mutable_data_of<unsigned>(ticket);
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
                              int64_t first,
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
  params.seed = seed_of(kOp, seed, first, mean);
  params.grad_mean = sample_output(grad_mean);
  params.grad_logvar = sample_output(grad_logvar);
  params.grad_prior_mean = sample_output(grad_prior_mean);
  params.grad_prior_logvar = sample_output(grad_prior_logvar);
  params.shape = sample_shape_of(mean);
  params.free_bits = static_cast<float>(free_bits);
  launch_gaussian_sample_backward(params, dtype_of(kOp, mean), launch.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("gaussian_sample", TORCH_BOX(&gaussian_sample));
  m.impl("gaussian_sample_backward", TORCH_BOX(&gaussian_sample_backward));
}

}  // namespace genperf
