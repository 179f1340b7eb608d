// SPDX-License-Identifier: Apache-2.0
#include "residual_vector_quantize.h"

#include "bindings.h"

namespace genperf {
namespace {

constexpr const char* kForward = "residual_vector_quantize";
constexpr const char* kBackward = "residual_vector_quantize_backward";

template <typename Params>
void set_codebooks(Params& params, const Tensor& codebooks) {
  params.codebooks = static_cast<const float*>(codebooks.const_data_ptr());
  params.codebook_stride = codebooks.stride(0);
  params.code_stride = codebooks.stride(1);
  params.code_channel_stride = codebooks.stride(2);
  params.levels = codebooks.size(0);
  params.num_codes = codebooks.size(1);
}

template <typename Params>
void set_sizes(Params& params, const Tensor& x) {
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
}

// The search is a Triton kernel, which Python launches.
Tensor search(const Tensor& x,
              const Tensor& codebook,
              const std::optional<Tensor>& mask,
              bool cosine) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(codebook), from(mask), from(cosine)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("genperf::nearest_code", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// For sizes at which the Triton kernel that runs all levels at once does not pay.
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_vector_quantize_in_steps(
    Tensor x,
    Tensor codebooks,
    std::optional<Tensor> mask,
    std::optional<Tensor> num_quantizers,
    bool cosine) {
  check_residual_codebooks(kForward, x, codebooks);
  if (mask)
    check_positions(kForward, "mask", *mask, ScalarType::Bool, x);
  if (num_quantizers)
    check_scalar(kForward, "num_quantizers", *num_quantizers, ScalarType::Long, x);
  const Launch launch(x);
  mask = contiguous(mask);
  const int64_t levels = codebooks.size(0);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2), levels}, ScalarType::Long);
  Tensor mse = torch::stable::new_empty(x, {levels}, ScalarType::Float);
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const Tensor residual = levels > 1 ? empty_like(x, ScalarType::Float) : x;
  const Tensor partials =
      torch::stable::new_empty(x, {kResidualStepPartials, 2}, ScalarType::Double);
  const Tensor ticket = ticket_of(x, launch);
  std::optional<Tensor> running = mask;
  if (num_quantizers && levels > 1)
    running = torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Bool);

  ResidualStepParams params{};
  set_sizes(params, x);
  set_codebooks(params, codebooks);
  params.indices = mutable_data_of<int64_t>(indices);
  params.mask = data_of<bool>(mask);
  params.num_levels = data_of<int64_t>(num_quantizers);
  params.partials = mutable_data_of<double>(partials);
  params.ticket = mutable_data_of<unsigned>(ticket);
  params.mse = mutable_data_of<float>(mse);
  params.valid = mutable_data_of<int64_t>(valid);
  params.residual_strides = strides_of(residual);
  params.quantized_strides = strides_of(quantized);
  for (int64_t level = 0; level < levels; ++level) {
    const Tensor& source = level == 0 ? x : residual;
    const bool last = level == levels - 1;
    const Tensor found = torch::stable::contiguous(search(
        source, torch::stable::select(codebooks, 0, level), level == 0 ? mask : running, cosine));
    params.level = level;
    params.source = source.const_data_ptr();
    params.source_strides = strides_of(source);
    params.found = data_of<int64_t>(found);
    params.residual = last ? nullptr : mutable_data_of<float>(residual);
    params.next_mask = num_quantizers && !last ? mutable_data_of<bool>(*running) : nullptr;
    params.quantized = last ? quantized.mutable_data_ptr() : nullptr;
    launch_residual_step(params, dtype_of(kForward, source), dtype_of(kForward, x),
                         launch.stream());
  }
  return {quantized, indices, mse, valid};
}

Tensor residual_vector_quantize_backward(std::optional<Tensor> grad_quantized,
                                         std::optional<Tensor> grad_mse,
                                         Tensor x,
                                         Tensor codebooks,
                                         Tensor indices,
                                         Tensor valid,
                                         double commitment_weight,
                                         bool rotation,
                                         bool per_quantizer) {
  check_residual(kBackward, x, codebooks, indices);
  check_scalar(kBackward, "valid", valid, ScalarType::Long, x);
  if (grad_quantized)
    check_like(kBackward, "grad_quantized", *grad_quantized, x);
  if (grad_mse)
    check_losses(kBackward, *grad_mse, codebooks, x);
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  grad_mse = contiguous(grad_mse);
  Tensor grad_x = torch::stable::empty_like(x);

  ResidualBackwardParams params{};
  set_sizes(params, x);
  set_codebooks(params, codebooks);
  params.grad_quantized = data_of<void>(grad_quantized);
  params.grad_mse = data_of<float>(grad_mse);
  params.x = x.const_data_ptr();
  params.indices = data_of<int64_t>(indices);
  params.valid = data_of<int64_t>(valid);
  params.grad_x = grad_x.mutable_data_ptr();
  if (grad_quantized)
    params.grad_quantized_strides = strides_of(*grad_quantized);
  params.x_strides = strides_of(x);
  params.grad_x_strides = strides_of(grad_x);
  params.commitment_weight = static_cast<float>(commitment_weight);
  params.rotation = rotation;
  params.per_quantizer = per_quantizer;
  const DType type = dtype_of(kBackward, x);
  const int64_t bytes = residual_backward_scratch(params, type);
  std::optional<Tensor> scratch;
  if (bytes > 0) {
    scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    params.scratch = static_cast<float*>(scratch->mutable_data_ptr());
  }
  launch_residual_backward(params, type, launch.stream());
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("residual_vector_quantize_in_steps", TORCH_BOX(&residual_vector_quantize_in_steps));
  m.impl("residual_vector_quantize_backward", TORCH_BOX(&residual_vector_quantize_backward));
}

}  // namespace genperf
