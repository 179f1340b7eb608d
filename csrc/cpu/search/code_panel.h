// SPDX-License-Identifier: Apache-2.0
//
// Codes packed for the search: centered, scaled, in groups of 16 with the codes along the lanes, in
// float32 or for a first pass in lower precision: in bfloat16 for AMX, in 8 bits for AVX-512 VNNI.
//
// The search maximizes s = z.f + b over the codes, with z = (x - c) * scale, f = (code - c) * scale
// and b = -|f|^2 / 2. This orders the codes by their distance to x. The center c keeps data far
// from the origin accurate. `scale` is a power of two that brings the largest component of f near
// 1, away from overflow and underflow. For cosine similarity c = 0, f = code / |code| and b = 0.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"

namespace genperf {

#if defined(__AVX512F__)
#define GENPERF_HAS_AMX 1
#define GENPERF_HAS_VNNI 1
#endif

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

enum class Packing { kFloat32, kBFloat16, kInt8 };

constexpr int kGroup = 16;  // codes per group
constexpr int kDepth = 32;  // bfloat16 components per row of an AMX tile

// Codes of at most this many dimensions are split in two bfloat16 parts, f = fh + fl + rest, so
// that the three products zh.fh + zh.fl + zl.fh fill one row of a tile with nearly the accuracy of
// float32.
constexpr int kMaxSplitDim = kDepth / 3;

// Codes in 8 bits, f = scale * q + rest, and per code what bounds the error of its score: for a
// query z with a rest of length r the score is off by at most
//   |z| rest + r length + bias_error + a constant of the query (int8_queries.h).
// The biases of the panel are those of the largest scores that the codes can have, b + bias_error.
struct Int8Codes {
  Buffer<uint8_t> values;                         // [groups, units of 4 components, 16, 4], q + 128
  Buffer<float> scale, rest, length, bias_error;  // [groups, 16]
  Buffer<float> block_rest, block_length, block_bias_error;   // [blocks, 16], the largest
  float most_rest = 0, most_length = 0, most_bias_error = 0;  // of all codes
};

struct CodePanel {
  int64_t codes = 0;         // without padding, which has bias = -infinity
  int64_t dim = 0;           // D
  int64_t depth = 0;         // rows of kDepth components that hold D, or 3 D if split
  int64_t capacity = 0;      // codes that the buffers hold
  int64_t groups = 0;        // in use; even, and a multiple of block_groups
  int64_t block_groups = 2;  // groups per block, of which only the largest scores are kept
  bool cosine = false;
  Packing packing = Packing::kFloat32;
  bool split = false;  // in bfloat16
  float scale = 1;
  Buffer<float> center;          // [D], padded with zeros to full vectors
  Buffer<float> values;          // [groups, D, 16], in float32
  Buffer<uint16_t> bf16_values;  // [groups, depth, 16 pairs of components, 16, 2], in bfloat16
  Int8Codes int8;                // in 8 bits
  Buffer<float> bias;            // [groups, 16]
  double norm = 0;               // largest |f|
  double low_norm = 0;           // largest |fl|, if split
  double residual = 0;           // largest |part of f that bfloat16 leaves out|
  double max_bias = 0;           // largest |b|

  // In float32, whether the largest |f| of some blocks is more than twice that of others. A block
  // and a code then have error bounds of their own; the search with AMX and the search for k codes
  // use those of the panel.
  bool uneven_blocks = false;
  Buffer<float> block_norm;  // [blocks], the largest |f| of each, in float32 unless cosine

  int64_t blocks() const { return groups / block_groups; }

  // Whether the first pass has a lower precision than float32. A block then has a maximum for each
  // of its 16 columns, and the second pass reads the original inputs.
  bool low_precision() const { return packing != Packing::kFloat32; }

  int64_t int8_units() const { return (dim + 3) / 4; }

  // Size of a packed query.
  int64_t query_bytes() const;
  int64_t bytes() const;
};

// A vector of (x - center) * scale, rounded once.
template <class T>
inline Vec centered(const T* x, Vec center, float scale) {
  if constexpr (std::is_same_v<T, double>) {
    Vec z;
    for (int i = 0; i < kLanes; ++i)
      z[i] = float((x[i] - double(center[i])) * double(scale));
    return z;
  } else {
    return (load(x) - center) * broadcast(scale);
  }
}

// A vector of the last `count` components.
template <class W>
Vec centered(const W* x, Vec center, float scale, int count) {
  alignas(64) W padded[kLanes] = {};
  std::copy_n(x, count, padded);
  return centered(padded, center, scale);
}

// The size of a packed code.
int64_t packed_code_bytes(int64_t dim, Packing packing);

// Allocates a panel for `capacity` codes. Center and scale are those of the whole codebook, whose
// components are contiguous; `largest` is the largest absolute value of the finite ones.
template <class C>
CodePanel prepare_panel(const Codes<C>& codebook,
                        double largest,
                        int64_t capacity,
                        bool cosine,
                        Packing packing);

// Packs the codes from `first` on, up to the panel's capacity.
template <class C>
void pack_panel(CodePanel& panel, const Codes<C>& codebook, int64_t first);

}  // namespace genperf
