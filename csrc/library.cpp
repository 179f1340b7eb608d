// SPDX-License-Identifier: Apache-2.0
//
// Every op of the library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(genperf, m) {
  // Vector quantisation. x is [outer, D, inner] with any strides (inner is 1 for channels-last
  // data), indices are [outer, inner], and an index of -1 marks a position that is masked out.
  //
  // nearest_code also takes heads: x [heads, outer, D, inner], codebook [heads, K, D]. On the CPU
  // it keeps the codebooks that it packed last.
  m.def("nearest_code(Tensor x, Tensor codebook, Tensor? mask, bool cosine) -> Tensor");
  m.def("forget_codebooks() -> ()");
  m.def(
      "vector_quantize(Tensor x, Tensor codebook, Tensor indices) -> (Tensor quantized, Tensor "
      "mse, Tensor valid)");
  m.def(
      "vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor x, Tensor "
      "codebook, Tensor indices, "
      "Tensor valid, float commitment_weight, bool rotation) -> Tensor");
  m.def(
      "code_statistics(Tensor x, Tensor indices, SymInt num_codes, Tensor? weights, Tensor? "
      "origins) "
      "-> (Tensor counts, Tensor sums)");

  // Residual quantisation: level i quantises what the levels before it leave. codebooks are [Q, K,
  // D] of the arithmetic's dtype: float64 for a float64 x, else float32. indices are [outer, inner,
  // Q], -1 where the mask is False and in the levels from number `levels` on, an int64 of one
  // element, 1 ... Q. mse is [Q]. The gradient of `quantized` passes once, or with per_level once
  // through every level. Statistics are of the residuals that the levels see, or that they leave.
  m.def(
      "residual_vector_quantize(Tensor x, Tensor codebooks, Tensor? mask, Tensor? levels, bool "
      "cosine) -> (Tensor quantized, Tensor indices, Tensor mse, Tensor valid)");
  m.def(
      "residual_vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor x, "
      "Tensor codebooks, Tensor indices, Tensor valid, float commitment_weight, bool rotation, "
      "bool per_level) -> Tensor");
  m.def(
      "residual_code_statistics(Tensor x, Tensor codebooks, Tensor indices, bool left) -> (Tensor "
      "counts, Tensor sums)");
