// SPDX-License-Identifier: Apache-2.0
//
// Samples and gradients of diagonal Gaussians, of moments in two tensors or packed in one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/outputs.h"
#include "cpu/common/positions.h"
#include "cpu/gaussian/segments.h"

namespace genperf {
namespace {

using namespace gaussian;

void check_inputs(const Tensor& mean,
                  const Tensor& logvar,
                  const std::optional<Tensor>& prior_mean,
                  const std::optional<Tensor>& prior_logvar,
                  const std::optional<Tensor>& noise,
                  const std::optional<Tensor>& seed) {
  check_rows(mean, mean, true, "mean");
  check_rows(logvar, mean, true, "logvar");
  STD_TORCH_CHECK(prior_mean.has_value() == prior_logvar.has_value(),
                  "prior_mean and prior_logvar must both be given, or neither");
  if (prior_mean.has_value()) {
    check_rows(*prior_mean, mean, true, "prior_mean");
    check_rows(*prior_logvar, mean, true, "prior_logvar");
  }
  STD_TORCH_CHECK(noise.has_value() || seed.has_value(), "noise or a seed must be given");
  if (noise.has_value())
    check_rows(*noise, mean, false, "noise");
}

// Writes the sample and returns the KL of each sample of the batch.
template <class T>
Tensor sample_all(const Blocks& blocks,
                  const Moments<T>& in,
                  const NoiseSource& source,
                  float free_bits,
                  const Rows<T>& out,
                  const Tensor& like) {
  Tensor kl = torch::stable::new_empty(like, {blocks.samples}, ScalarType::Float);
  const Buffer<double> partial(blocks.samples * blocks.per_sample);
  std::fill_n(partial.get(), blocks.samples * blocks.per_sample, 0.0);
  const auto segment = in.prior_mean ? sample_segment<true, T> : sample_segment<false, T>;
  blocks.for_each_segment(in.noise ? nullptr : &source, [&](int64_t block, int64_t b, int64_t row,
                                                            int64_t column, int64_t count,
                                                            const float* drawn) {
    segment(in.at(b, row, column), drawn, free_bits, out.at(b, row, column), count, partial[block]);
  });
  float* total = static_cast<float*>(kl.mutable_data_ptr());
  for (int64_t b = 0; b < blocks.samples; ++b) {
    double value = 0;
    for (int64_t i = 0; i < blocks.per_sample; ++i)
      value += partial[b * blocks.per_sample + i];
    total[b] = float(value);
  }
  return kl;
}

std::tuple<Tensor, Tensor> gaussian_sample(const Tensor& mean,
                                           const Tensor& logvar,
                                           std::optional<Tensor> prior_mean,
                                           std::optional<Tensor> prior_logvar,
                                           std::optional<Tensor> noise,
                                           std::optional<Tensor> seed,
                                           int64_t first,
                                           double free_bits,
                                           bool float32_sample) {
  check_inputs(mean, logvar, prior_mean, prior_logvar, noise, seed);
  Tensor sample = output_like(mean);
  if (float32_sample)
    sample = torch::stable::to(sample, ScalarType::Float);
  std::optional<Tensor> kl;
  with_type(mean, [&]<class T>(T*) {
    const Moments<T> in{Rows<T>(mean), Rows<T>(logvar), Rows<T>(prior_mean), Rows<T>(prior_logvar),
                        Rows<T>(noise)};
    kl = sample_all(Blocks(mean), in, {seed_of(seed), first}, float(free_bits), Rows<T>(sample),
                    mean);
  });
  return {sample, *kl};
}

// Contiguous moments that are packed along `dim`, as [B, rows, 2 * columns]; and what has the shape
// of a half.
struct Packed {
  int64_t batch, rows = 1, columns = 1;
  std::vector<int64_t> half;

  Packed(const Tensor& moments, int64_t dim) : batch(moments.size(0)) {
    STD_TORCH_CHECK(
        moments.is_contiguous() && dim > 0 && dim < moments.dim() && moments.size(dim) % 2 == 0,
        "moments must be contiguous, with an even size along dim");
    for (int64_t d = 0; d < moments.dim(); ++d)
      half.push_back(moments.size(d));
    half[dim] /= 2;
    for (int64_t d = 1; d < dim; ++d)
      rows *= half[d];
    for (int64_t d = dim; d < moments.dim(); ++d)
      columns *= half[d];
  }

  Blocks blocks() const { return {batch, rows, columns, false}; }

  template <class T>
  Moments<T> halves(const Tensor& moments) const {
    Moments<T> found;
    found.mean.data = static_cast<char*>(moments.data_ptr());
    found.mean.batch_stride = 2 * rows * columns;
    found.mean.row_stride = 2 * columns;
    found.mean.stride = 1;
    found.mean.float32 = moments.scalar_type() == ScalarType::Float;
    found.logvar = found.mean.at(0, 0, columns);
    return found;
  }

  template <class T>
  Rows<T> of_half(const std::optional<Tensor>& t, const Tensor& moments) const {
    Rows<T> found;
    if (!t.has_value())
      return found;
    STD_TORCH_CHECK(
        t->is_contiguous() && t->numel() == batch * rows * columns &&
            (t->scalar_type() == moments.scalar_type() || t->scalar_type() == ScalarType::Float),
        "noise and grad_sample must be contiguous, of the shape of a half of moments, "
        "in their dtype or float32");
    found.data = static_cast<char*>(t->data_ptr());
    found.batch_stride = rows * columns;
    found.row_stride = columns;
    found.stride = 1;
    found.float32 = t->scalar_type() == ScalarType::Float;
    return found;
  }
};

std::tuple<Tensor, Tensor> gaussian_sample_packed(const Tensor& moments,
                                                  std::optional<Tensor> noise,
                                                  std::optional<Tensor> seed,
                                                  int64_t first,
                                                  int64_t dim,
                                                  double free_bits,
                                                  bool float32_sample) {
  STD_TORCH_CHECK(noise.has_value() || seed.has_value(), "noise or a seed must be given");
  const Packed packed(moments, dim);
  Tensor sample = torch::stable::new_empty(
      moments, packed.half, float32_sample ? ScalarType::Float : moments.scalar_type());
  use_huge_pages(sample);
  std::optional<Tensor> kl;
  with_type(moments, [&]<class T>(T*) {
    Moments<T> in = packed.halves<T>(moments);
    in.noise = packed.of_half<T>(noise, moments);
    kl = sample_all(packed.blocks(), in, {seed_of(seed), first}, float(free_bits),
                    packed.of_half<T>(sample, moments), moments);
  });
  return {sample, *kl};
}

// The gradient of the KL of each sample of the batch, or null.
struct KlGradient {
  const float* data = nullptr;
  int64_t stride = 0;

  KlGradient(const std::optional<Tensor>& grad_kl, int64_t batch) {
    if (!grad_kl.has_value())
      return;
    STD_TORCH_CHECK(grad_kl->scalar_type() == ScalarType::Float && grad_kl->dim() == 1 &&
                        grad_kl->size(0) == batch,
                    "grad_kl must be float32 [B]");
    data = static_cast<const float*>(grad_kl->data_ptr());
    stride = grad_kl->stride(0);
  }

  const float* at(int64_t sample) const { return data ? data + sample * stride : nullptr; }
};

template <class T>
void backward_all(const Blocks& blocks,
                  const Moments<T>& in,
                  const NoiseSource& source,
                  float free_bits,
                  const Rows<T>& grad_sample,
                  const KlGradient& grad_kl,
                  const Moments<T>& out) {
  const auto segment = in.prior_mean ? backward_segment<true, T> : backward_segment<false, T>;
  blocks.for_each_segment(
      in.noise || !grad_sample ? nullptr : &source,
      [&](int64_t, int64_t b, int64_t row, int64_t column, int64_t count, const float* drawn) {
        segment(in.at(b, row, column), drawn, free_bits, grad_sample.at(b, row, column),
                grad_kl.at(b), out.at(b, row, column), count);
      });
}

void gaussian_sample_backward(Tensor grad_mean,
                              Tensor grad_logvar,
                              std::optional<Tensor> grad_prior_mean,
                              std::optional<Tensor> grad_prior_logvar,
                              std::optional<Tensor> grad_sample,
                              std::optional<Tensor> grad_kl,
                              const Tensor& mean,
                              const Tensor& logvar,
                              std::optional<Tensor> prior_mean,
                              std::optional<Tensor> prior_logvar,
                              std::optional<Tensor> noise,
                              std::optional<Tensor> seed,
                              int64_t first,
                              double free_bits) {
  check_inputs(mean, logvar, prior_mean, prior_logvar, noise, seed);
  check_rows(grad_mean, mean, true, "grad_mean");
  check_rows(grad_logvar, mean, true, "grad_logvar");
  STD_TORCH_CHECK(grad_prior_mean.has_value() == prior_mean.has_value() &&
                      grad_prior_logvar.has_value() == prior_mean.has_value(),
                  "the gradients of both moments of the prior must be given, or neither");
  if (prior_mean.has_value()) {
    check_rows(*grad_prior_mean, mean, true, "grad_prior_mean");
    check_rows(*grad_prior_logvar, mean, true, "grad_prior_logvar");
  }
  if (grad_sample.has_value())
    check_rows(*grad_sample, mean, false, "grad_sample");
  const KlGradient of_kl(grad_kl, mean.size(0));
  use_huge_pages(grad_mean);
  use_huge_pages(grad_logvar);
  with_type(mean, [&]<class T>(T*) {
    const Moments<T> in{Rows<T>(mean), Rows<T>(logvar), Rows<T>(prior_mean), Rows<T>(prior_logvar),
                        Rows<T>(noise)};
    const Moments<T> out{Rows<T>(grad_mean), Rows<T>(grad_logvar), Rows<T>(grad_prior_mean),
                         Rows<T>(grad_prior_logvar), Rows<T>()};
    backward_all(Blocks(mean), in, {seed_of(seed), first}, float(free_bits), Rows<T>(grad_sample),
                 of_kl, out);
  });
}

Tensor gaussian_sample_packed_backward(std::optional<Tensor> grad_sample,
                                       std::optional<Tensor> grad_kl,
                                       const Tensor& moments,
                                       std::optional<Tensor> noise,
                                       std::optional<Tensor> seed,
                                       int64_t first,
                                       int64_t dim,
                                       double free_bits) {
  STD_TORCH_CHECK(noise.has_value() || seed.has_value(), "noise or a seed must be given");
  const Packed packed(moments, dim);
  const KlGradient of_kl(grad_kl, packed.batch);
  Tensor gradient = output_like(moments);
  with_type(moments, [&]<class T>(T*) {
    Moments<T> in = packed.halves<T>(moments);
    in.noise = packed.of_half<T>(noise, moments);
    backward_all(packed.blocks(), in, {seed_of(seed), first}, float(free_bits),
                 packed.of_half<T>(grad_sample, moments), of_kl, packed.halves<T>(gradient));
  });
  return gradient;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("gaussian_sample", TORCH_BOX(&genperf::gaussian_sample));
  m.impl("gaussian_sample_backward", TORCH_BOX(&genperf::gaussian_sample_backward));
  m.impl("gaussian_sample_packed", TORCH_BOX(&genperf::gaussian_sample_packed));
  m.impl("gaussian_sample_packed_backward", TORCH_BOX(&genperf::gaussian_sample_packed_backward));
}
