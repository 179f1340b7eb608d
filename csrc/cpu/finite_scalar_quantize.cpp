// SPDX-License-Identifier: Apache-2.0
//
// Finite scalar quantization: bounds each channel and rounds it to a grid; backward is the gradient
// of the bound.
#include "cpu/common/implicit_codes.h"
#include "cpu/common/outputs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace genperf {
namespace {

std::vector<ChannelGrid> channel_grids(const std::vector<int64_t>& levels,
                                       const Tensor& x,
                                       bool symmetric,
                                       bool hard) {
  STD_TORCH_CHECK(int64_t(levels.size()) == x.size(1), "levels must name every channel");
  std::vector<ChannelGrid> grids;
  uint64_t basis = 1;  // may wrap if no indices are wanted
  for (const int64_t count : levels) {
    STD_TORCH_CHECK(count >= 2 && count <= 1 << 20, "a channel must have 2 to 2^20 levels");
    grids.push_back(channel_grid(count, symmetric, hard, int64_t(basis)));
    basis *= uint64_t(count);
  }
  return grids;
}

std::vector<int64_t> basis_of(const std::vector<ChannelGrid>& grids) {
  std::vector<int64_t> basis;
  for (const ChannelGrid& level : grids)
    basis.push_back(level.basis);
  return basis;
}

std::tuple<Tensor, Tensor> finite_scalar_quantize(const Tensor& x,
                                                  std::vector<int64_t> levels,
                                                  bool symmetric,
                                                  bool hard,
                                                  bool indexed) {
  check_channels(x);
  const std::vector<ChannelGrid> grids = channel_grids(levels, x, symmetric, hard);
  Tensor quantized = output_like(x);
  Tensor indices = indexed ? torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long)
                           : torch::stable::new_empty(x, {0}, ScalarType::Long);
  with_type(x, [&]<class T>(T*) {
    const auto [in, out] = lines_of<T>(x, quantized);
    const bool flat = in.is_contiguous() && out.is_contiguous();
    const auto table = [&](float ChannelGrid::* constant) {
      return ChannelConstants(flat, in.dim, [&](int64_t d) { return grids[d].*constant; });
    };
    const ChannelConstants shift = table(&ChannelGrid::shift), half = table(&ChannelGrid::half),
                           offset = table(&ChannelGrid::offset),
                           middle = table(&ChannelGrid::middle),
                           divisor = table(&ChannelGrid::divisor), top = table(&ChannelGrid::top);
    const auto run = [&](auto is_symmetric, auto is_hard) {
      quantize(in, out, flat, basis_of(grids),
               indexed ? static_cast<int64_t*>(indices.data_ptr()) : nullptr, [&](int j, Vec v) {
                 const GridConstants<Simd> at{shift[j],  half[j],    offset[j],
                                              middle[j], divisor[j], top[j]};
                 return quantize_channel<Simd>(v, at, is_symmetric, is_hard);
               });
    };
    using Yes = std::true_type;
    using No = std::false_type;
    symmetric ? hard ? run(Yes{}, Yes{}) : run(Yes{}, No{})
    : hard    ? run(No{}, Yes{})
              : run(No{}, No{});
  });
  return {quantized, indices};
}

Tensor finite_scalar_quantize_backward(const Tensor& grad_quantized,
                                       const Tensor& x,
                                       std::vector<int64_t> levels,
                                       bool symmetric,
                                       bool hard) {
  check_channels(x);
  check_gradient(grad_quantized, x);
  const std::vector<ChannelGrid> grids = channel_grids(levels, x, symmetric, hard);
  Tensor grad_x = output_like(x);
  with_type(x, [&]<class T>(T*) {
    const int64_t rows =
        std::max({Lines<T>(x).rows, Lines<T>(grad_quantized).rows, Lines<T>(grad_x).rows});
    const Lines<T> in = Lines<T>(x).split(rows), from = Lines<T>(grad_quantized).split(rows),
                   to = Lines<T>(grad_x).split(rows);
    const bool flat = in.is_contiguous() && from.is_contiguous() && to.is_contiguous();
    const ChannelConstants shift(flat, in.dim, [&](int64_t d) { return grids[d].shift; });
    const ChannelConstants slope(flat, in.dim, [&](int64_t d) { return grids[d].slope; });
    for_each_tile(
        flat, in.rows, in.columns, in.dim,
        [&](const TileVector& vector, int32_t*) {
          const int j = vector.index;
          vector.set(
              to, vector.get(from) * channel_slope<Simd>(vector.get(in), shift[j], slope[j], hard));
        },
        [](int64_t, int, const int32_t*) {});
  });
  return grad_x;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("finite_scalar_quantize", TORCH_BOX(&genperf::finite_scalar_quantize));
  m.impl("finite_scalar_quantize_backward", TORCH_BOX(&genperf::finite_scalar_quantize_backward));
}
