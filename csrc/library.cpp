// SPDX-License-Identifier: Apache-2.0
//
// The schemas of all ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(genperf, m) {
  // Vector quantization. x is [outer, D, inner] with any strides (inner is 1 for channels-last
  // data), and indices are [outer, inner]. An index of -1 marks a masked position.
  //
  // nearest_code also takes heads: x [heads, outer, D, inner] and codebook [heads, K, D]. On the
  // CPU it caches the packed codebooks.
  m.def("nearest_code(Tensor x, Tensor codebook, Tensor? mask, bool cosine) -> Tensor");
  // The k nearest codes, nearest first: indices and distances [..., outer, inner, k]. Distances
  // that are not wanted are empty.
  m.def(
      "nearest_codes(Tensor x, Tensor codebook, SymInt k, bool cosine, bool with_distances) -> "
      "(Tensor indices, Tensor distances)");
  m.def("forget_codebooks() -> ()");
  // The loss of vector_quantize is the mean squared error times `weight`.
  m.def(
      "vector_quantize(Tensor x, Tensor codebook, Tensor indices, float weight=1.0) -> (Tensor "
      "quantized, Tensor loss, Tensor valid)");
  m.def(
      "vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor x, Tensor "
      "codebook, Tensor indices, "
      "Tensor valid, float commitment_weight, bool rotation) -> Tensor");
  m.def(
      "vector_quantize_backward_codebook(Tensor grad_mse, Tensor x, Tensor codebook, Tensor "
      "indices, Tensor valid, float codebook_weight) -> Tensor");
  m.def(
      "code_statistics(Tensor x, Tensor indices, SymInt num_codes, Tensor? weights, Tensor? "
      "origins) "
      "-> (Tensor counts, Tensor sums)");
  // The update of codebooks [.., K, D] by EMA from the statistics of a batch. With `follow`,
  // averages of codes that were set from outside become those of these codes first.
  m.def(
      "codebook_ema(Tensor(a!) codebook, Tensor(b!) counts, Tensor(c!) sums, Tensor batch_counts, "
      "Tensor batch_sums, float decay, float eps, bool normalize, bool follow) -> ()");
  // Sums of k-means that do not depend on how the vectors are split: [2, K, D + 1] in float64, high
  // and low parts, with the total weight in the last column; limits are the largest magnitudes of
  // the summands and the weights. cluster_sums_add adds the vectors to sums or, with the codes of
  // `before`, moves those whose code is another. cluster_means are those of the sums, or the code
  // of `otherwise` without weight. Without a codebook, cluster_distances returns norms.
  m.def(
      "cluster_sums(Tensor x, Tensor indices, SymInt num_codes, Tensor? weights, Tensor? scale, "
      "Tensor limits, SymInt total) -> Tensor");
  m.def(
      "cluster_sums_add(Tensor(a!) sums, Tensor x, Tensor indices, Tensor? before, Tensor? "
      "weights, Tensor? scale, Tensor limits, SymInt total) -> ()");
  m.def("cluster_means(Tensor sums, Tensor otherwise) -> Tensor");
  m.def(
      "cluster_distances(Tensor x, Tensor? codebook, Tensor? indices, Tensor? scale, Tensor? "
      "mask=None) -> Tensor");

  // Softmax over all codes. x is [heads, outer, D, inner], codebook [heads, K, D]; mask and indices
  // are [heads, outer, inner]. `logits` is "distance", "squared_distance" or "dot". mean [heads] is
  // that of the entropies of the positions or, with indices, of their cross-entropies. entropy
  // [heads] is that of the mean probabilities, which are at least `floor` in the logarithm. usage
  // [heads, K] is the sum of the probabilities over the positions in float64. Both are empty with
  // indices. statistics is [3, heads, outer, inner]: the largest logit and, of (logit - largest) /
  // temperature, the log of the sum of the exponentials and the mean under the softmax. Gradients
  // that are not wanted are empty.
  m.def(
      "code_softmax(Tensor x, Tensor codebook, Tensor? mask, Tensor? indices, str logits, float "
      "temperature, float floor) -> (Tensor mean, Tensor entropy, Tensor usage, Tensor "
      "statistics)");
  m.def(
      "code_softmax_backward(Tensor? grad_mean, Tensor? grad_entropy, Tensor x, Tensor codebook, "
      "Tensor? mask, Tensor? indices, Tensor usage, Tensor statistics, str logits, float "
      "temperature, float floor, bool of_x, bool of_codebook) -> (Tensor grad_x, Tensor "
      "grad_codebook)");
  // Class k of position p of head h is perturbed by Gumbel number k of row first + p with seed + h,
  // or not perturbed without a seed.
  m.def(
      "sample_code(Tensor x, Tensor codebook, Tensor? mask, Tensor? seed, SymInt first, str "
      "logits, float temperature) -> Tensor");
  // The same on the CPU for small inputs. x has any number of dimensions, of which `channel` holds
  // the vectors and, with a codebook [heads, K, D] instead of [K, D], the first holds the heads.
  // form is the number of the kind of logits. Indices have the shape of x without its channels.
  m.def(
      "small_code_softmax(Tensor x, Tensor codebook, Tensor? mask, Tensor? indices, int form, "
      "float temperature, float floor, int channel) -> (Tensor mean, Tensor entropy, Tensor usage, "
      "Tensor statistics)");
  m.def(
      "small_code_softmax_backward(Tensor? grad_mean, Tensor? grad_entropy, Tensor x, Tensor "
      "codebook, Tensor? mask, Tensor? indices, Tensor usage, Tensor statistics, int form, float "
      "temperature, float floor, int channel, bool of_x, bool of_codebook) -> (Tensor grad_x, "
      "Tensor grad_codebook)");
  m.def(
      "small_sample_code(Tensor x, Tensor codebook, Tensor? mask, Tensor? seed, int first, int "
      "form, float temperature, int channel) -> Tensor");
  // The CPU steps of these ops, on contiguous float32 logits [rows, K], or on squared distances
  // with `root`, where the logit is minus the root. The first overwrites logits with exp(logit -
  // largest) and adds to usage, in float64. The second overwrites them with the gradient.
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
  // Finite scalar and lookup-free quantization, on x [outer, D, inner] with any strides. indices
  // are [outer, inner], or empty if not wanted. lookup_free_quantize_backward is that of the
  // spherical form.
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
  // Entropies of lookup-free codes on the CPU, for small inputs. x has any number of dimensions, of
  // which `channel` holds the bits. mass [groups, 2^group] is the sum of the probabilities.
  m.def(
      "small_lookup_free_entropy(Tensor x, Tensor? mask, float sharpness, int group, float floor, "
      "int channel) -> (Tensor sample, Tensor entropy, Tensor mass)");
  m.def(
      "small_lookup_free_entropy_backward(Tensor? grad_sample, Tensor? grad_entropy, Tensor mass, "
      "Tensor x, Tensor? mask, float sharpness, int group, float floor, int channel) -> Tensor");

  // Residual quantization: each codebook quantizes the residual of the previous one. codebooks are
  // [Q, K, D], in float64 for a float64 x, else float32. indices are [outer, inner, Q], with -1
  // where the mask is False and for codebooks from `num_quantizers` on, an int64 of one element in
  // 1 ... Q. mse is [Q]. The gradient of `quantized` is passed on once, or with per_quantizer once
  // through every quantizer. Statistics are of the residuals that a quantizer gets or, with
  // `after`, of those that it leaves.
  m.def(
      "residual_vector_quantize(Tensor x, Tensor codebooks, Tensor? mask, Tensor? num_quantizers, "
      "bool "
      "cosine) -> (Tensor quantized, Tensor indices, Tensor mse, Tensor valid)");
  // The same on CUDA by a search and a launch for each codebook.
  m.def(
      "residual_vector_quantize_in_steps(Tensor x, Tensor codebooks, Tensor? mask, Tensor? "
      "num_quantizers, bool cosine) -> (Tensor quantized, Tensor indices, Tensor mse, Tensor "
      "valid)");
  m.def(
      "residual_vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor x, "
      "Tensor codebooks, Tensor indices, Tensor valid, float commitment_weight, bool rotation, "
      "bool per_quantizer) -> Tensor");
  m.def(
      "residual_vector_quantize_backward_codebooks(Tensor grad_mse, Tensor x, Tensor codebooks, "
      "Tensor indices, Tensor valid, float codebook_weight) -> Tensor");
  m.def(
      "residual_code_statistics(Tensor x, Tensor codebooks, Tensor indices, bool after) -> (Tensor "
      "counts, Tensor sums)");

  // Sampling. Noise is given, or a function of `seed`, an int64 of one element on the op's device
  // or the CPU, and of the number of a row (noise.h). Outputs that are not wanted are empty.
  //
  // mean and all tensors of its shape are [B, rows, columns] with any strides. Element (r, c) of
  // sample b is normal number r * columns + c of row first + b. Both moments of the prior are
  // given, or neither. Gradients are written to given tensors, so that two of them can share a
  // packed tensor.
  m.def(
      "gaussian_sample(Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, "
      "Tensor? noise, Tensor? seed, SymInt first, float free_bits, bool float32_sample) -> (Tensor "
      "sample, "
      "Tensor kl)");
  m.def(
      "gaussian_sample_backward(Tensor(a!) grad_mean, Tensor(b!) grad_logvar, Tensor(c!)? "
      "grad_prior_mean, Tensor(d!)? grad_prior_logvar, Tensor? grad_sample, Tensor? grad_kl, "
      "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? noise, "
      "Tensor? seed, SymInt first, float free_bits) -> ()");
  // The same on the CPU of contiguous moments of any number of dimensions that are packed along
  // `dim`. Noise and the gradient of the sample are contiguous, of the shape of the sample.
  m.def(
      "gaussian_sample_packed(Tensor moments, Tensor? noise, Tensor? seed, SymInt first, int dim, "
      "float free_bits, bool float32_sample) -> (Tensor sample, Tensor kl)");
  m.def(
      "gaussian_sample_packed_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor moments, "
      "Tensor? noise, Tensor? seed, SymInt first, int dim, float free_bits) -> Tensor");
  // logits and noise are [outer, K, inner] with any strides. Class k at position p = outer * inner
  // is Gumbel number k of row first + p. temperature, a float32 of one element, replaces tau.
  // statistics is [4, outer, inner]: the largest logit, the log of the sum of exp(logit - largest),
  // the largest perturbed logit, and on CUDA the log of its sum of exp((perturbed - largest) /
  // tau), on the CPU the sum of q log q with q = softmax(logits).
  m.def(
      "gumbel_sample(Tensor logits, Tensor? temperature, float tau, Tensor? noise, Tensor? seed, "
      "SymInt first, bool hard, bool dense) -> (Tensor sample, Tensor indices, Tensor kl, Tensor "
      "statistics)");
  // grad_logits may be grad_sample, which is then overwritten.
  m.def(
      "gumbel_sample_backward(Tensor(a!) grad_logits, Tensor? grad_sample, Tensor? grad_kl, Tensor "
      "logits, Tensor statistics, Tensor? temperature, float tau, Tensor? noise, Tensor? seed, "
      "SymInt "
      "first) -> ()");

  // Gradient penalties. real, fake and gradients are [B, rows, columns] with any strides, and
  // weight is [B]. Without fake, real is perturbed by scale times uniform number r * columns + c of
  // row first + b. A drawn weight of sample b is the first word of quad 2^63 of that row.
  m.def(
      "interpolate(Tensor real, Tensor? fake, Tensor? scale, Tensor? weight, Tensor? seed, SymInt "
      "first) -> Tensor");
  m.def(
      "interpolate_backward(Tensor grad_mixed, Tensor? real, Tensor? fake, Tensor? weight, Tensor? "
      "seed, SymInt first) -> (Tensor grad_real, Tensor grad_fake, Tensor grad_weight)");
  m.def(
      "gradient_norm_penalty(Tensor gradients, float center, bool one_sided) -> (Tensor penalty, "
      "Tensor norms)");
  m.def(
      "gradient_norm_penalty_backward(Tensor grad_penalty, Tensor gradients, Tensor norms, float "
      "center, bool one_sided) -> Tensor");

  // features is contiguous [N, B, C].
  m.def("minibatch_similarity(Tensor features) -> Tensor");
  m.def("minibatch_similarity_backward(Tensor grad_similarity, Tensor features) -> Tensor");

  // Frechet distance. a is [n, n] with any strides, and its lower triangle is read. The eigenvalues
  // are ascending.
  m.def("symmetric_eigenvalues(Tensor a) -> Tensor");
}
