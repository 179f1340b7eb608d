// SPDX-License-Identifier: Apache-2.0
//
// The gradient norm of each sample with the mean squared distance of the norms from a center, and
// its gradient. Each direction is one streaming pass; the last block of forward computes the mean.
#include "gradient_norm_penalty.h"

namespace genperf {
namespace {

// A 16-byte access.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

constexpr int kBlocks = 6;  // per multiprocessor, at least; with more the compiler spills registers

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
__global__ void __launch_bounds__(kSampleThreads, kBlocks)
    gradient_norm_kernel(GradientNormPenaltyParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  double sum = 0;
  for_units<kWidth<T>>(plan, thread_tile, [&](const SampleUnit& unit) {
    float values[kWidth<T>];
    load<T>(p.gradients, plan, unit, values);
    sum += sum_of_squares(values);
  });
  double penalty = 0;
  const auto finish = [&](int64_t sample, double square) {
    const float norm = static_cast<float>(sqrt(square));
    p.norms[sample] = norm;
    const double distance = static_cast<double>(norm) - p.center;
    penalty += p.one_sided && distance <= 0 ? 0.0 : distance * distance;
  };
  if (!finish_samples(plan, thread_tile, sum, p.partials, p.ticket, finish))
    return;
  // If samples have one part, each block has the norms of some samples, else the last block of all.
  __syncthreads();  // the shared memory is used again
  penalty = team_sum(penalty, kSampleThreads);
  if (plan.parts == 1) {
    if (threadIdx.x == 0)
      p.partials[blockIdx.x] = penalty;
    if (!is_last_block(p.ticket))
      return;
    penalty = 0;
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kSampleThreads)
      penalty += __ldcg(p.partials + i);
    penalty = team_sum(penalty, kSampleThreads);
  }
  if (threadIdx.x == 0)
    *p.penalty = plan.shape.batch > 0 ? static_cast<float>(penalty / plan.shape.batch) : 0.0f;
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

// An empty batch has a penalty too.
unsigned blocks_of(const SamplePlan& plan) {
  return plan.blocks > 0 ? plan.blocks : 1;
}

}  // namespace

int64_t gradient_norm_penalty_partials(GradientNormPenaltyParams p, DType type) {
  return blocks_of(type == DType::kFloat32 ? plan_of<float>(p) : plan_of<__half>(p));
}

void launch_gradient_norm_penalty(GradientNormPenaltyParams p, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "gradient_norm_penalty";
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_of<T>(p);
    launch(kOp, gradient_norm_kernel<T>, blocks_of(plan), kSampleThreads, kTeamSumBytes, stream, p,
           plan);
  });
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
