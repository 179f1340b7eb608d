// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"
#include "code_statistics.h"
#include "vector_quantize.h"

namespace genperf {
namespace {

void check_positions(const char* op,
                     const char* name,
                     const Tensor& tensor,
                     ScalarType dtype,
                     const Tensor& x) {
  check_same_device(op, name, tensor, x);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has the wrong dtype.");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(2),
                  op, ": ", name, " must have shape [outer, inner] for x [outer, D, inner].");
}

void check_codes(const char* op, const char* name, const Tensor& codes, const Tensor& x) {
  check_same_device(op, name, codes, x);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == x.size(1), op, ": ", name,
                  " must have shape [K, D] for x [outer, D, inner].");
}

void check_x(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, op, ": x must have shape [outer, D, inner].");
}

std::tuple<Tensor, Tensor, Tensor> vector_quantize(Tensor x, Tensor codebook, Tensor indices) {
  constexpr const char* kOp = "vector_quantize";
  check_x(kOp, x);
  check_codes(kOp, "codebook", codebook, x);
  check_positions(kOp, "indices", indices, ScalarType::Long, x);
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor mse = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const Tensor partials =
      torch::stable::new_empty(x, {kVectorQuantizeBlocks, 2}, ScalarType::Double);

  VectorQuantizeParams params{};
  params.x = x.const_data_ptr();
  params.codebook = codebook.const_data_ptr();
  params.indices = data_of<int64_t>(indices);
  params.quantized = quantized.mutable_data_ptr();
  params.partials = mutable_data_of<double>(partials);
  params.mse = mutable_data_of<float>(mse);
  params.valid = mutable_data_of<int64_t>(valid);
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
  params.num_codes = codebook.size(0);
  params.x_strides = strides_of(x);
  params.quantized_strides = strides_of(quantized);
  params.code_stride = codebook.stride(0);
  params.code_channel_stride = codebook.stride(1);
  launch_vector_quantize(params, dtype_of(kOp, x), dtype_of(kOp, codebook), launch.stream());
  return {quantized, mse, valid};
}

Tensor vector_quantize_backward(std::optional<Tensor> grad_quantized,
                                std::optional<Tensor> grad_mse,
                                Tensor x,
                                Tensor codebook,
                                Tensor indices,
                                Tensor valid,
                                double commitment_weight,
                                bool rotation) {
  constexpr const char* kOp = "vector_quantize_backward";
  check_x(kOp, x);
  check_codes(kOp, "codebook", codebook, x);
  check_positions(kOp, "indices", indices, ScalarType::Long, x);
  check_scalar(kOp, "valid", valid, ScalarType::Long, x);
  if (grad_mse)
    check_scalar(kOp, "grad_mse", *grad_mse, ScalarType::Float, x);
  if (grad_quantized) {
    check_same_device(kOp, "grad_quantized", *grad_quantized, x);
    STD_TORCH_CHECK(grad_quantized->scalar_type() == x.scalar_type() &&
                        grad_quantized->dim() == 3 && grad_quantized->size(0) == x.size(0) &&
                        grad_quantized->size(1) == x.size(1) &&
                        grad_quantized->size(2) == x.size(2),
                    kOp, ": grad_quantized must have x's shape and dtype.");
  }
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  Tensor grad_x = torch::stable::empty_like(x);

  VectorQuantizeBackwardParams params{};
  params.grad_quantized = data_of<void>(grad_quantized);
  params.grad_mse = data_of<float>(grad_mse);
  params.x = x.const_data_ptr();
  params.codebook = codebook.const_data_ptr();
  params.indices = data_of<int64_t>(indices);
  params.valid = data_of<int64_t>(valid);
  params.grad_x = grad_x.mutable_data_ptr();
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
  params.num_codes = codebook.size(0);
  if (grad_quantized)
    params.grad_quantized_strides = strides_of(*grad_quantized);
  params.x_strides = strides_of(x);
  params.grad_x_strides = strides_of(grad_x);
  params.code_stride = codebook.stride(0);
  params.code_channel_stride = codebook.stride(1);
  params.commitment_weight = static_cast<float>(commitment_weight);
  params.rotation = rotation;
  launch_vector_quantize_backward(params, dtype_of(kOp, x), dtype_of(kOp, codebook),
                                  launch.stream());
  return grad_x;
}

// (sorted keys, their positions), the positions of one key in ascending order.
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
                  ": num_codes must lie between 0 and 2^31 - 1.");
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
  m.impl("vector_quantize", TORCH_BOX(&vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&vector_quantize_backward));
  m.impl("code_statistics", TORCH_BOX(&code_statistics));
}

}  // namespace genperf
