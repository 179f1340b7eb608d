// SPDX-License-Identifier: Apache-2.0
#include "code_panel.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "simd.h"

namespace genperf {
namespace {

constexpr int64_t kCentreSample = 256;
constexpr int64_t kMaxBlocks = 1024;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Any centre gives a right answer; the mean of a sample of the codes gives a fast one.
template <class C>
void find_centre(const Codes<C>& codebook, float* centre) {
  const int64_t step = (codebook.count + kCentreSample - 1) / kCentreSample;
  for (int64_t d = 0; d < codebook.dim; ++d) {
    double sum = 0;
    int64_t finite = 0;
    for (int64_t k = 0; k < codebook.count; k += step) {
      const double value = double(codebook.data[k * codebook.code_stride + d * codebook.stride]);
      if (std::abs(value) < 1e30) {
        sum += value;
        ++finite;
      }
    }
    centre[d] = finite ? float(sum / finite) : 0.0f;
  }
}

// |code - centre|^2, or |code|^2 for cosine; several sums so that the compiler can use vectors.
template <class C>
double squared_norm(const C* code, int64_t stride, const float* centre, int64_t dim) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums)
    for (int i = 0; i < kSums; ++i) {
      const double t = double(code[(d + i) * stride]) - double(centre[d + i]);
      sums[i] += t * t;
    }
  for (; d < dim; ++d) {
    const double t = double(code[d * stride]) - double(centre[d]);
    sums[0] += t * t;
  }
  double total = 0;
  for (double sum : sums)
    total += sum;
  return total;
}

template <class C, class F>
bool every(const C* code, int64_t stride, int64_t dim, const F& holds) {
  for (int64_t d = 0; d < dim; ++d)
    if (!holds(double(code[d * stride])))
      return false;
  return true;
}

void raise_to(std::atomic<double>& maximum, double value) {
  double seen = maximum.load();
  while (value > seen && !maximum.compare_exchange_weak(seen, value)) {
  }
}

uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return uint16_t(bits >> 16);
}

// One group of 16 from its float values: bfloat16 rows for AMX, and the longest rounding error
// among its codes.
double pack_halves(const float* values, int64_t dim, int64_t depth, uint16_t* halves) {
  float residual[kGroup] = {};
  std::memset(halves, 0, depth * kGroup * kDepth * sizeof(uint16_t));
  for (int64_t d = 0; d < dim; ++d)
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      const Vec value = load(values + d * kGroup + lane);
      const Vec rounded = round_to_bfloat16(value);
      const Vec error = value - rounded;
      store(residual + lane, load(residual + lane) + error * error);
      for (int i = 0; i < kLanes; ++i)
        halves[(d / kDepth * kGroup + lane + i) * kDepth + d % kDepth] = upper_half(rounded[i]);
    }
  return std::sqrt(double(*std::max_element(residual, residual + kGroup)));
}

}  // namespace

template <class C>
CodePanel prepare_panel(const Codes<C>& codebook, int64_t capacity, bool cosine, bool use_amx) {
  CodePanel panel;
  panel.dim = codebook.dim;
  panel.depth = (codebook.dim + kDepth - 1) / kDepth;
  const int64_t pairs = (capacity + 2 * kGroup - 1) / (2 * kGroup);
  panel.block_groups = 2 * ((pairs + kMaxBlocks - 1) / kMaxBlocks);
  panel.capacity = round_up(capacity, panel.block_groups * kGroup);
  panel.centre = Buffer<float>(panel.dim);
  panel.values = Buffer<float>(panel.capacity * panel.dim);
  panel.bias = Buffer<float>(panel.capacity);
  if (use_amx)
    panel.halves = Buffer<uint16_t>(panel.capacity * panel.depth * kDepth);
  if (cosine) {
    std::fill_n(panel.centre.get(), panel.dim, 0.0f);
    return panel;
  }
  find_centre(codebook, panel.centre.get());
  std::atomic<double> longest = 0;
  torch::stable::parallel_for(0, codebook.count, 256, [&](int64_t begin, int64_t end) {
    double local = 0;
    for (int64_t k = begin; k < end; ++k) {
      const double norm = squared_norm(codebook.data + k * codebook.code_stride, codebook.stride,
                                       panel.centre.get(), panel.dim);
      if (std::isfinite(norm))
        local = std::max(local, norm);
    }
    raise_to(longest, local);
  });
  const double norm = std::sqrt(longest.load());
  if (norm > 0)
    panel.scale = float(std::exp2(-std::clamp(std::ilogb(norm), -100, 100)));
  return panel;
}

template <class C>
void pack_panel(CodePanel& panel,
                const Codes<C>& codebook,
                int64_t first,
                bool cosine,
                bool use_amx) {
  const int64_t dim = panel.dim;
  panel.codes = std::min(codebook.count - first, panel.capacity);
  panel.groups = round_up(panel.codes, panel.block_groups * kGroup) / kGroup;
  std::atomic<double> norm = 0, half_residual = 0, max_bias = 0;
  torch::stable::parallel_for(0, panel.groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      float* values = panel.values.get() + group * dim * kGroup;
      double longest = 0, largest_bias = 0;
      for (int lane = 0; lane < kGroup; ++lane) {
        const int64_t k = group * kGroup + lane;
        float& bias = panel.bias[k];
        const C* code = codebook.data + (first + k) * codebook.code_stride;
        const double square = k < panel.codes
                                  ? squared_norm(code, codebook.stride, panel.centre.get(), dim)
                                  : INFINITY;
        if (!std::isfinite(square)) {
          // Padding, or a code with NaN or infinity, which only a query that is not finite either
          // can choose: such queries are searched in float64. A finite code too long for float64
          // makes every query so.
          bias = INFINITY;
          for (int64_t d = 0; d < dim; ++d)
            values[d * kGroup + lane] = 0;
          const auto finite = [](double value) { return std::isfinite(value); };
          if (k < panel.codes && every(code, codebook.stride, dim, finite))
            longest = INFINITY;
          continue;
        }
        // A code whose square is below float64's normal range has no usable direction: the same.
        const auto zero = [](double value) { return value == 0; };
        if (cosine && square < 1e-290 && !every(code, codebook.stride, dim, zero))
          longest = INFINITY;
        const double factor = cosine ? (square > 0 ? 1 / std::sqrt(square) : 0.0) : panel.scale;
        for (int64_t d = 0; d < dim; ++d)
          values[d * kGroup + lane] =
              float((double(code[d * codebook.stride]) - double(panel.centre[d])) * factor);
        const double length = std::sqrt(square) * factor;
        bias = cosine ? 0.0f : float(length * length / 2);
        longest = std::max(longest, length);
        largest_bias = std::max(largest_bias, double(bias));
      }
      raise_to(norm, longest);
      raise_to(max_bias, largest_bias);
      if (use_amx)
        raise_to(half_residual,
                 pack_halves(values, dim, panel.depth,
                             panel.halves.get() + group * panel.depth * kGroup * kDepth));
    }
  });
  panel.norm = norm;
  panel.half_residual = half_residual;
  panel.max_bias = max_bias;
}

#define INSTANTIATE(C)                                                       \
  template CodePanel prepare_panel<C>(const Codes<C>&, int64_t, bool, bool); \
  template void pack_panel<C>(CodePanel&, const Codes<C>&, int64_t, bool, bool);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(torch::headeronly::BFloat16)
INSTANTIATE(torch::headeronly::Half)
#undef INSTANTIATE

}  // namespace genperf
