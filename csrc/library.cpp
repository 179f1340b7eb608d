// SPDX-License-Identifier: Apache-2.0
//
// Every op of the library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(genperf, m) {
  // Vector quantization. x is [outer, D, inner] with any strides (inner is 1 for channels-last
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

  // Softmax over all codes: x is [heads, outer, D, inner], codebook [heads, K, D], mask and indices
  // are [heads, outer, inner]. `logits` is "distance", "squared_distance" or "dot". value is the
  // entropy of each position or, with indices, its cross-entropy; usage is the sum of the
  // probabilities over the positions, float64, without elements where there are indices. statistics
  // is [3, heads, outer, inner]: the largest logit and, of (logit - largest) / temperature, the log
  // of the sum of the exponentials and the mean under the softmax. A gradient that is not asked for
  // has no elements.
  m.def(
      "code_softmax(Tensor x, Tensor codebook, Tensor? mask, Tensor? indices, str logits, float "
      "temperature) -> (Tensor value, Tensor usage, Tensor statistics)");
  m.def(
      "code_softmax_backward(Tensor? grad_value, Tensor? grad_usage, Tensor x, Tensor codebook, "
      "Tensor? mask, Tensor? indices, Tensor statistics, str logits, float temperature, bool of_x, "
      "bool of_codebook) -> (Tensor grad_x, Tensor grad_codebook)");
  // Class k of position p of head h is perturbed by Gumbel number k of row first + p of seed + h;
  // without a seed by nothing.
  m.def(
      "sample_code(Tensor x, Tensor codebook, Tensor? mask, Tensor? seed, SymInt first, str "
      "logits, float temperature) -> Tensor");
  // Their steps on the CPU, on contiguous float32 logits [rows, K], or squared distances where the
  // logit is minus their `root`. The first leaves exp(logit - largest) behind and adds to usage,
  // float64; the second leaves the gradient.
  m.def(
      "code_softmax_rows(Tensor(a!) logits, bool root, float temperature, Tensor? valid, Tensor? "
      "indices, Tensor(b!) largest, Tensor(c!) log_sum, Tensor(d!) mean, Tensor(e!) value, "
      "Tensor(f!)? usage) -> ()");
  m.def(
      "code_softmax_rows_backward(Tensor(a!) logits, bool root, float temperature, Tensor? valid, "
      "Tensor? indices, Tensor largest, Tensor log_sum, Tensor mean, Tensor? grad_value, Tensor? "
      "grad_usage) -> ()");
  m.def(
      "sample_code_rows(Tensor logits, bool root, float temperature, Tensor? seed, int first, "
      "Tensor(a!) indices) -> ()");
  // Codes without a codebook, on x [outer, D, inner] with any strides; indices are [outer, inner],
  // or empty where they are not asked for. The second backward is that of the spherical form.
  m.def(
      "finite_scalar_quantize(Tensor x, int[] levels, bool symmetric, bool hard, bool indexed) -> "
      "(Tensor quantized, Tensor indices)");
  m.def(
      "finite_scalar_quantize_backward(Tensor grad_quantized, Tensor x, int[] levels, bool "
      "symmetric, bool hard) -> Tensor");
  m.def(
      "lookup_free_quantize(Tensor x, float scale, bool spherical) -> (Tensor quantized, Tensor "
      "indices)");
  m.def("lookup_free_quantize_backward(Tensor grad_quantized, Tensor x, float scale) -> Tensor");

  // Residual quantization: level i quantizes what the levels before it leave. codebooks are [Q, K,
  // D] of the arithmetic's dtype: float64 for a float64 x, else float32. indices are [outer, inner,
  // Q], -1 where the mask is False and in the levels from number `levels` on, an int64 of one
  // element, 1 ... Q. mse is [Q]. The gradient of `quantized` passes once, or with per_level once
  // through every level. Statistics are of the residuals that the levels see, or that they leave.
  m.def(
      "residual_vector_quantize(Tensor x, Tensor codebooks, Tensor? mask, Tensor? num_quantizers, "
      "bool "
      "cosine) -> (Tensor quantized, Tensor indices, Tensor mse, Tensor valid)");
  m.def(
      "residual_vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor x, "
      "Tensor codebooks, Tensor indices, Tensor valid, float commitment_weight, bool rotation, "
      "bool per_quantizer) -> Tensor");
  m.def(
      "residual_code_statistics(Tensor x, Tensor codebooks, Tensor indices, bool after) -> (Tensor "
      "counts, Tensor sums)");

  // Sampling. Noise is either given or a function of `seed`, an int64 of one element on the op's
  // device; noise.h says how. An output that is not asked for has no elements.
  //
  // mean and all that has its shape are [B, rows, columns] with any strides; element (r, c) of
  // sample b is normal number r * columns + c of row b. The prior is absent or whole. Gradients are
  // written to where they are wanted, so that two of them can share a packed tensor.
  m.def(
      "gaussian_sample(Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, "
      "Tensor? noise, Tensor? seed, float free_bits, bool float32_sample) -> (Tensor sample, "
      "Tensor kl)");
  m.def(
      "gaussian_sample_backward(Tensor(a!) grad_mean, Tensor(b!) grad_logvar, Tensor(c!)? "
      "grad_prior_mean, Tensor(d!)? grad_prior_logvar, Tensor? grad_sample, Tensor? grad_kl, "
      "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? noise, "
      "Tensor? seed, float free_bits) -> ()");
  // logits and noise are [outer, K, inner] with any strides; class k at position p = outer * inner
  // is Gumbel number k of row p. temperature, a float32 of one element, goes before tau. statistics
  // is [4, outer, inner]: the largest logit, the log of the sum of exp(logit - largest), and the
  // same two of the perturbed logits, the second with the temperature in it.
  m.def(
      "gumbel_sample(Tensor logits, Tensor? temperature, float tau, Tensor? noise, Tensor? seed, "
      "bool hard, bool dense) -> (Tensor sample, Tensor indices, Tensor kl, Tensor statistics)");
  // grad_logits may be grad_sample, which is then overwritten.
  m.def(
      "gumbel_sample_backward(Tensor(a!) grad_logits, Tensor? grad_sample, Tensor? grad_kl, Tensor "
      "logits, Tensor statistics, Tensor? temperature, float tau, Tensor? noise, Tensor? seed) -> "
      "()");

  // Gradient penalties. real, fake and gradients are [B, rows, columns] with any strides, weight is
  // [B]. Without fake, real is perturbed by scale times a uniform variate, number r * columns + c
  // of row b; the weight of sample b is the first word of quad 2^63 of row b.
  m.def(
      "interpolate(Tensor real, Tensor? fake, Tensor? scale, Tensor? weight, Tensor? seed) -> "
      "Tensor");
  m.def(
      "interpolate_backward(Tensor grad_mixed, Tensor? real, Tensor? fake, Tensor? weight, Tensor? "
      "seed) -> (Tensor grad_real, Tensor grad_fake, Tensor grad_weight)");
  m.def(
      "gradient_norm_penalty(Tensor gradients, float center, bool one_sided) -> (Tensor penalty, "
      "Tensor norms)");
  m.def(
      "gradient_norm_penalty_backward(Tensor grad_penalty, Tensor gradients, Tensor norms, float "
      "center, bool one_sided) -> Tensor");

  // features is contiguous [N, B, C].
  m.def("minibatch_similarity(Tensor features) -> Tensor");
  m.def("minibatch_similarity_backward(Tensor grad_similarity, Tensor features) -> Tensor");

  // Frechet distance. a is [n, n] with any strides, of which the lower triangle is read; ascending.
  m.def("symmetric_eigenvalues(Tensor a) -> Tensor");
}
