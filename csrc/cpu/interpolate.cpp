// SPDX-License-Identifier: Apache-2.0
//
// Interpolation between two tensors, or between a tensor and its noisy version, with one weight per
// sample.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/draw.h"
#include "cpu/common/elements.h"
#include "cpu/common/flat_rows.h"
#include "cpu/common/outputs.h"

namespace genperf {
namespace {

// The weight of each sample, given or drawn.
std::vector<float> weights_of(const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& seed,
                              int64_t first,
                              int64_t samples) {
  std::vector<float> weights(samples + kQuads * kLanes);
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->dim() == 1 &&
                        weight->size(0) == samples,
                    "weight must be float32 [B]");
    const float* given = static_cast<const float*>(weight->const_data_ptr());
    for (int64_t b = 0; b < samples; ++b)
      weights[b] = given[b * weight->stride(0)];
    return weights;
  }
  STD_TORCH_CHECK(seed.has_value(), "weight or a seed must be given");
  draw_weights(seed_of(seed), first, samples, weights.data());
  return weights;
}

// Exact for weights 0 and 1, and never outside the range of a and b.
inline Vec interpolated(Vec weight, Vec a, Vec b) {
  return fma(weight, a, (1.0f - weight) * b);
}

template <class T>
void mix(const Rows<T>& real,
         const Rows<T>& fake,
         float weight,
         const Rows<T>& out,
         int64_t count) {
  const bool vectorizable = real.vectorizable() && fake.vectorizable() && out.vectorizable();
  for_each_vector(count, vectorizable, [&](int64_t i, auto n) {
    const Vec a = real.get(i, n), b = fake.get(i, n);
    out.set(i, n, interpolated(broadcast(weight), a, b));
  });
}

Tensor interpolate(const Tensor& real,
                   std::optional<Tensor> fake,
                   std::optional<Tensor> scale,
                   std::optional<Tensor> weight,
                   std::optional<Tensor> seed,
                   int64_t first) {
  check_rows(real, real, true, "real");
  if (fake.has_value())
    check_rows(*fake, real, true, "fake");
  STD_TORCH_CHECK(
      fake.has_value() || (seed.has_value() && scale.has_value() &&
                           scale->scalar_type() == ScalarType::Float && scale->numel() == 1),
      "without fake, a seed and a scale of one float32 must be given");
  const std::vector<float> weights = weights_of(weight, seed, first, real.size(0));
  Tensor mixed = output_like(real);
  with_type(real, [&]<class T>(T*) {
    FlatRows<T, 3> rows({Rows<T>(real), Rows<T>(fake), Rows<T>(mixed)}, real, !fake.has_value());
    if (fake.has_value()) {
      rows.for_each([&](int64_t b, int64_t, int64_t, int64_t count, const auto& at) {
        mix(at[0], at[1], weights[b], at[2], count);
      });
      return;
    }
    const uint64_t key = seed_of(seed);
    const float spread = *static_cast<const float*>(scale->const_data_ptr());
    rows.for_each([&](int64_t b, int64_t row, int64_t column, int64_t count, const auto& at) {
      constexpr int64_t kSegment = 512;
      alignas(64) float buffer[kSegment + kDrawn + 4];
      const float share = (1 - weights[b]) * spread;
      for (int64_t start = 0; start < count; start += kSegment) {
        const int64_t length = std::min(kSegment, count - start);
        const float* drawn =
            draw_uniforms(key, first + b, row * rows.columns + column + start, length, buffer);
        for_each_vector(
            length, at[0].vectorizable() && at[2].vectorizable(), [&](int64_t i, auto n) {
              at[2].set(start + i, n,
                        fma(broadcast(share), load(drawn + i), at[0].get(start + i, n)));
            });
      }
    });
  });
  return mixed;
}

std::tuple<Tensor, Tensor, Tensor> interpolate_backward(const Tensor& grad_mixed,
                                                        std::optional<Tensor> real,
                                                        std::optional<Tensor> fake,
                                                        std::optional<Tensor> weight,
                                                        std::optional<Tensor> seed,
                                                        int64_t first) {
  check_rows(grad_mixed, grad_mixed, true, "grad_mixed");
  STD_TORCH_CHECK(real.has_value() == fake.has_value(),
                  "real and fake must both be given, or neither");
  if (real.has_value()) {
    check_rows(*real, grad_mixed, true, "real");
    check_rows(*fake, grad_mixed, true, "fake");
  }
  const int64_t samples = grad_mixed.size(0);
  const std::vector<float> weights = weights_of(weight, seed, first, samples);
  Tensor grad_real = output_like(grad_mixed);
  Tensor grad_fake = output_like(grad_mixed);
  Tensor grad_weight =
      torch::stable::new_empty(grad_mixed, {real.has_value() ? samples : 0}, ScalarType::Float);
  with_type(grad_mixed, [&]<class T>(T*) {
    FlatRows<T, 5> rows(
        {Rows<T>(grad_mixed), Rows<T>(real), Rows<T>(fake), Rows<T>(grad_real), Rows<T>(grad_fake)},
        grad_mixed, false);
    std::vector<double> partial(rows.blocks());
    rows.for_each([&](int64_t b, int64_t row, int64_t column, int64_t count, const auto& at) {
      const bool vectorizable =
          at[0].vectorizable_expanded() &&
          std::all_of(at.begin() + 1, at.end(), [](auto& x) { return x.vectorizable(); });
      double total = 0;
      // A lane adds up few numbers, of which narrow vectors would leave it many.
      constexpr int64_t kSegment = kLanes == 4 ? 64 : 512;
      for (int64_t start = 0; start < count; start += kSegment) {
        Vec sums{};
        for_each_vector(std::min(kSegment, count - start), vectorizable, [&](int64_t i, auto n) {
          const Vec g = at[0].get_expanded(start + i, n);
          at[3].set(start + i, n, weights[b] * g);
          at[4].set(start + i, n, (1 - weights[b]) * g);
          if (at[1])
            sums = fma(g, at[1].get(start + i, n) - at[2].get(start + i, n), sums);
        });
        total += sum(sums);
      }
      partial[rows.block(b, row, column)] = total;
    });
    float* const out = static_cast<float*>(grad_weight.mutable_data_ptr());
    for (int64_t b = 0; b < grad_weight.size(0); ++b)
      out[b] = float(rows.sum_of_sample(partial, b));
  });
  return {grad_real, grad_fake, grad_weight};
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&genperf::interpolate));
  m.impl("interpolate_backward", TORCH_BOX(&genperf::interpolate_backward));
}
