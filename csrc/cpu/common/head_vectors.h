// SPDX-License-Identifier: Apache-2.0
//
// A tensor of any number of dimensions as the vectors of heads, so that small calls need no views.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace genperf {

using torch::stable::Tensor;

// x as vectors [heads, outer, D, inner]. Each group of dimensions around `channel` is one strided
// dimension.
struct HeadVectors {
  int64_t heads, outer, dim, inner;
  int64_t head_stride, outer_stride, stride, inner_stride;

  HeadVectors(const Tensor& x, int64_t channel, bool has_heads) {
    const int64_t first = has_heads;
    STD_TORCH_CHECK(channel >= first && channel < x.dim(), "channel must be a dimension of x");
    STD_TORCH_CHECK(x.is_contiguous() || (channel <= first + 1 && x.dim() <= channel + 2),
                    "x must be contiguous, or have one dimension before and after the channels");
    heads = has_heads ? x.size(0) : 1;
    head_stride = has_heads ? x.stride(0) : 0;
    dim = x.size(channel);
    stride = x.stride(channel);
    outer = inner = 1;
    for (int64_t d = first; d < channel; ++d)
      outer *= x.size(d);
    for (int64_t d = channel + 1; d < x.dim(); ++d)
      inner *= x.size(d);
    outer_stride = channel > first ? x.stride(channel - 1) : 0;
    inner_stride = x.dim() > channel + 1 ? x.stride(x.dim() - 1) : 0;
  }

  int64_t positions() const { return outer * inner; }

  // Calls f(position, offset) for the vectors of a head.
  template <class F>
  void for_each(int64_t head, const F& f) const {
    for (int64_t o = 0, position = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i, ++position)
        f(position, head * head_stride + o * outer_stride + i * inner_stride);
  }
};

}  // namespace genperf
