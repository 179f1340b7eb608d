// SPDX-License-Identifier: Apache-2.0
//
// The last step of the gradients of codebooks.
#pragma once

#include <algorithm>

#include "cpu/common/positions.h"

namespace genperf {

// gradient [.., D] = sums [.., D] times the gradient of a mean squared error over `valid` vectors,
// with the rounding of the same steps in PyTorch. grad_mse has one value for each equal part of the
// sums.
template <class W, class C>
void scale_code_gradient(const Tensor& sums,
                         const Tensor& grad_mse,
                         const Tensor& valid,
                         int64_t dim,
                         double weight,
                         Tensor& gradient) {
  STD_TORCH_CHECK(valid.scalar_type() == ScalarType::Long && valid.numel() == 1,
                  "valid must be one int64");
  STD_TORCH_CHECK(grad_mse.scalar_type() == sums.scalar_type() && grad_mse.is_contiguous() &&
                      (grad_mse.numel() == 1 || grad_mse.numel() == sums.size(0)),
                  "grad_mse must hold one value, or one for each codebook, of the sums' dtype");
  const W elements = W(std::max<int64_t>(*static_cast<const int64_t*>(valid.data_ptr()) * dim, 1));
  const W* const slopes = static_cast<const W*>(grad_mse.data_ptr());
  const W* const from = static_cast<const W*>(sums.data_ptr());
  C* const to = static_cast<C*>(gradient.data_ptr());
  const int64_t part = sums.numel() / grad_mse.numel();
  torch::stable::parallel_for(0, sums.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const W scale = slopes[begin / part] * W(-2 * weight) / elements;
      const int64_t last = std::min(end, (begin / part + 1) * part);
      for (; begin < last; ++begin)
        to[begin] = C(from[begin] * scale);
    }
  });
}

}  // namespace genperf
