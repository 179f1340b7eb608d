// SPDX-License-Identifier: Apache-2.0
//
// Statistics of x and of the residuals of x, and the gradients of codebooks, which are such sums.
#include "bindings.h"
#include "code_statistics.h"

namespace genperf {
namespace {

constexpr const char* kStatistics = "code_statistics";
constexpr const char* kResidualStatistics = "residual_code_statistics";

// The parameters for indices [outer, inner, Q] of Q levels of `num_codes` codes.
CodeStatisticsParams params_of(const char* op,
                               const Tensor& x,
                               const Tensor& indices,
                               int64_t levels,
                               int64_t num_codes) {
  const int64_t positions = x.size(0) * x.size(2);
  STD_TORCH_CHECK(levels * num_codes < UINT32_MAX && positions * levels < UINT32_MAX, op,
                  ": takes fewer than 2^32 - 1 codes and positions, times the number of levels.");
  CodeStatisticsParams params{};
  params.x = x.const_data_ptr();
  params.indices = data_of<int64_t>(indices);
  params.outer = x.size(0);
  params.channels = x.size(1);
  params.inner = x.size(2);
  params.num_codes = num_codes;
  params.levels = levels;
  params.x_strides = strides_of(x);
  return params;
}

void run(const char* op,
         CodeStatisticsParams& params,
         const Tensor& x,
         const Tensor& codebooks,
         const Launch& launch) {
  const DType type = dtype_of(op, x);
  const Tensor workspace =
      torch::stable::new_empty(x, {code_statistics_workspace(params, type)}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  launch_code_statistics(params, type, dtype_of(op, codebooks), launch.stream());
}

void set_codebook(CodeStatisticsParams& params, const Tensor& codebook) {
  params.codebooks = codebook.const_data_ptr();
  params.code_stride = codebook.stride(0);
  params.code_channel_stride = codebook.stride(1);
  params.subtract_own = true;
}

std::tuple<Tensor, Tensor> code_statistics(Tensor x,
                                           Tensor indices,
                                           int64_t num_codes,
                                           std::optional<Tensor> weights,
                                           std::optional<Tensor> origins) {
  check_x(kStatistics, x);
  check_positions(kStatistics, "indices", indices, ScalarType::Long, x);
  STD_TORCH_CHECK(num_codes >= 0 && num_codes <= INT32_MAX, kStatistics,
                  ": num_codes must be between 0 and 2^31 - 1.");
  if (weights)
    check_positions(kStatistics, "weights", *weights, ScalarType::Float, x);
  if (origins) {
    check_codes(kStatistics, "origins", *origins, x);
    STD_TORCH_CHECK(origins->size(0) == num_codes, kStatistics,
                    ": origins must have num_codes rows.");
  }
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  weights = contiguous(weights);
  Tensor counts = torch::stable::new_empty(x, {num_codes}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {num_codes, x.size(1)}, ScalarType::Float);
  CodeStatisticsParams params = params_of(kStatistics, x, indices, 1, num_codes);
  params.weights = data_of<float>(weights);
  params.counts = mutable_data_of<float>(counts);
  params.sums = sums.mutable_data_ptr();
  if (origins)
    set_codebook(params, *origins);
  run(kStatistics, params, x, origins ? *origins : x, launch);
  return {counts, sums};
}

Tensor vector_quantize_backward_codebook(Tensor grad_loss,
                                         Tensor x,
                                         Tensor codebook,
                                         Tensor indices,
                                         Tensor valid,
                                         double codebook_weight) {
  constexpr const char* kOp = "vector_quantize_backward_codebook";
  check_x(kOp, x);
  check_codes(kOp, "codebook", codebook, x);
  check_positions(kOp, "indices", indices, ScalarType::Long, x);
  check_scalar(kOp, "valid", valid, ScalarType::Long, x);
  check_scalar(kOp, "grad_loss", grad_loss, ScalarType::Float, x);
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  Tensor grad_codebook = torch::stable::new_empty(codebook, {codebook.size(0), codebook.size(1)});
  CodeStatisticsParams params = params_of(kOp, x, indices, 1, codebook.size(0));
  params.sums = grad_codebook.mutable_data_ptr();
  params.grad = data_of<float>(grad_loss);
  params.valid = data_of<int64_t>(valid);
  params.factor = static_cast<float>(-2 * codebook_weight);
  set_codebook(params, codebook);
  run(kOp, params, x, codebook, launch);
  return grad_codebook;
}

CodeStatisticsParams residual_params_of(const char* op,
                                        const Tensor& x,
                                        const Tensor& codebooks,
                                        const Tensor& indices) {
  check_residual(op, x, codebooks, indices);
  CodeStatisticsParams params = params_of(op, x, indices, codebooks.size(0), codebooks.size(1));
  params.codebooks = codebooks.const_data_ptr();
  params.codebook_stride = codebooks.stride(0);
  params.code_stride = codebooks.stride(1);
  params.code_channel_stride = codebooks.stride(2);
  params.residual = true;
  return params;
}

std::tuple<Tensor, Tensor> residual_code_statistics(Tensor x,
                                                    Tensor codebooks,
                                                    Tensor indices,
                                                    bool after) {
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  CodeStatisticsParams params = residual_params_of(kResidualStatistics, x, codebooks, indices);
  const int64_t levels = codebooks.size(0), codes = codebooks.size(1);
  Tensor counts = torch::stable::new_empty(x, {levels, codes}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {levels, codes, x.size(1)}, ScalarType::Float);
  params.counts = mutable_data_of<float>(counts);
  params.sums = sums.mutable_data_ptr();
  params.subtract_own = after;
  run(kResidualStatistics, params, x, codebooks, launch);
  return {counts, sums};
}

Tensor residual_vector_quantize_backward_codebooks(Tensor grad_losses,
                                                   Tensor x,
                                                   Tensor codebooks,
                                                   Tensor indices,
                                                   Tensor valid,
                                                   double codebook_weight) {
  constexpr const char* kOp = "residual_vector_quantize_backward_codebooks";
  const Launch launch(x);
  indices = torch::stable::contiguous(indices);
  grad_losses = torch::stable::contiguous(grad_losses);
  CodeStatisticsParams params = residual_params_of(kOp, x, codebooks, indices);
  check_scalar(kOp, "valid", valid, ScalarType::Long, x);
  check_losses(kOp, grad_losses, codebooks, x);
  Tensor grad_codebooks = torch::stable::new_empty(
      codebooks, {codebooks.size(0), codebooks.size(1), codebooks.size(2)});
  params.sums = grad_codebooks.mutable_data_ptr();
  params.grad = data_of<float>(grad_losses);
  params.valid = data_of<int64_t>(valid);
  params.factor = static_cast<float>(-2 * codebook_weight);
  params.subtract_own = true;
  run(kOp, params, x, codebooks, launch);
  return grad_codebooks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genperf, CUDA, m) {
  m.impl("code_statistics", TORCH_BOX(&code_statistics));
  m.impl("vector_quantize_backward_codebook", TORCH_BOX(&vector_quantize_backward_codebook));
  m.impl("residual_code_statistics", TORCH_BOX(&residual_code_statistics));
  m.impl("residual_vector_quantize_backward_codebooks",
         TORCH_BOX(&residual_vector_quantize_backward_codebooks));
}

}  // namespace genperf
