// SPDX-License-Identifier: Apache-2.0
//
// Softmax over the codes, one chunk of rows at a time, in the buffer of the matrix product that
// computed the chunk.
#include <torch/csrc/stable/library.h>

#include "cpu/softmax/rows.h"

namespace genperf {
namespace {

using namespace softmax;

void check_vector(const Tensor& t, int64_t length, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.numel() == length && t.is_contiguous() && t.scalar_type() == type, name,
                  " must be contiguous, with an entry for each row, and of its dtype");
}

float* floats(const Tensor& t, int64_t length, const char* name) {
  check_vector(t, length, ScalarType::Float, name);
  return static_cast<float*>(t.data_ptr());
}

Chunk chunk_of(const Tensor& logits,
               const std::optional<Tensor>& valid,
               const std::optional<Tensor>& indices,
               double temperature) {
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float,
      "logits must be contiguous float32 [rows, K]");
  const int64_t rows = logits.size(0), codes = logits.size(1);
  STD_TORCH_CHECK(codes > 0 && codes < int64_t{1} << 31,
                  "there must be at least one code and fewer than 2^31");
  Chunk chunk{static_cast<float*>(logits.data_ptr()),
              rows,
              codes,
              codes,
              inverse_of(temperature),
              nullptr,
              nullptr};
  if (valid) {
    check_vector(*valid, rows, ScalarType::Bool, "valid");
    chunk.valid = static_cast<const bool*>(valid->data_ptr());
  }
  if (indices) {
    check_vector(*indices, rows, ScalarType::Long, "indices");
    chunk.indices = static_cast<const int64_t*>(indices->data_ptr());
    check_range(chunk.indices, rows, codes);
  }
  return chunk;
}

SavedStatistics saved_of(const Tensor& largest,
                         const Tensor& log_sum,
                         const Tensor& mean,
                         int64_t rows) {
  return {floats(largest, rows, "largest"), floats(log_sum, rows, "log_sum"),
          floats(mean, rows, "mean")};
}

void code_softmax_rows(Tensor logits,
                       bool root,
                       double temperature,
                       std::optional<Tensor> valid,
                       std::optional<Tensor> indices,
                       Tensor largest,
                       Tensor log_sum,
                       Tensor mean,
                       Tensor value,
                       std::optional<Tensor> usage) {
  const Chunk chunk = chunk_of(logits, valid, indices, temperature);
  if (usage)
    check_vector(*usage, chunk.codes, ScalarType::Double, "usage");
  softmax_rows(chunk, root, saved_of(largest, log_sum, mean, chunk.rows),
               floats(value, chunk.rows, "value"),
               usage ? static_cast<double*>(usage->data_ptr()) : nullptr);
}

void code_softmax_rows_backward(Tensor logits,
                                bool root,
                                double temperature,
                                std::optional<Tensor> valid,
                                std::optional<Tensor> indices,
                                Tensor largest,
                                Tensor log_sum,
                                Tensor mean,
                                std::optional<Tensor> grad_value,
                                std::optional<Tensor> grad_usage) {
  const Chunk chunk = chunk_of(logits, valid, indices, temperature);
  gradient_rows(chunk, root, saved_of(largest, log_sum, mean, chunk.rows),
                grad_value ? floats(*grad_value, chunk.rows, "grad_value") : nullptr,
                grad_usage ? floats(*grad_usage, chunk.codes, "grad_usage") : nullptr);
}

void sample_code_rows(Tensor logits,
                      bool root,
                      double temperature,
                      std::optional<Tensor> seed,
                      int64_t first,
                      Tensor indices) {
  const Chunk chunk = chunk_of(logits, std::nullopt, std::nullopt, 1);
  check_vector(indices, chunk.rows, ScalarType::Long, "indices");
  const uint64_t number = seed_of(seed);
  sample_rows(chunk, root, float(temperature), seed ? &number : nullptr, first,
              static_cast<int64_t*>(indices.data_ptr()));
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("code_softmax_rows", TORCH_BOX(&genperf::code_softmax_rows));
  m.impl("code_softmax_rows_backward", TORCH_BOX(&genperf::code_softmax_rows_backward));
  m.impl("sample_code_rows", TORCH_BOX(&genperf::sample_code_rows));
}
