// SPDX-License-Identifier: Apache-2.0
//
// Interpolation between real and fake samples, or between real samples and their noisy versions,
// with one weight per sample that is given or drawn; and the gradients. Each direction is one
// streaming pass.
#include "interpolate.h"

namespace genperf {
namespace {

// A 16-byte access.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// Minimum number of blocks per multiprocessor; with more the compiler spills registers.
constexpr int kBackwardBlocks = 3;

constexpr int64_t kWeightQuad = INT64_MIN;  // 2^63 as an unsigned number

template <typename Params>
__device__ float weight_of(const Params& p, int64_t sample) {
  if (sample >= p.shape.batch)
    return 0;
  if (p.weight != nullptr)
    return p.weight[sample];
  return uniform<Scalar>(draw(value_of(p.seed), p.seed.first + sample, kWeightQuad).word[0]);
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    interpolate_kernel(InterpolateParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  const float weight = weight_of(p, thread_tile.sample);
  for_units<kWidth<T>>(plan, thread_tile, [&](const SampleUnit& unit) {
    float real[kWidth<T>], fake[kWidth<T>];
    load<T>(p.real, plan, unit, real);
    load<T>(p.fake, plan, unit, fake);
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      real[j] = fmaf(weight, real[j], (1 - weight) * fake[j]);  // exact at 0 and 1
    store<T>(p.mixed, plan, unit, real);
  });
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    perturb_kernel(InterpolateParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  const Keys keys = value_of(p.seed);
  const float scale = (1 - weight_of(p, thread_tile.sample)) * *p.scale;
  for_units<kWidth<T>>(plan, thread_tile, [&](const SampleUnit& unit) {
    float real[kWidth<T>];
    load<T>(p.real, plan, unit, real);
#pragma unroll
    for (int first = 0; first < kWidth<T>; first += 4) {
      const auto words = draw(keys, p.seed.first + unit.sample, (unit.first + first) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        real[first + j] += scale * uniform<Scalar>(words.word[j]);
    }
    store<T>(p.mixed, plan, unit, real);
  });
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, kBackwardBlocks)
    interpolate_backward_kernel(InterpolateBackwardParams p, SamplePlan plan) {
  const SampleThreadTile thread_tile(plan);
  const float weight = weight_of(p, thread_tile.sample);
  float sum = 0;
  for_units<kWidth<T>>(plan, thread_tile, [&](const SampleUnit& unit) {
    float grad[kWidth<T>], result[kWidth<T>];
    load<T>(p.grad_mixed, plan, unit, grad);
    if (p.grad_weight != nullptr) {
      float real[kWidth<T>], fake[kWidth<T>];
      load<T>(p.real, plan, unit, real);
      load<T>(p.fake, plan, unit, fake);
#pragma unroll
      for (int j = 0; j < kWidth<T>; ++j)
        sum += grad[j] * (real[j] - fake[j]);
    }
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      result[j] = weight * grad[j];
    store<T>(p.grad_real, plan, unit, result);
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      result[j] = (1 - weight) * grad[j];
    store<T>(p.grad_fake, plan, unit, result);
  });
  if (p.grad_weight != nullptr)
    finish_samples(plan, thread_tile, sum, p.partials, p.ticket, StoreSum{p.grad_weight});
}

template <typename T>
SamplePlan plan_of(InterpolateBackwardParams& p) {
  return plan_samples<T, kWidth<T>>("interpolate_backward", p.shape, p.grad_mixed, p.real, p.fake,
                                    p.grad_real, p.grad_fake);
}

}  // namespace

int64_t interpolate_backward_partials(InterpolateBackwardParams p, DType type) {
  return partials_of(type == DType::kFloat32 ? plan_of<float>(p) : plan_of<__half>(p));
}

void launch_interpolate(InterpolateParams p, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "interpolate";
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_samples<T, kWidth<T>>(kOp, p.shape, p.real, p.fake, p.mixed);
    if (plan.blocks == 0 || plan.units == 0)
      return;
    const auto kernel = p.fake.data != nullptr ? interpolate_kernel<T> : perturb_kernel<T>;
    launch(kOp, kernel, plan.blocks, kSampleThreads, 0, stream, p, plan);
  });
}

void launch_interpolate_backward(InterpolateBackwardParams p, DType type, cudaStream_t stream) {
  constexpr const char* kOp = "interpolate_backward";
  dispatch(kOp, type, [&]<typename T>() {
    const SamplePlan plan = plan_of<T>(p);
    if (plan.blocks == 0)
      return;
    launch(kOp, interpolate_backward_kernel<T>, plan.blocks, kSampleThreads, kTeamSumBytes, stream,
           p, plan);
  });
}

}  // namespace genperf
