// SPDX-License-Identifier: Apache-2.0
#include "vector_quantize.h"

#include "bindings.h"

namespace genperf {
namespace {

std::tuple<Tensor, Tensor, Tensor> vector_quantize(Tensor x,
                                                   Tensor codebook,
                                                   Tensor indices,
                                                   double weight) {
  constexpr const char* kOp = "vector_quantize";
  check_x(kOp, x);
  check_codes(kOp, "codebook", codebook, x);
  check_positions(kOp, "indices", indices, ScalarType::Long, x);
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const Tensor partials =
      torch::stable::new_empty(x, {kVectorQuantizePartials, 2}, ScalarType::Double);
  const Tensor ticket = ticket_of(x, launch);

  VectorQuantizeParams params{};
  params.x = x.const_data_ptr();
  params.codebook = codebook.const_data_ptr();
  params.indices = data_of<int64_t>(indices);
  params.quantized = quantized.mutable_data_ptr();
  params.partials = mutable_data_of<double>(partials);
  params.ticket = mutable_data_of<unsigned>(ticket);
  params.loss = mutable_data_of<float>(loss);
  params.valid = mutable_data_of<int64_t>(valid);
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
  params.num_codes = codebook.size(0);
  params.x_strides = strides_of(x);
  params.quantized_strides = strides_of(quantized);
  params.code_stride = codebook.stride(0);
  params.code_channel_stride = codebook.stride(1);
  params.weight = static_cast<float>(weight);
  launch_vector_quantize(params, dtype_of(kOp, x), dtype_of(kOp, codebook), launch.stream());
  return {quantized, loss, valid};
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("vector_quantize", TORCH_BOX(&vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&vector_quantize_backward));
}

}  // namespace genperf
