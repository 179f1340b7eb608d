// SPDX-License-Identifier: Apache-2.0
//
// Samples of diagonal Gaussians with their KL divergence, and the gradients of both.
//
// Each direction is one pass that reads the moments, draws the noise in registers and writes the
// result. Only a seed is saved for backward.
#include "gaussian_sample.h"

namespace genperf {
namespace {

// One quad of noise. The kernel is limited by arithmetic, and two quads would halve the number of
// threads in flight.
constexpr int kWidth = 4;
constexpr float kLowestLogvar = -30.0f;
constexpr float kHighestLogvar = 20.0f;

// Like torch.clamp, keeps NaN.
__device__ float clamp_logvar(float logvar) {
  return Scalar::at_most(Scalar::at_least(logvar, kLowestLogvar), kHighestLogvar);
}

// The exponential of a clamped log variance.
using Variance = ExpParts<Scalar, true>;

// Like the gradient of torch.clamp, false for NaN.
__device__ bool inside_clamp(float logvar) {
  return logvar >= kLowestLogvar && logvar <= kHighestLogvar;
}

// KL divergence of one element and its derivatives. expm1 avoids cancellation near a variance of 1.
struct Divergence {
  float value, by_mean, by_logvar;
  float by_prior_mean = 0;
  float by_prior_logvar = 0;

  // Against N(0, 1), from the variance minus 1.
  __device__ Divergence(float mean, float logvar, float expm1) {
    value = 0.5f * (mean * mean + (expm1 - logvar));
    by_mean = mean;
    by_logvar = 0.5f * expm1;
  }

  __device__ Divergence(float mean, float logvar, float prior_mean, float prior_logvar) {
    const float difference = mean - prior_mean;
    const float ratio = logvar - prior_logvar;
    const float precision = exp<Scalar>(-prior_logvar);
    const float scaled = difference * difference * precision;
    const float expm1 = ExpParts<Scalar>(ratio).expm1();
    value = 0.5f * (scaled + (expm1 - ratio));
    by_mean = difference * precision;
    by_logvar = 0.5f * expm1;
    by_prior_mean = -by_mean;
    by_prior_logvar = -0.5f * (scaled + expm1);
  }
};

// kPlain kernels draw their noise and have no prior, on a plain plan.
template <typename T, bool kPlain, typename Params>
__device__ void load_noise(const Params& p,
                           const SamplePlan& plan,
                           const SampleUnit& unit,
                           const Keys& keys,
                           float (&noise)[kWidth]) {
  if (!kPlain && p.noise.data != nullptr) {
    load<T>(p.noise, plan, unit, noise);
    return;
  }
  normals<Scalar>(draw(keys, p.seed.first + unit.sample, unit.first / kWidth), noise);
}

template <typename T, bool kPlain>
__global__ void __launch_bounds__(kSampleThreads, kPlain ? 4 : 3)
    gaussian_sample_kernel(GaussianSampleParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  const Keys keys = value_of(p.seed);
  float kl = 0;
  for_units<kWidth, kPlain>(plan, thread_tile, [&](const SampleUnit& unit) {
    float mean[kWidth], logvar[kWidth], prior_mean[kWidth], prior_logvar[kWidth];
    load<T, kPlain>(p.mean, plan, unit, mean);
    load<T, kPlain>(p.logvar, plan, unit, logvar);
    const bool prior = !kPlain && p.prior_mean.data != nullptr;
    if (prior) {
      load<T>(p.prior_mean, plan, unit, prior_mean);
      load<T>(p.prior_logvar, plan, unit, prior_logvar);
    }
    float sample[kWidth];
    load_noise<T, kPlain>(p, plan, unit, keys, sample);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float clamped = clamp_logvar(logvar[j]);
      const Variance variance(clamped);
      sample[j] = mean[j] + Scalar::sqrt(variance.exp()) * sample[j];
      const Divergence divergence =
          prior ? Divergence(mean[j], clamped, prior_mean[j], clamp_logvar(prior_logvar[j]))
                : Divergence(mean[j], clamped, variance.expm1());
      const float value = Scalar::at_least(divergence.value, p.free_bits);
      kl += kPlain || j < unit.count ? value : 0.0f;
    }
    store<T, kPlain>(p.sample, plan, unit, sample);
  });
  finish_samples(plan, thread_tile, kl, p.partials, p.ticket, StoreSum{p.kl});
}

template <typename T, bool kPlain>
__global__ void __launch_bounds__(kSampleThreads, kPlain ? 4 : 2)
    gaussian_sample_backward_kernel(GaussianSampleBackwardParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  const Keys keys = value_of(p.seed);
  const bool has_grad_kl = p.grad_kl != nullptr && thread_tile.sample < plan.shape.batch;
  const float grad_kl = has_grad_kl ? p.grad_kl[thread_tile.sample] : 0.0f;
  for_units<kWidth, kPlain>(plan, thread_tile, [&](const SampleUnit& unit) {
    float grad_mean[kWidth] = {};
    float grad_logvar[kWidth] = {};
    float logvar[kWidth];
    load<T, kPlain>(p.logvar, plan, unit, logvar);
    if (p.grad_sample.data != nullptr) {
      load<T, kPlain>(p.grad_sample, plan, unit, grad_mean);
      load_noise<T, kPlain>(p, plan, unit, keys, grad_logvar);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        grad_logvar[j] *=
            0.5f * Scalar::sqrt(Variance(clamp_logvar(logvar[j])).exp()) * grad_mean[j];
    }
    float prior_mean[kWidth] = {};  // finally the prior's gradients
    float prior_logvar[kWidth] = {};
    if (has_grad_kl) {
      float mean[kWidth];
      load<T, kPlain>(p.mean, plan, unit, mean);
      const bool prior = !kPlain && p.prior_mean.data != nullptr;
      if (prior) {
        load<T>(p.prior_mean, plan, unit, prior_mean);
        load<T>(p.prior_logvar, plan, unit, prior_logvar);
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float clamped = clamp_logvar(logvar[j]);
        const Divergence divergence =
            prior ? Divergence(mean[j], clamped, prior_mean[j], clamp_logvar(prior_logvar[j]))
                  : Divergence(mean[j], clamped, Variance(clamped).expm1());
        const bool counts = !(divergence.value < p.free_bits);
        grad_mean[j] += counts ? grad_kl * divergence.by_mean : 0.0f;
        grad_logvar[j] += counts ? grad_kl * divergence.by_logvar : 0.0f;
        prior_mean[j] = counts ? grad_kl * divergence.by_prior_mean : 0.0f;
        prior_logvar[j] =
            counts && inside_clamp(prior_logvar[j]) ? grad_kl * divergence.by_prior_logvar : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      grad_logvar[j] = inside_clamp(logvar[j]) ? grad_logvar[j] : 0.0f;
    store<T, kPlain>(p.grad_mean, plan, unit, grad_mean);
    store<T, kPlain>(p.grad_logvar, plan, unit, grad_logvar);
    if (!kPlain && p.grad_prior_mean.data != nullptr)
      store<T>(p.grad_prior_mean, plan, unit, prior_mean);
    if (!kPlain && p.grad_prior_logvar.data != nullptr)
      store<T>(p.grad_prior_logvar, plan, unit, prior_logvar);
  });
}

template <typename Params>
bool is_plain(const Params& p, const SamplePlan& plan) {
  return plan.plain && p.noise.data == nullptr && p.prior_mean.data == nullptr;
}

template <typename T>
SamplePlan plan_of(GaussianSampleParams& p) {
  return plan_samples<T, kWidth>("gaussian_sample", p.shape, p.mean, p.logvar, p.prior_mean,
                                 p.prior_logvar, p.noise, p.sample);
}

}  // namespace

int64_t gaussian_sample_partials(GaussianSampleParams p, DType type) {
  return partials_of(type == DType::kFloat32 ? plan_of<float>(p) : plan_of<__half>(p));
}

void launch_gaussian_sample(GaussianSampleParams p, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "gaussian_sample";
  // Rounding can make the KL of an element slightly negative; free_bits = 0 must not clamp it.
  if (!(p.free_bits > 0))
    p.free_bits = -1;
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_of<T>(p);
    if (plan.blocks == 0)
      return;
    const auto kernel =
        is_plain(p, plan) ? gaussian_sample_kernel<T, true> : gaussian_sample_kernel<T, false>;
    launch(kOp, kernel, plan.blocks, kSampleThreads, kTeamSumBytes, stream, p, plan);
  });
}

void launch_gaussian_sample_backward(GaussianSampleBackwardParams p,
                                     DType type,
                                     cudaStream_t stream) {
  constexpr const char* kOp = "gaussian_sample_backward";
  if (!(p.free_bits > 0))
    p.free_bits = -1;
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_samples<T, kWidth>(
        kOp, p.shape, p.grad_sample, p.mean, p.logvar, p.prior_mean, p.prior_logvar, p.noise,
        p.grad_mean, p.grad_logvar, p.grad_prior_mean, p.grad_prior_logvar);
    if (plan.blocks == 0 || plan.units == 0)
      return;
    const auto kernel = is_plain(p, plan) ? gaussian_sample_backward_kernel<T, true>
                                          : gaussian_sample_backward_kernel<T, false>;
    launch(kOp, kernel, plan.blocks, kSampleThreads, 0, stream, p, plan);
  });
}

}  // namespace genperf
