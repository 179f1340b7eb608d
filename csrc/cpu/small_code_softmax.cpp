// SPDX-License-Identifier: Apache-2.0
//
// The ops of code_softmax on inputs so small that the positions x codes matrix of a head is in
// cache. The operands of the products hold the squared norms of distances as extra columns:
//
//   left    [N, D + 2]   x, 1, |x|^2
//   right   [D + 2, K]   -2 codes, |code|^2, 1 for distances; 2 codes, -|code|^2 for squared ones
//   codes   [K, D + 1]   codes, 1 (backward)
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/common/head_vectors.h"
#include "cpu/common/product.h"
#include "cpu/softmax/rows.h"

namespace genperf {
namespace {

using namespace softmax;

enum Form : int64_t { kDistance, kSquaredDistance, kDot };

// What the ops are called with.
struct Problem {
  const Tensor &x, &codebook;
  Form form;
  bool has_heads;
  HeadVectors vectors;
  int64_t codes, positions, dim;
  int64_t left_width, right_width;
  const bool* mask = nullptr;
  const int64_t* indices = nullptr;

  Problem(const Tensor& x,
          const Tensor& codebook,
          const std::optional<Tensor>& mask,
          const std::optional<Tensor>& indices,
          int64_t form,
          int64_t channel)
      : x(x),
        codebook(codebook),
        form(Form(form)),
        has_heads(codebook.dim() == 3),
        vectors(x, channel, has_heads),
        codes(codebook.size(codebook.dim() - 2)),
        positions(vectors.positions()),
        dim(vectors.dim),
        left_width(padded(dim + 2)),
        right_width(padded(codes)) {
    STD_TORCH_CHECK(form >= kDistance && form <= kDot, "form must be 0, 1 or 2");
    STD_TORCH_CHECK((has_heads || codebook.dim() == 2) && codebook.is_contiguous() && codes > 0 &&
                        codebook.size(codebook.dim() - 1) == dim &&
                        (!has_heads || codebook.size(0) == x.size(0)),
                    "codebook must be contiguous [K, D] or [heads, K, D] with the D of x");
    if (mask) {
      check(*mask, ScalarType::Bool);
      this->mask = static_cast<const bool*>(mask->data_ptr());
    }
    if (indices) {
      check(*indices, ScalarType::Long);
      this->indices = static_cast<const int64_t*>(indices->data_ptr());
      check_range(this->indices, vectors.heads * positions, codes);
    }
  }

  void check(const Tensor& t, ScalarType type) const {
    STD_TORCH_CHECK(
        t.numel() == vectors.heads * positions && t.is_contiguous() && t.scalar_type() == type,
        "the mask must be bool and the indices int64, contiguous, with an entry for each position");
  }

  bool root() const { return form == kDistance; }
  // Columns of the left operand that the product takes.
  int64_t steps() const { return form == kDot ? dim : form == kDistance ? dim + 2 : dim + 1; }
  bool is_used(int64_t head, int64_t position) const {
    const int64_t at = head * positions + position;
    return (!mask || mask[at]) && (!indices || indices[at] >= 0);
  }
  // The number of positions that are not masked, at least 1.
  double count(int64_t head) const {
    int64_t used = 0;
    for (int64_t position = 0; position < positions; ++position)
      used += is_used(head, position);
    return double(std::max<int64_t>(1, used));
  }

  Chunk chunk(int64_t head, float* logits, double temperature) const {
    const int64_t first = head * positions;
    return {logits,
            positions,
            codes,
            right_width,
            inverse_of(temperature),
            mask ? mask + first : nullptr,
            indices ? indices + first : nullptr};
  }

  std::vector<int64_t> sizes(std::initializer_list<int64_t> last) const {
    std::vector<int64_t> sizes(has_heads, vectors.heads);
    sizes.insert(sizes.end(), last);
    return sizes;
  }
};

// The operands of the products of one head.
struct Operands {
  Buffer<float> left, codes, right, logits, center;

  explicit Operands(const Problem& p)
      : left(p.positions * p.left_width),
        codes(p.codes * p.left_width),
        right((p.dim + 2) * p.right_width),
        logits(p.positions * p.right_width),
        center(p.dim) {}

  // Computes logits as the product of left and right. Vectors that are not used count as zero.
  void multiply_for(const Problem& p, int64_t head, bool use_mask) {
    with_type(p.codebook, [&]<class C>(C*) { set_codes<C>(p, head); });
    with_type(p.x, [&]<class T>(T*) { set_vectors<T>(p, head, use_mask); });
    multiply({left.get(), p.left_width, 1}, p.positions, p.steps(), right.get(), p.right_width,
             logits.get());
  }

 private:
  template <class C>
  void set_codes(const Problem& p, int64_t head) {
    const int64_t dim = p.dim, width = p.left_width;
    const C* const from = static_cast<const C*>(p.codebook.data_ptr()) + head * p.codes * dim;
    std::fill_n(codes.get(), p.codes * width, 0.0f);
    std::fill_n(right.get(), (dim + 2) * p.right_width, 0.0f);
    for (int64_t d = 0; d < dim; ++d)
      center[d] = 0;
    for (int64_t k = 0; k < p.codes; ++k)
      for (int64_t d = 0; d < dim; ++d)
        codes[k * width + d] = float(from[k * dim + d]);
    const float scale = p.form == kDot ? 1 : p.root() ? -2 : 2;
    if (p.form != kDot) {
      for (int64_t k = 0; k < p.codes; ++k)
        for (int64_t d = 0; d < dim; ++d)
          center[d] += codes[k * width + d];
      for (int64_t d = 0; d < dim; ++d)
        center[d] /= float(p.codes);
    }
    for (int64_t k = 0; k < p.codes; ++k) {
      float* const code = codes.get() + k * width;
      float norm = 0;
      for (int64_t d = 0; d < dim; ++d) {
        code[d] -= center[d];
        norm += code[d] * code[d];
        right[d * p.right_width + k] = scale * code[d];
      }
      code[dim] = 1;
      right[dim * p.right_width + k] = p.root() ? norm : -norm;
      right[(dim + 1) * p.right_width + k] = 1;
    }
  }

  template <class T>
  void set_vectors(const Problem& p, int64_t head, bool use_mask) {
    const T* const from = static_cast<const T*>(p.x.data_ptr());
    p.vectors.for_each(head, [&](int64_t position, int64_t offset) {
      float* const row = left.get() + position * p.left_width;
      float norm = 0;
      std::fill_n(row, p.left_width, 0.0f);
      row[p.dim] = 1;
      if (use_mask && !p.is_used(head, position))
        return;
      for (int64_t d = 0; d < p.dim; ++d) {
        row[d] = float(from[offset + d * p.vectors.stride]) - center[d];
        norm += row[d] * row[d];
      }
      row[p.dim + 1] = norm;
    });
  }
};

// [3, heads, positions]
SavedStatistics statistics_of(const Tensor& statistics, const Problem& p, int64_t head) {
  const int64_t all = p.vectors.heads * p.positions;
  STD_TORCH_CHECK(statistics.numel() == 3 * all && statistics.is_contiguous() &&
                      statistics.scalar_type() == ScalarType::Float,
                  "statistics must be float32 [3, heads, positions]");
  float* const data = static_cast<float*>(statistics.data_ptr()) + head * p.positions;
  return {data, data + all, data + 2 * all};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> small_code_softmax(const Tensor& x,
                                                              const Tensor& codebook,
                                                              std::optional<Tensor> mask,
                                                              std::optional<Tensor> indices,
                                                              int64_t form,
                                                              double temperature,
                                                              double floor,
                                                              int64_t channel) {
  const Problem p(x, codebook, mask, indices, form, channel);
  Tensor mean = torch::stable::new_empty(x, p.sizes({}), ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(x, indices ? std::vector<int64_t>{0} : p.sizes({}),
                                            ScalarType::Float);
  Tensor usage = torch::stable::new_empty(x, indices ? std::vector<int64_t>{0} : p.sizes({p.codes}),
                                          ScalarType::Double);
  Tensor statistics =
      torch::stable::new_empty(x, {3, p.vectors.heads, p.positions}, ScalarType::Float);
  float* const means = static_cast<float*>(mean.mutable_data_ptr());
  Operands operands(p);
  const Buffer<float> values(p.positions);
  for (int64_t head = 0; head < p.vectors.heads; ++head) {
    operands.multiply_for(p, head, true);
    double* sums = nullptr;
    if (!indices) {
      sums = static_cast<double*>(usage.mutable_data_ptr()) + head * p.codes;
      std::fill_n(sums, p.codes, 0.0);
    }
    softmax_rows(p.chunk(head, operands.logits.get(), temperature), p.root(),
                 statistics_of(statistics, p, head), values.get(), sums);
    const double count = p.count(head);
    double total = 0;
    for (int64_t i = 0; i < p.positions; ++i)
      total += values[i];
    means[head] = float(total / count);
    if (indices)
      continue;
    double sum = 0;
    for (int64_t k = 0; k < p.codes; ++k) {
      const double share = sums[k] / count;
      sum -= share * std::log(share < floor ? floor : share);
    }
    static_cast<float*>(entropy.mutable_data_ptr())[head] = float(sum);
  }
  return {mean, entropy, usage, statistics};
}

// The gradient in the sums of probabilities, less its mean over the codes: a constant does not
// change the gradient of the logits, and without it less is lost to rounding.
void usage_gradient(const double* usage,
                    int64_t codes,
                    double count,
                    double floor,
                    double gradient,
                    float* out) {
  std::vector<double> slopes(codes);
  double mean = 0;
  for (int64_t k = 0; k < codes; ++k) {
    const double share = usage[k] / count;
    slopes[k] = share < floor ? std::log(floor) : std::log(share) + 1;
    mean += slopes[k];
  }
  mean /= double(codes);
  for (int64_t k = 0; k < codes; ++k)
    out[k] = float(-gradient / count * (slopes[k] - mean));
}

std::tuple<Tensor, Tensor> small_code_softmax_backward(std::optional<Tensor> grad_mean,
                                                       std::optional<Tensor> grad_entropy,
                                                       const Tensor& x,
                                                       const Tensor& codebook,
                                                       std::optional<Tensor> mask,
                                                       std::optional<Tensor> indices,
                                                       const Tensor& usage,
                                                       const Tensor& statistics,
                                                       int64_t form,
                                                       double temperature,
                                                       double floor,
                                                       int64_t channel,
                                                       bool of_x,
                                                       bool of_codebook) {
  const Problem p(x, codebook, mask, indices, form, channel);
  const int64_t heads = p.vectors.heads, dim = p.dim, width = p.left_width;
  const auto gradient = [&](const std::optional<Tensor>& t, int64_t head) {
    STD_TORCH_CHECK(t->numel() == heads && t->scalar_type() == ScalarType::Float,
                    "gradients must be float32, with an entry for each head");
    return static_cast<const float*>(t->data_ptr())[t->dim() ? head * t->stride(0) : 0];
  };
  const bool of_usage = grad_entropy && !indices;
  STD_TORCH_CHECK(!of_usage || (usage.numel() == heads * p.codes && usage.is_contiguous() &&
                                usage.scalar_type() == ScalarType::Double),
                  "usage must be float64 [heads, K]");
  Tensor grad_x = of_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_codebook =
      of_codebook ? torch::stable::empty_like(codebook) : torch::stable::new_empty(codebook, {0});
  const HeadVectors out(of_x ? grad_x : x, channel, p.has_heads);
  Operands operands(p);
  const Buffer<float> values(p.positions), usages(p.codes);
  const Buffer<float> found(std::max(p.positions, p.codes) * width);
  // With distances, the column of ones sums the gradients. The sums of gradient * (x - code) that
  // result lose little to rounding even where x is close to the code that has nearly all of the
  // weight.
  const bool distances = p.form != kDot;
  for (int64_t head = 0; head < heads; ++head) {
    operands.multiply_for(p, head, true);
    const double count = p.count(head);
    if (grad_mean)
      std::fill_n(values.get(), p.positions, float(gradient(grad_mean, head) / count));
    if (of_usage)
      usage_gradient(static_cast<const double*>(usage.data_ptr()) + head * p.codes, p.codes, count,
                     floor, gradient(grad_entropy, head), usages.get());
    const float* const logits = operands.logits.get();
    gradient_rows(p.chunk(head, operands.logits.get(), temperature), p.root(),
                  statistics_of(statistics, p, head), grad_mean ? values.get() : nullptr,
                  of_usage ? usages.get() : nullptr);
    if (of_x) {
      multiply({logits, p.right_width, 1}, p.positions, p.codes, operands.codes.get(), width,
               found.get());
      const float scale = p.root() ? 1 : -2;
      with_type(x, [&]<class T>(T*) {
        T* const to = static_cast<T*>(grad_x.mutable_data_ptr());
        out.for_each(head, [&](int64_t position, int64_t offset) {
          const float* const sums = found.get() + position * width;
          const float* const row = operands.left.get() + position * width;
          for (int64_t d = 0; d < dim; ++d)
            to[offset + d * out.stride] =
                T(distances ? scale * (row[d] * sums[dim] - sums[d]) : sums[d]);
        });
      });
    }
    if (of_codebook) {
      multiply({logits, 1, p.right_width}, p.codes, p.positions, operands.left.get(), width,
               found.get());
      const float scale = p.root() ? -1 : 2;
      with_type(codebook, [&]<class C>(C*) {
        C* const to = static_cast<C*>(grad_codebook.mutable_data_ptr()) + head * p.codes * dim;
        for (int64_t k = 0; k < p.codes; ++k) {
          const float* const sums = found.get() + k * width;
          const float* const code = operands.codes.get() + k * width;
          for (int64_t d = 0; d < dim; ++d)
            to[k * dim + d] = C(distances ? scale * (sums[d] - code[d] * sums[dim]) : sums[d]);
        }
      });
    }
  }
  return {grad_x, grad_codebook};
}

Tensor small_sample_code(const Tensor& x,
                         const Tensor& codebook,
                         std::optional<Tensor> mask,
                         std::optional<Tensor> seed,
                         int64_t first,
                         int64_t form,
                         double temperature,
                         int64_t channel) {
  const Problem p(x, codebook, mask, std::nullopt, form, channel);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != channel)
      sizes.push_back(x.size(d));
  Tensor indices = torch::stable::new_empty(x, sizes, ScalarType::Long);
  int64_t* const found = static_cast<int64_t*>(indices.mutable_data_ptr());
  const uint64_t key = seed_of(seed);
  Operands operands(p);
  for (int64_t head = 0; head < p.vectors.heads; ++head) {
    operands.multiply_for(p, head, false);
    const uint64_t own = key + uint64_t(head);
    sample_rows(p.chunk(head, operands.logits.get(), 1), p.root(), float(temperature),
                seed ? &own : nullptr, first, found + head * p.positions);
  }
  for (int64_t i = 0; mask && i < p.vectors.heads * p.positions; ++i)
    found[i] = p.mask[i] ? found[i] : -1;
  return indices;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("small_code_softmax", TORCH_BOX(&genperf::small_code_softmax));
  m.impl("small_code_softmax_backward", TORCH_BOX(&genperf::small_code_softmax_backward));
  m.impl("small_sample_code", TORCH_BOX(&genperf::small_sample_code));
}
