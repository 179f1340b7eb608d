// SPDX-License-Identifier: Apache-2.0
//
// lookup_free_entropy of small inputs. The probabilities of the codes of a group of bits are the
// outer product of those of two halves of the bits, `first` [N, 2^(group / 2)] and `second`; their
// sum over the positions is a matrix product.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/common/elements.h"
#include "cpu/common/head_vectors.h"
#include "cpu/common/positions.h"
#include "cpu/common/product.h"
#include "elementary.h"

namespace genperf {
namespace {

constexpr float kMaxLogit = 1e4f;  // where a bit is certain, so that infinity does not give NaN

// log(1 + e) for 0 <= e <= 1.
Vec log1p(Vec e) {
  const Vec whole = 1.0f + e, rest = whole - 1.0f;
  const Vec value = -minus_log<Simd>(whole) * (e / rest);
  return rest == 0.0f ? e : value;
}

// The probabilities that bits are 1 and 0, for their logits.
struct Bits {
  Vec one, zero, entropy;

  explicit Bits(Vec logit) {
    const Vec size = logit < 0.0f ? -logit : logit;
    const Vec e = exp_or_zero<Simd>(-size), larger = 1.0f / (1.0f + e), smaller = e * larger;
    one = logit < 0.0f ? smaller : larger;
    zero = logit < 0.0f ? larger : smaller;
    entropy = fma(size, smaller, log1p(e));
  }
};

struct Problem {
  HeadVectors vectors;
  int64_t positions, bits, width;  // floats per position
  int64_t group, groups, codes;
  int64_t sizes[2];  // codes of the two halves
  const bool* mask = nullptr;
  float sharpness;
  Buffer<float> logits, ones, zeros;  // [N, bits]
  double entropy = 0;                 // of all bits
  double count = 0;                   // of positions that are not masked, at least 1

  Problem(const Tensor& x,
          const std::optional<Tensor>& mask,
          double sharpness,
          int64_t group,
          int64_t channel)
      : vectors(x, channel, false),
        positions(vectors.positions()),
        bits(vectors.dim),
        width(padded(bits)),
        group(group),
        groups(group > 0 ? bits / group : 0),
        codes(int64_t{1} << group),
        sizes{int64_t{1} << group / 2, int64_t{1} << (group - group / 2)},
        sharpness(float(sharpness)),
        logits(positions * width),
        ones(positions * width),
        zeros(positions * width) {
    STD_TORCH_CHECK(group > 0 && group <= 24 && bits % group == 0, "group must divide the bits");
    if (mask) {
      STD_TORCH_CHECK(mask->numel() == positions && mask->is_contiguous() &&
                          mask->scalar_type() == ScalarType::Bool,
                      "mask must be contiguous bool, with an entry for each position");
      this->mask = static_cast<const bool*>(mask->data_ptr());
    }
    with_type(x, [&]<class T>(T*) {
      const T* const from = static_cast<const T*>(x.data_ptr());
      vectors.for_each(0, [&](int64_t position, int64_t offset) {
        float* const row = logits.get() + position * width;
        std::fill_n(row, width, 0.0f);
        if (is_used(position))
          for (int64_t d = 0; d < bits; ++d) {
            const float logit = float(from[offset + d * vectors.stride]) * this->sharpness;
            row[d] = logit < -kMaxLogit ? -kMaxLogit : logit > kMaxLogit ? kMaxLogit : logit;
          }
      });
    });
    for (int64_t position = 0; position < positions; ++position) {
      const bool used = is_used(position);
      count += used;
      for (int64_t d = 0; d < width; d += kLanes) {
        const int64_t at = position * width + d;
        Bits found(load(logits.get() + at));
        store(ones.get() + at, found.one);
        store(zeros.get() + at, found.zero);
        for (int64_t lane = bits - d; lane < kLanes; ++lane)
          found.entropy[lane] = 0;
        if (used)
          entropy += sum(found.entropy);
      }
    }
    count = std::max(count, 1.0);
  }

  bool is_used(int64_t position) const { return !mask || mask[position]; }
  int64_t first_bit(int half) const { return half ? group / 2 : 0; }
  int64_t half_bits(int half) const { return half ? group - group / 2 : group / 2; }
  int64_t half_width(int half) const { return padded(sizes[half]); }

  // The probabilities of the values of one half of a group's bits, the first bit most significant.
  Buffer<float> table(int64_t of_group, int half) const {
    const int64_t table_width = half_width(half), many = half_bits(half);
    Buffer<float> table(positions * table_width);
    std::fill_n(table.get(), positions * table_width, 0.0f);
    for (int64_t position = 0; position < positions; ++position) {
      if (!is_used(position))
        continue;
      float* const row = table.get() + position * table_width;
      const int64_t at = position * width + of_group * group + first_bit(half);
      row[0] = 1;
      for (int64_t bit = many - 1, known = 1; bit >= 0; --bit, known *= 2)
        for (int64_t i = 0; i < known; ++i) {
          row[known + i] = row[i] * ones[at + bit];
          row[i] *= zeros[at + bit];
        }
    }
    return table;
  }
};

// The normalized mass of a group's codes.
struct Shares {
  std::vector<double> p;
  double total, scale;  // scale is at least 1/2, for a total of 0

  Shares(const float* mass, int64_t codes) : p(codes) {
    total = 0;
    for (int64_t k = 0; k < codes; ++k)
      total += mass[k];
    scale = total < 0.5 ? 0.5 : total;
    for (int64_t k = 0; k < codes; ++k)
      p[k] = mass[k] / scale;
  }
};

std::tuple<Tensor, Tensor, Tensor> small_lookup_free_entropy(const Tensor& x,
                                                             std::optional<Tensor> mask,
                                                             double sharpness,
                                                             int64_t group,
                                                             double floor,
                                                             int64_t channel) {
  const Problem p(x, mask, sharpness, group, channel);
  Tensor sample = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor mass = torch::stable::new_empty(x, {p.groups, p.codes}, ScalarType::Float);
  *static_cast<float*>(sample.mutable_data_ptr()) = float(p.entropy / p.count);
  float* const masses = static_cast<float*>(mass.mutable_data_ptr());
  const Buffer<float> found(p.sizes[0] * p.half_width(1));
  double total = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const Buffer<float> first = p.table(g, 0), second = p.table(g, 1);
    multiply(Strided{first.get(), p.half_width(0), 1}.transposed(), p.sizes[0], p.positions,
             second.get(), p.half_width(1), found.get());
    float* const own = masses + g * p.codes;
    for (int64_t i = 0; i < p.sizes[0]; ++i)
      std::copy_n(found.get() + i * p.half_width(1), p.sizes[1], own + i * p.sizes[1]);
    for (const double share : Shares(own, p.codes).p)
      total -= share * std::log(share < floor ? floor : share);
  }
  *static_cast<float*>(entropy.mutable_data_ptr()) = float(total);
  return {sample, entropy, mass};
}

// The gradient of the entropy in the mass of each code of a group.
std::vector<float> mass_gradient(const float* mass, int64_t codes, double floor, double gradient) {
  const Shares shares(mass, codes);
  std::vector<double> slopes(codes);
  double mean = 0;
  for (int64_t k = 0; k < codes; ++k) {
    const double p = shares.p[k];
    slopes[k] = p < floor ? -std::log(floor) : -std::log(p) - 1;
    mean += slopes[k] * p;
  }
  if (shares.total < 0.5)
    mean = 0;
  std::vector<float> found(codes);
  for (int64_t k = 0; k < codes; ++k)
    found[k] = float(gradient * (slopes[k] - mean) / shares.scale);
  return found;
}

Tensor small_lookup_free_entropy_backward(std::optional<Tensor> grad_sample,
                                          std::optional<Tensor> grad_entropy,
                                          const Tensor& mass,
                                          const Tensor& x,
                                          std::optional<Tensor> mask,
                                          double sharpness,
                                          int64_t group,
                                          double floor,
                                          int64_t channel) {
  const Problem p(x, mask, sharpness, group, channel);
  const auto gradient = [](const std::optional<Tensor>& t) {
    if (!t)
      return 0.0f;
    STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Float,
                    "gradients must be float32 scalars");
    return *static_cast<const float*>(t->data_ptr());
  };
  STD_TORCH_CHECK(mass.numel() == p.groups * p.codes && mass.is_contiguous() &&
                      mass.scalar_type() == ScalarType::Float,
                  "mass must be contiguous float32 [groups, 2^group]");
  const float of_entropies = float(gradient(grad_sample) / p.count);
  const Buffer<float> slopes(p.positions * p.width);
  for (int64_t at = 0; at < p.positions * p.width; ++at)
    slopes[at] = -of_entropies * p.logits[at] * p.ones[at] * p.zeros[at];
  for (int64_t g = 0; g < p.groups && grad_entropy; ++g) {
    const std::vector<float> upstream =
        mass_gradient(static_cast<const float*>(mass.data_ptr()) + g * p.codes, p.codes, floor,
                      gradient(grad_entropy));
    const Buffer<float> tables[2] = {p.table(g, 0), p.table(g, 1)};
    for (const int half : {0, 1}) {
      // The gradient in the probabilities of one half, from those of the other.
      const int other = 1 - half;
      const int64_t size = p.half_width(half);
      const Buffer<float> right(p.sizes[other] * size), found(p.positions * size);
      std::fill_n(right.get(), p.sizes[other] * size, 0.0f);
      for (int64_t i = 0; i < p.sizes[0]; ++i)
        for (int64_t j = 0; j < p.sizes[1]; ++j)
          right[half ? i * size + j : j * size + i] = upstream[i * p.sizes[1] + j];
      multiply({tables[other].get(), p.half_width(other), 1}, p.positions, p.sizes[other],
               right.get(), size, found.get());
      // The probability of a code has the factor p, with the derivative p q, for each bit that is
      // 1, and q, with the derivative -p q, for each that is 0. Summed separately, the two keep
      // their precision where a bit is nearly certain.
      const int64_t many = p.half_bits(half);
      for (int64_t position = 0; position < p.positions; ++position) {
        const float* const shares = found.get() + position * size;
        const float* const table = tables[half].get() + position * size;
        for (int64_t bit = 0; bit < many; ++bit) {
          float sums[2] = {};
          for (int64_t value = 0; value < p.sizes[half]; ++value)
            sums[value >> (many - 1 - bit) & 1] += shares[value] * table[value];
          const int64_t at = position * p.width + g * p.group + p.first_bit(half) + bit;
          slopes[at] += sums[1] * p.zeros[at] - sums[0] * p.ones[at];
        }
      }
    }
  }
  Tensor grad_x = torch::stable::empty_like(x);
  const HeadVectors out(grad_x, channel, false);
  with_type(x, [&]<class T>(T*) {
    T* const to = static_cast<T*>(grad_x.mutable_data_ptr());
    out.for_each(0, [&](int64_t position, int64_t offset) {
      const bool used = p.is_used(position);
      for (int64_t d = 0; d < p.bits; ++d)
        to[offset + d * out.stride] = T(used ? slopes[position * p.width + d] * p.sharpness : 0.0f);
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("small_lookup_free_entropy", TORCH_BOX(&genperf::small_lookup_free_entropy));
  m.impl("small_lookup_free_entropy_backward",
         TORCH_BOX(&genperf::small_lookup_free_entropy_backward));
}
