// SPDX-License-Identifier: Apache-2.0
//
// The gradient norm of each sample with the mean squared distance of the norms from a center, and
// its gradient. Each direction is one streaming pass; one block computes the mean of the B norms.
#include "gradient_norm_penalty.h"

namespace genperf {
namespace {

// A 16-byte access.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

constexpr int kMeanThreads = 1024;

struct StoreNorm {
  float* norms;  // [B]

  __device__ void operator()(int64_t sample, double sum) const {
    norms[sample] = static_cast<float>(sqrt(sum));
  }
};

// In float where squares neither overflow nor lose bits, which avoids most conversions to double.
template <int kCount>
__device__ double sum_of_squares(const float (&values)[kCount]) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    sum += values[j] * values[j];
  if (sum > 0x1p-80f && sum < 0x1p120f)
    return sum;
  double exact = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    exact += static_cast<double>(values[j]) * values[j];
  return exact;
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    gradient_norm_kernel(GradientNormPenaltyParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  double sum = 0;
  for_units<kWidth<T>>(plan, thread_tile, [&](const SampleUnit& unit) {
    float values[kWidth<T>];
    load<T>(p.gradients, plan, unit, values);
    sum += sum_of_squares(values);
  });
  finish_parts(plan, thread_tile, sum, p.partials, StoreNorm{p.norms});
}

__global__ void __launch_bounds__(kMeanThreads) mean_penalty_kernel(GradientNormPenaltyParams p) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < p.shape.batch; i += kMeanThreads) {
    const double distance = static_cast<double>(p.norms[i]) - p.center;
    sum += p.one_sided && distance <= 0 ? 0.0 : distance * distance;
  }
  auto& warp_sums = shared_memory<double[kMeanThreads / kWarpSize]>();
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    sum += __shfl_down_sync(kFullWarp, sum, step);
  if (threadIdx.x % kWarpSize == 0)
    warp_sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0)
    return;
  sum = 0;
  for (const double warp_sum : warp_sums)
    sum += warp_sum;
  *p.penalty = p.shape.batch > 0 ? static_cast<float>(sum / p.shape.batch) : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    gradient_norm_penalty_backward_kernel(GradientNormPenaltyBackwardParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  // grad = factor * g / norm, with a division per element because 1 / norm may overflow.
  float norm = 1;
  float factor = 0;
  if (thread_tile.sample < plan.shape.batch) {
    norm = p.norms[thread_tile.sample];
    const float distance = norm - p.center;
    factor = *p.grad_penalty * 2 / static_cast<float>(plan.shape.batch);
    if (p.center == 0) {
      norm = 1;
    } else if (norm == 0 || (p.one_sided && distance <= 0)) {
      norm = 1;
      factor = 0;
    } else {
      factor *= distance;
    }
  }
  for_units<kWidth<T>>(plan, thread_tile, [&](const SampleUnit& unit) {
    float values[kWidth<T>];
    load<T>(p.gradients, plan, unit, values);
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      values[j] = factor * (values[j] / norm);
    store<T>(p.grad_gradients, plan, unit, values);
  });
}

template <typename T>
SamplePlan plan_of(GradientNormPenaltyParams& p) {
  return plan_samples<T, kWidth<T>>("gradient_norm_penalty", p.shape, p.gradients);
}

}  // namespace

int64_t gradient_norm_penalty_partials(GradientNormPenaltyParams p, DType type) {
  return partials_of(type == DType::kFloat32 ? plan_of<float>(p) : plan_of<__half>(p));
}

void launch_gradient_norm_penalty(GradientNormPenaltyParams p, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "gradient_norm_penalty";
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_of<T>(p);
    if (plan.blocks == 0)
      return;
    launch(kOp, gradient_norm_kernel<T>, plan.blocks, kSampleThreads, kTeamSumBytes, stream, p,
           plan);
    combine_parts(kOp, plan, p.partials, StoreNorm{p.norms}, stream);
  });
  launch(kOp, mean_penalty_kernel, 1, kMeanThreads, sizeof(double[kMeanThreads / kWarpSize]),
         stream, p);
}

void launch_gradient_norm_penalty_backward(GradientNormPenaltyBackwardParams p,
                                           DType type,
                                           cudaStream_t stream) {
  constexpr const char* kOp = "gradient_norm_penalty_backward";
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_samples<T, kWidth<T>>(kOp, p.shape, p.gradients, p.grad_gradients);
    if (plan.blocks == 0 || plan.units == 0)
      return;
    launch(kOp, gradient_norm_penalty_backward_kernel<T>, plan.blocks, kSampleThreads, 0, stream, p,
           plan);
  });
}

}  // namespace genperf
