// SPDX-License-Identifier: Apache-2.0
//
// Residual vector quantization: every stage quantizes the residual of the stage before.
//
// A block of positions passes through all stages on one thread while its residual, in float32 for
// every dtype and layout of x, stays in L2. A block is a megabyte, so that many positions share the
// codes of a stage, which every block reads again. Compared with one pass over the whole tensor per
// stage this saves a barrier per stage, and a quarter of the time where the search is short (65536
// positions, K = 64), but nothing where it is long (K = 1024). Codebooks that do not fit in cache
// together when packed are searched stage by stage by all threads. In either case the residual is
// rounded after every stage, and a stage's index is exact for its residual.
//
// Backward and statistics recompute the residuals from x and the indices, because a chain of
// subtractions costs less than reading stored residuals. The statistics read the vectors of a code
// one after another, so they keep one residual for all positions, which every stage sums and
// updates code by code.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/code_gradient.h"
#include "cpu/common/outputs.h"
#include "cpu/residual/codebooks.h"
#include "cpu/residual/forward.h"
#include "cpu/residual/statistics.h"

namespace genperf {
namespace {

// The gradient of one vector, from the residuals after each stage and the gradient of the quantized
// vector. `residual` starts as x and is overwritten.
template <class W>
class ResidualGradient {
 public:
  ResidualGradient(const Codebooks<W>& codebooks,
                   const std::vector<W>& scales,
                   bool rotate,
                   bool per_quantizer)
      : codebooks_(codebooks), scales_(scales), rotate_(rotate), per_quantizer_(per_quantizer) {}

  void operator()(const int64_t* indices,
                  W* residual,
                  const W* gradient,
                  int64_t dim,
                  W* scratch,
                  W* out) const {
    const int64_t stages = stages_of(indices, codebooks_.count);
    if (stages == 0) {
      std::fill_n(out, dim, W(0));
    } else if (gradient && rotate_ && per_quantizer_) {
      std::fill_n(out, dim, W(0));
      for (int64_t stage = 0; stage < stages; ++stage) {
        const W* const code = codebooks_.code(stage, indices[stage]);
        add(rotation(residual, code, gradient, dim), gradient, residual, code, dim, out);
        subtract_codes(indices, stage, stage + 1, residual, dim, out);
      }
    } else {
      std::fill_n(out, dim, W(0));
      if (gradient && rotate_) {
        add_codes(codebooks_, indices, stages, dim, scratch);
        add(rotation(residual, scratch, gradient, dim), gradient, residual, scratch, dim, out);
      } else if (gradient) {
        const W times = per_quantizer_ ? W(stages) : W(1);
        for (int64_t d = 0; d < dim; ++d)
          out[d] = times * gradient[d];
      }
      subtract_codes(indices, 0, stages, residual, dim, out);
    }
  }

 private:
  using P = Pack<W>;

  static void add(const GradientCoefficients<W>& coefficients,
                  const W* gradient,
                  const W* x,
                  const W* code,
                  int64_t dim,
                  W* out) {
    const auto along_gradient = P::constant(coefficients.gradient),
               along_x = P::constant(coefficients.x), along_code = P::constant(coefficients.code);
    for_each_pack<W>(dim, [&](int64_t d, auto n) {
      P::set(out + d, n,
             P::get(out + d, n) + along_gradient * P::get(gradient + d, n) +
                 (along_x * P::get(x + d, n) + along_code * P::get(code + d, n)));
    });
  }

  // Subtracts the codes of stages begin ... end - 1 and adds each stage's commitment gradient.
  void subtract_codes(const int64_t* indices,
                      int64_t begin,
                      int64_t end,
                      W* residual,
                      int64_t dim,
                      W* out) const {
    for_each_pack<W>(dim, [&](int64_t d, auto n) {
      auto rest = P::get(residual + d, n), value = P::get(out + d, n);
      for (int64_t stage = begin; stage < end; ++stage) {
        rest -= P::get(codebooks_.code(stage, indices[stage]) + d, n);
        value += P::constant(scales_[stage]) * rest;
      }
      P::set(residual + d, n, rest);
      P::set(out + d, n, value);
    });
  }

  const Codebooks<W>& codebooks_;
  const std::vector<W>& scales_;
  const bool rotate_, per_quantizer_;
};

template <class T>
void residual_backward(const Positions<T>* gradient,
                       const Positions<T>& x,
                       const int64_t* indices,
                       int64_t num_codebooks,
                       const ResidualGradient<OpMath<T>>& residual_gradient,
                       const Positions<T>& out) {
  using W = OpMath<T>;
  const int64_t dim = x.dim;
  torch::stable::parallel_for(0, tiles_of(x.count()), 8, [&](int64_t begin, int64_t end) {
    Buffer<W> buffer((3 * kRows + 1) * dim);
    W *const residual = buffer.get(), *const incoming = residual + kRows * dim,
             *const outgoing = incoming + kRows * dim, *const scratch = outgoing + kRows * dim;
    for_each_tile(begin * kRows, std::min(x.count(), end * kRows), [&](int64_t first, int count) {
      const W* from[kRows] = {};
      W* to[kRows];
      Tile(x, first, count).copy(residual);
      if (gradient)
        Tile(*gradient, first, count).read(incoming, from);
      const Tile target(out, first, count);
      target.output_rows(outgoing, to);
      for (int lane = 0; lane < count; ++lane)
        residual_gradient(indices + (first + lane) * num_codebooks, residual + lane * dim,
                          from[lane], dim, scratch, to[lane]);
      target.write(outgoing);
    });
  });
}

// The codebooks with contiguous components.
Tensor check_codebooks(const Tensor& x, const Tensor& codebooks) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(
      codebooks.dim() == 3 && codebooks.numel() > 0 && codebooks.size(2) == x.size(1) &&
          codebooks.scalar_type() == accumulator_type(x),
      "codebooks must be [Q, K, D] with the D of x, float64 for a float64 x, else float32");
  return codebooks.stride(2) == 1 ? codebooks : torch::stable::contiguous(codebooks);
}

const int64_t* check_stage_indices(const Tensor& indices,
                                   const Tensor& x,
                                   const Tensor& codebooks) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 3 &&
                      indices.size(0) == x.size(0) && indices.size(1) == x.size(2) &&
                      indices.size(2) == codebooks.size(0) && indices.is_contiguous(),
                  "indices must be contiguous int64 [outer, inner, Q]");
  const int64_t* data = static_cast<const int64_t*>(indices.data_ptr());
  check_range(data, indices.numel(), codebooks.size(1));
  return data;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_vector_quantize(
    const Tensor& x,
    const Tensor& codebooks,
    std::optional<Tensor> mask,
    std::optional<Tensor> num_quantizers,
    bool cosine) {
  const Tensor codes = check_codebooks(x, codebooks);
  const int64_t count = codes.size(0), positions = x.size(0) * x.size(2);
  int64_t stages = count;
  if (num_quantizers.has_value()) {
    STD_TORCH_CHECK(
        num_quantizers->scalar_type() == ScalarType::Long && num_quantizers->numel() == 1,
        "num_quantizers must be one int64");
    stages =
        std::clamp<int64_t>(*static_cast<const int64_t*>(num_quantizers->data_ptr()), 1, count);
  }
  Tensor contiguous_mask;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == positions,
                    "mask must be bool, one for each position");
    contiguous_mask = torch::stable::contiguous(*mask);
  }
  const bool* const mask_data =
      mask.has_value() ? static_cast<const bool*>(contiguous_mask.data_ptr()) : nullptr;
  Tensor quantized = output_like(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2), count}, ScalarType::Long);
  Tensor mse = torch::stable::new_empty(x, {count}, accumulator_type(x));
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const int64_t valid_count =
      mask_data ? std::count(mask_data, mask_data + positions, true) : positions;
  *static_cast<int64_t*>(valid.data_ptr()) = valid_count;
  with_types(x, codes, [&]<class T>(T*, auto*) {
    using W = OpMath<T>;
    ResidualForward<T> forward(Positions<T>(x), Codebooks<W>(codes), stages, mask_data, cosine,
                               Positions<T>(quantized), static_cast<int64_t*>(indices.data_ptr()));
    if (positions > 0)
      forward.run();
    W* const errors = static_cast<W*>(mse.data_ptr());
    for (int64_t stage = 0; stage < count; ++stage)
      errors[stage] = stage < stages && valid_count
                          ? W(forward.error(stage) / (double(valid_count) * double(x.size(1))))
                          : W(0);
  });
  return {quantized, indices, mse, valid};
}

Tensor residual_vector_quantize_backward(std::optional<Tensor> grad_quantized,
                                         std::optional<Tensor> grad_mse,
                                         const Tensor& x,
                                         const Tensor& codebooks,
                                         const Tensor& indices,
                                         const Tensor& valid,
                                         double commitment_weight,
                                         bool rotation,
                                         bool per_quantizer) {
  const Tensor codes = check_codebooks(x, codebooks);
  const int64_t* const index = check_stage_indices(indices, x, codes);
  STD_TORCH_CHECK(valid.scalar_type() == ScalarType::Long && valid.numel() == 1,
                  "valid must be one int64");
  const int64_t valid_count = std::max<int64_t>(*static_cast<const int64_t*>(valid.data_ptr()), 1);
  Tensor grad_errors;
  if (grad_mse.has_value()) {
    STD_TORCH_CHECK(
        grad_mse->numel() == codes.size(0) && grad_mse->scalar_type() == codes.scalar_type(),
        "grad_mse must hold one value of the codebooks' dtype for each codebook");
    grad_errors = torch::stable::contiguous(*grad_mse);
  }
  if (grad_quantized.has_value())
    check_gradient(*grad_quantized, x);
  Tensor grad_x = output_like(x);
  with_types(x, codes, [&]<class T>(T*, auto*) {
    using W = OpMath<T>;
    std::vector<W> scales(codes.size(0));
    if (grad_mse.has_value())
      for (int64_t stage = 0; stage < codes.size(0); ++stage)
        scales[stage] =
            W(2 * commitment_weight * double(static_cast<const W*>(grad_errors.data_ptr())[stage]) /
              (double(valid_count) * double(x.size(1))));
    std::optional<Positions<T>> gradient;
    if (grad_quantized.has_value())
      gradient.emplace(*grad_quantized);
    const Codebooks<W> codebooks(codes);
    residual_backward(gradient ? &*gradient : nullptr, Positions<T>(x), index, codebooks.count,
                      ResidualGradient<W>(codebooks, scales, rotation, per_quantizer),
                      Positions<T>(grad_x));
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> residual_code_statistics(const Tensor& x,
                                                    const Tensor& codebooks,
                                                    const Tensor& indices,
                                                    bool after) {
  const Tensor codes = check_codebooks(x, codebooks);
  const int64_t* const index = check_stage_indices(indices, x, codes);
  const ScalarType type = accumulator_type(x);
  Tensor counts = torch::stable::new_empty(x, {codes.size(0), codes.size(1)}, type);
  Tensor sums = torch::stable::new_empty(x, {codes.size(0), codes.size(1), codes.size(2)}, type);
  use_huge_pages(sums);
  with_types(x, codes, [&]<class T>(T*, auto*) {
    using W = OpMath<T>;
    residual_statistics(Positions<T>(x), Codebooks<W>(codes), index, after,
                        static_cast<W*>(counts.data_ptr()), static_cast<W*>(sums.data_ptr()));
  });
  return {counts, sums};
}

Tensor residual_vector_quantize_backward_codebooks(const Tensor& grad_mse,
                                                   const Tensor& x,
                                                   const Tensor& codebooks,
                                                   const Tensor& indices,
                                                   const Tensor& valid,
                                                   double codebook_weight) {
  const auto [counts, sums] = residual_code_statistics(x, codebooks, indices, true);
  Tensor gradient = torch::stable::new_empty(
      codebooks, {codebooks.size(0), codebooks.size(1), codebooks.size(2)});
  with_types(x, codebooks, [&]<class T, class C>(T*, C*) {
    scale_code_gradient<OpMath<T>, C>(sums, torch::stable::contiguous(grad_mse), valid, x.size(1),
                                      codebook_weight, gradient);
  });
  return gradient;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("residual_vector_quantize", TORCH_BOX(&genperf::residual_vector_quantize));
  m.impl("residual_vector_quantize_backward",
         TORCH_BOX(&genperf::residual_vector_quantize_backward));
  m.impl("residual_vector_quantize_backward_codebooks",
         TORCH_BOX(&genperf::residual_vector_quantize_backward_codebooks));
  m.impl("residual_code_statistics", TORCH_BOX(&genperf::residual_code_statistics));
}
