// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/code_panel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "cpu/common/elements.h"
#include "cpu/common/simd.h"
#include "cpu/common/vector_rows.h"
#include "cpu/search/int8_codes.h"
#include "cpu/search/interleave.h"

namespace genperf {
namespace {

constexpr int64_t kCenterSample = 256;
constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kSingleGroupDim =
    48;  // blocks have one group from this D on, because rescoring a block is expensive
constexpr int64_t kMaxGroups = 64;  // per block, in low precision

int64_t tile_depth(int64_t dim) {
  return (dim <= kMaxSplitDim ? 3 * dim + kDepth - 1 : dim + kDepth - 1) / kDepth;
}

// In float32 every candidate block is rescored as a whole. In low precision a query reads codes /
// groups maxima, and rescores as many codes per candidate as a block has groups.
int64_t groups_to_a_block(int64_t codes, int64_t dim, Packing packing) {
  if (packing == Packing::kFloat32) {
    const int64_t pairs = (codes + 2 * kGroup - 1) / (2 * kGroup);
    const int64_t groups = 2 * ((pairs + kMaxBlocks - 1) / kMaxBlocks);
    return groups == 2 && dim >= kSingleGroupDim ? 1 : groups;
  }
  if (packing == Packing::kInt8) {
    int64_t groups = 1;
    while (groups < kMaxGroups && groups * groups * (3 * dim + 128) < codes)
      groups *= 2;
    return groups;
  }
  int64_t groups = 4;
  while (groups < kMaxGroups && groups * groups * (dim + 128) < codes)
    groups *= 2;
  return groups;
}

// Every center gives a correct result; the mean of a sample of the codes makes the search fast.
// Codes more than four times as long as half of the sample are left out of it, since a few of them
// could move the center away from all others.
template <class C>
void find_center(const Codes<C>& codebook, float* center) {
  const int64_t step = (codebook.count + kCenterSample - 1) / kCenterSample;
  const int64_t sampled = (codebook.count + step - 1) / step;
  double squares[kCenterSample], sorted[kCenterSample];
  Buffer<double> sums(codebook.dim);
  // Adds up the codes whose squared length is at most `longest`, and sets the squared lengths.
  const auto sum_up = [&](double longest) {
    std::fill_n(sums.get(), codebook.dim, 0.0);
    int64_t count = 0;
    for (int64_t i = 0; i < sampled; ++i) {
      if (squares[i] > longest)
        continue;
      const C* code = codebook.data + i * step * codebook.code_stride;
      const auto add = [&](int64_t d, double& square) {
        const double value = double(code[d]), kept = std::abs(value) < 1e30 ? value : 0.0;
        sums[d] += kept;
        square += kept * kept;
      };
      double parts[8] = {};  // independent, so that no addition waits for the one before
      int64_t d = 0;
      for (; d + 8 <= codebook.dim; d += 8)
        for (int part = 0; part < 8; ++part)
          add(d + part, parts[part]);
      for (; d < codebook.dim; ++d)
        add(d, parts[0]);
      squares[i] = std::accumulate(parts, parts + 8, 0.0);
      ++count;
    }
    return count;
  };
  std::fill_n(squares, sampled, 0.0);
  int64_t count = sum_up(INFINITY);
  std::copy_n(squares, sampled, sorted);
  std::nth_element(sorted, sorted + sampled / 2, sorted + sampled);
  const double longest = 16 * sorted[sampled / 2];
  if (*std::max_element(squares, squares + sampled) > longest)
    count = sum_up(longest);
  for (int64_t d = 0; d < codebook.dim; ++d)
    center[d] = float(sums[d] / double(count));
}

// The largest |f| of each block, from the biases. What underflows in a bias is below 2^-62 in |f|.
void set_block_norms(CodePanel& panel) {
  const int64_t block_codes = panel.block_groups * kGroup;
  float shortest = INFINITY, longest = 0;
  for (int64_t block = 0; block < panel.blocks(); ++block) {
    const int64_t begin = block * block_codes, end = std::min(begin + block_codes, panel.codes);
    float largest = -1;
    for (int64_t k = begin; k < end; ++k)
      if (std::isfinite(panel.bias[k]))
        largest = std::max(largest, -panel.bias[k]);
    const float norm = std::sqrt(2 * std::max(largest, 0.0f)) + 0x1p-62f;
    panel.block_norm[block] = norm;
    if (largest >= 0) {
      shortest = std::min(shortest, norm);
      longest = std::max(longest, norm);
    }
  }
  panel.uneven_blocks = longest > 2 * shortest;
}

void widen(Vec v, DVec& low, DVec& high) {
  using Half = float __attribute__((vector_size(kDoubles * sizeof(float))));
  Half parts[2];
  std::memcpy(parts, &v, sizeof(v));
  low = __builtin_convertvector(parts[0], DVec);
  high = __builtin_convertvector(parts[1], DVec);
}

template <class C>
void load_pair(const C* p, DVec& low, DVec& high) {
  if constexpr (std::is_same_v<C, double>) {
    low = load_doubles(p);
    high = load_doubles(p + kDoubles);
  } else {
    widen(load(p), low, high);
  }
}

void store_pair(float* p, DVec low, DVec high) {
  using Half = float __attribute__((vector_size(kDoubles * sizeof(float))));
  const Half parts[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
  std::memcpy(p, parts, sizeof(parts));
}

// row = (code - center) * factor, each rounded once. Returns |code - center|^2.
template <class C>
double pack_code(const C* code, const float* center, double factor, int64_t dim, float* row) {
  DVec squares[2] = {};
  const DVec factors = broadcast(factor);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    DVec low, high, center_low, center_high;
    load_pair(code + d, low, high);
    load_pair(center + d, center_low, center_high);
    low -= center_low;
    high -= center_high;
    squares[0] += low * low;
    squares[1] += high * high;
    store_pair(row + d, low * factors, high * factors);
  }
  double square = sum(squares[0] + squares[1]);
  for (; d < dim; ++d) {
    const double t = double(code[d]) - double(center[d]);
    square += t * t;
    row[d] = float(t * factor);
  }
  return square;
}

// The same at half the cost, for a factor that is a power of two and codes below float64. The
// result is the squared length of the rounded difference.
template <class C>
double pack_code(const C* code, const float* center, float scale, int64_t dim, float* row) {
  DVec squares[2] = {};
  for_each_pack<float>(dim, [&](int64_t d, auto n) {
    const Vec left = Pack<float>::get(code + d, n) - load(center + d);
    DVec low, high;
    widen(left, low, high);
    squares[0] += low * low;
    squares[1] += high * high;
    Pack<float>::set(row + d, n, left * broadcast(scale));
  });
  return sum(squares[0] + squares[1]);
}

template <class C, class F>
bool every(const C* code, int64_t dim, const F& holds) {
  for (int64_t d = 0; d < dim; ++d)
    if (!holds(double(code[d])))
      return false;
  return true;
}

void raise_to(std::atomic<double>& maximum, double value) {
  double seen = maximum.load();
  while (value > seen && !maximum.compare_exchange_weak(seen, value)) {
  }
}

using Narrow = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

Narrow upper_halves(Vec v) {
  return __builtin_convertvector(UVec(v) >> 16, Narrow);
}

// Squared lengths, or the largest of several codes: of fl, and of what bfloat16 leaves out.
struct PartSquares {
  double low = 0, rest = 0;
};

// Rounds one code from `row`, which is padded with zeros to full vectors.
void round_to_bf16(const float* row, int64_t dim, uint16_t* bf16_row, PartSquares& largest) {
  Vec squares{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec value = load(row + d), high = round_to_bfloat16(value), left = value - high;
    const Narrow bits = upper_halves(high);
    std::memcpy(bf16_row + d, &bits, sizeof(bits));
    squares = fma(left, left, squares);
  }
  largest.rest = std::max(largest.rest, Pack<float>::total(squares));
}

// The same in two parts, with columns [fh, fl, fh].
void split_to_bf16(const float* row, int64_t dim, uint16_t* bf16_row, PartSquares& largest) {
  const Vec value = load(row), high = round_to_bfloat16(value),
            low = round_to_bfloat16(value - high);
  const Vec left = value - high - low;
  const Narrow first = upper_halves(high), second = upper_halves(low);
  // The next part overwrites the zeros after this one.
  uint16_t columns[kDepth + kLanes] = {};
  std::memcpy(columns, &first, sizeof(first));
  std::memcpy(columns + dim, &second, sizeof(second));
  std::memcpy(columns + 2 * dim, &first, sizeof(first));
  std::memcpy(bf16_row, columns, kDepth * sizeof(uint16_t));
  largest.low = std::max(largest.low, Pack<float>::total(low * low));
  largest.rest = std::max(largest.rest, Pack<float>::total(left * left));
}

}  // namespace

int64_t packed_code_bytes(int64_t dim, Packing packing) {
  switch (packing) {
    case Packing::kBFloat16:
      return sizeof(float) + tile_depth(dim) * kDepth * sizeof(uint16_t);
    case Packing::kInt8:
      return 5 * sizeof(float) + round_up(dim, 4);
    default:
      return (dim + 1) * sizeof(float);
  }
}

int64_t CodePanel::bytes() const {
  return capacity * packed_code_bytes(dim, packing);
}

int64_t CodePanel::query_bytes() const {
  switch (packing) {
    case Packing::kBFloat16:
      return depth * kDepth * sizeof(uint16_t);
    case Packing::kInt8:
      return 4 * int8_units();
    default:
      return dim * sizeof(float);
  }
}

template <class C>
CodePanel prepare_panel(const Codes<C>& codebook,
                        double largest,
                        int64_t capacity,
                        bool cosine,
                        Packing packing) {
  CodePanel panel;
  panel.dim = codebook.dim;
  panel.cosine = cosine;
  panel.packing = packing;
  panel.split = packing == Packing::kBFloat16 && codebook.dim <= kMaxSplitDim;
  panel.depth = tile_depth(codebook.dim);
  panel.block_groups = groups_to_a_block(capacity, codebook.dim, packing);
  panel.capacity = round_up(capacity, std::max<int64_t>(panel.block_groups, 2) * kGroup);
  panel.center = Buffer<float>(round_up(panel.dim, kLanes));
  panel.bias = Buffer<float>(panel.capacity);
  if (packing == Packing::kBFloat16)
    panel.bf16_values = Buffer<uint16_t>(panel.capacity * panel.depth * kDepth);
  else if (packing == Packing::kInt8)
    panel.int8 = int8_codes(panel);
  else
    panel.values = Buffer<float>(panel.capacity * panel.dim);
  std::fill_n(panel.center.get(), round_up(panel.dim, kLanes), 0.0f);
  if (cosine)
    return panel;
  if (packing == Packing::kFloat32)
    panel.block_norm = Buffer<float>(panel.capacity / (panel.block_groups * kGroup));
  find_center(codebook, panel.center.get());
  for (int64_t d = 0; d < panel.dim; ++d)
    largest = std::max(largest, double(std::abs(panel.center[d])));
  if (largest > 0)
    panel.scale = float(std::exp2(-std::clamp(std::ilogb(largest) + 1, -100, 100)));
  return panel;
}

template <class C>
void pack_panel(CodePanel& panel, const Codes<C>& codebook, int64_t first) {
  const int64_t dim = panel.dim, row_length = round_up(dim, kLanes);
  panel.codes = std::min(codebook.count - first, panel.capacity);
  panel.groups = round_up(panel.codes, std::max<int64_t>(panel.block_groups, 2) * kGroup) / kGroup;
  std::atomic<double> norm = 0, low_norm = 0, residual = 0, max_bias = 0;
  const auto pack_groups = [&](int64_t begin, int64_t end) {
    Buffer<float> rows(kGroup * row_length);
    std::fill_n(rows.get(), kGroup * row_length, 0.0f);
    const bool bf16 = panel.packing == Packing::kBFloat16;
    const int64_t bf16_length = panel.depth * kDepth;
    Buffer<uint16_t> bf16_rows(bf16 ? kGroup * bf16_length : 0);
    if (bf16)
      std::fill_n(bf16_rows.get(), kGroup * bf16_length, 0);
    double lengths[kGroup], longest = 0, largest_bias = 0;
    PartSquares largest;
    for (int64_t group = begin; group < end; ++group) {
      for (int lane = 0; lane < kGroup; ++lane) {
        const int64_t k = group * kGroup + lane;
        const C* code = codebook.data + (first + k) * codebook.code_stride;
        float* row = rows.get() + lane * row_length;
        double factor = panel.scale;
        double square = INFINITY;
        lengths[lane] = 0;
        if (k < panel.codes) {
          if constexpr (std::is_same_v<C, double>)
            square = pack_code(code, panel.center.get(), factor, dim, row);
          else
            square = pack_code(code, panel.center.get(), panel.scale, dim, row);
        }
        if (!std::isfinite(square)) {
          // Padding, or a code with NaN or infinity, which can only be the nearest of a query that
          // is not finite; such queries are searched in float64. A finite code whose length
          // overflows float64 makes all queries use float64.
          panel.bias[k] = -INFINITY;
          std::fill_n(row, dim, 0.0f);
          const auto finite = [](double value) { return std::isfinite(value); };
          if (k < panel.codes && every(code, dim, finite))
            longest = INFINITY;
        } else if (panel.cosine) {
          // A square below float64's normal range gives no usable direction, with the same result.
          const auto zero = [](double value) { return value == 0; };
          if (square < 1e-290 && !every(code, dim, zero))
            longest = INFINITY;
          factor = square > 0 ? 1 / std::sqrt(square) : 0.0;
          pack_code(code, panel.center.get(), factor, dim, row);
          panel.bias[k] = 0;
          lengths[lane] = std::sqrt(square) * factor;
          longest = std::max(longest, lengths[lane]);
        } else {
          const double length = lengths[lane] = std::sqrt(square) * factor;
          panel.bias[k] = float(-length * length / 2);
          longest = std::max(longest, length);
          largest_bias = std::max(largest_bias, length * length / 2);
        }
        if (bf16)
          (panel.split ? split_to_bf16 : round_to_bf16)(
              row, dim, bf16_rows.get() + lane * bf16_length, largest);
      }
      if (bf16)
        interleave_pairs(bf16_rows.get(), panel.depth,
                         panel.bf16_values.get() + group * kGroup * bf16_length);
      else if (panel.packing == Packing::kInt8)
        pack_int8(panel, group, rows.get(), row_length, lengths);
      else
        interleave(rows.get(), row_length, dim, panel.values.get() + group * dim * kGroup);
    }
    raise_to(norm, longest);
    raise_to(max_bias, largest_bias);
    raise_to(low_norm, std::sqrt(largest.low));
    raise_to(residual, std::sqrt(largest.rest));
  };
  torch::stable::parallel_for(0, panel.groups, 16, pack_groups);
  panel.norm = norm;
  panel.low_norm = low_norm;
  panel.residual = residual;
  panel.max_bias = max_bias;
  if (panel.packing == Packing::kInt8)
    set_block_errors(panel);
  else if (panel.packing == Packing::kFloat32 && !panel.cosine)
    set_block_norms(panel);
}

#define INSTANTIATE(C)                                                                  \
  template CodePanel prepare_panel<C>(const Codes<C>&, double, int64_t, bool, Packing); \
  template void pack_panel<C>(CodePanel&, const Codes<C>&, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(torch::headeronly::BFloat16)
INSTANTIATE(torch::headeronly::Half)
#undef INSTANTIATE

}  // namespace genperf
