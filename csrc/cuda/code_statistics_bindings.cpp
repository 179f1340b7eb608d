// SPDX-License-Identifier: Apache-2.0
#include "code_statistics.h"

#include "bindings.h"

namespace genperf {
namespace {

// Returns the sorted keys and their positions, in ascending order for equal keys.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> code_statistics(Tensor x,
                                           Tensor indices,
                                           int64_t num_codes,
                                           std::optional<Tensor> weights,
                                           std::optional<Tensor> origins) {
  constexpr const char* kOp = "code_statistics";
  check_x(kOp, x);
  check_positions(kOp, "indices", indices, ScalarType::Long, x);
  STD_TORCH_CHECK(num_codes >= 0 && num_codes <= INT32_MAX, kOp,
                  ": num_codes must be between 0 and 2^31 - 1.");
  if (weights)
    check_positions(kOp, "weights", *weights, ScalarType::Float, x);
  if (origins) {
    check_codes(kOp, "origins", *origins, x);
    STD_TORCH_CHECK(origins->size(0) == num_codes, kOp, ": origins must have num_codes rows.");
  }
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  if (weights)
    weights = torch::stable::contiguous(*weights);
  const int64_t channels = x.size(1);
  const int64_t positions = x.size(0) * x.size(2);
  Tensor counts = torch::stable::new_empty(x, {num_codes}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {num_codes, channels}, ScalarType::Float);

  const Tensor keys = torch::stable::new_empty(
      x, {positions}, num_codes <= kMaxShortCodes ? ScalarType::Short : ScalarType::Int);
  launch_code_keys({data_of<int64_t>(indices), keys.mutable_data_ptr(), positions, num_codes},
                   launch.stream());
  const auto [sorted, order] = stable_sort(keys);
  const Tensor offsets = torch::stable::new_empty(x, {num_codes + 1}, ScalarType::Long);
  const int64_t chunks = (positions + kCodeStatisticsChunk - 1) / kCodeStatisticsChunk;
  const Tensor partials =
      torch::stable::new_empty(x, {chunks, 2, channels + 1}, ScalarType::Double);

  CodeStatisticsParams params{};
  params.x = x.const_data_ptr();
  params.indices = data_of<int64_t>(indices);
  params.weights = data_of<float>(weights);
  params.origins = data_of<void>(origins);
  params.keys = sorted.const_data_ptr();
  params.order = data_of<int64_t>(order);
  params.offsets = mutable_data_of<int64_t>(offsets);
  params.partials = mutable_data_of<double>(partials);
  params.counts = mutable_data_of<float>(counts);
  params.sums = mutable_data_of<float>(sums);
  params.outer = x.size(0);
  params.channels = channels;
  params.inner = x.size(2);
  params.num_codes = num_codes;
  params.x_strides = strides_of(x);
  if (origins) {
    params.origin_stride = origins->stride(0);
    params.origin_channel_stride = origins->stride(1);
  }
  launch_code_statistics(params, dtype_of(kOp, x), dtype_of(kOp, origins ? *origins : x),
                         launch.stream());
  return {counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("code_statistics", TORCH_BOX(&code_statistics));
}

}  // namespace genperf
