// SPDX-License-Identifier: Apache-2.0
//
// Every op of the library. In all of them x is [outer, D, inner] with any strides (inner is 1 for
// channels-last data), indices are [outer, inner], and an index of -1 marks a position that is
// masked out.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(genperf, m) {
  m.def("nearest_code(Tensor x, Tensor codebook, Tensor? mask, bool cosine) -> Tensor");
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
}
