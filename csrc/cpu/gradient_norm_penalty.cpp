// SPDX-License-Identifier: Apache-2.0
//
// The gradient norm of each sample and the penalty on it. Squares are summed in float64, so they
// cannot overflow.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/common/elements.h"
#include "cpu/common/flat_rows.h"
#include "cpu/common/outputs.h"

namespace genperf {
namespace {

using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));

double excess_of(double norm, double center, bool one_sided) {
  const double excess = norm - center;
  return one_sided && excess < 0 ? 0 : excess;
}

std::tuple<Tensor, Tensor> gradient_norm_penalty(const Tensor& gradients,
                                                 double center,
                                                 bool one_sided) {
  check_rows(gradients, gradients, true, "gradients");
  const int64_t samples = gradients.size(0);
  Tensor penalty = torch::stable::new_empty(gradients, {}, ScalarType::Float);
  Tensor norms = torch::stable::new_empty(gradients, {samples}, ScalarType::Float);
  with_type(gradients, [&]<class T>(T*) {
    FlatRows<T, 1> rows({Rows<T>(gradients)}, gradients, false);
    std::vector<double> squares(rows.blocks());
    rows.for_each([&](int64_t b, int64_t row, int64_t column, int64_t count, const auto& at) {
      Doubles total{};
      for_each_vector(count, at[0].vectorizable_expanded(), [&](int64_t i, auto n) {
        const Doubles g = __builtin_convertvector(at[0].get_expanded(i, n), Doubles);
        total += g * g;
      });
      double square = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        square += total[lane];
      squares[rows.block(b, row, column)] = square;
    });
    float* const norm = static_cast<float*>(norms.mutable_data_ptr());
    double total = 0;
    for (int64_t b = 0; b < samples; ++b) {
      const double exact = std::sqrt(rows.sum_of_sample(squares, b));
      const double excess = excess_of(exact, center, one_sided);
      total += excess * excess;
      norm[b] = float(exact);
    }
    *static_cast<float*>(penalty.mutable_data_ptr()) =
        float(total / double(std::max<int64_t>(1, samples)));
  });
  return {penalty, norms};
}

Tensor gradient_norm_penalty_backward(const Tensor& grad_penalty,
                                      const Tensor& gradients,
                                      const Tensor& norms,
                                      double center,
                                      bool one_sided) {
  check_rows(gradients, gradients, true, "gradients");
  const int64_t samples = gradients.size(0);
  STD_TORCH_CHECK(grad_penalty.scalar_type() == ScalarType::Float && grad_penalty.numel() == 1,
                  "grad_penalty must be one float32");
  STD_TORCH_CHECK(
      norms.scalar_type() == ScalarType::Float && norms.is_contiguous() && norms.numel() == samples,
      "norms must be contiguous float32 [B]");
  const double upstream = *static_cast<const float*>(grad_penalty.const_data_ptr());
  const float* const norm = static_cast<const float*>(norms.const_data_ptr());
  Tensor out = output_like(gradients);
  with_type(gradients, [&]<class T>(T*) {
    FlatRows<T, 2> rows({Rows<T>(gradients), Rows<T>(out)}, gradients, false);
    rows.for_each([&](int64_t b, int64_t, int64_t, int64_t count, const auto& at) {
      // The gradient of the norm at 0 is taken as 0.
      const double excess = norm[b] == 0 ? 0 : excess_of(norm[b], center, one_sided);
      const double factor = 2 * upstream / double(samples) * (center == 0 ? 1 : excess);
      const double divisor = center == 0 || norm[b] == 0 ? 1 : norm[b];
      const Vec ratio = broadcast(float(factor / divisor));
      // A norm below about 1e-38 has no float32 inverse.
      const bool divide = std::isinf(ratio[0]) && !std::isinf(factor);
      for_each_vector(count, at[0].vectorizable_expanded() && at[1].vectorizable(),
                      [&](int64_t i, auto n) {
                        const Vec g = at[0].get_expanded(i, n);
                        at[1].set(i, n, divide ? float(factor) * (g / float(divisor)) : ratio * g);
                      });
    });
  });
  return out;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&genperf::gradient_norm_penalty));
  m.impl("gradient_norm_penalty_backward", TORCH_BOX(&genperf::gradient_norm_penalty_backward));
}
