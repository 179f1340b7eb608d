// SPDX-License-Identifier: Apache-2.0
//
// A run of codes, packed for the search: centered, scaled, in groups of 16 with the codes along the
// lanes; in float32, or for the matrix unit in bfloat16.
//
// The search maximizes s = z.f + b over the codes, with z = (x - c) * scale, f = (code - c) * scale
// and b = -|f|^2 / 2, which orders the codes as their distance to x does. The center c makes data
// far from the origin harmless; the power of two `scale` brings the largest component of f near 1,
// out of reach of overflow and underflow. For cosine similarity c = 0, f = code / |code| and b = 0.
#pragma once

#include <cstdint>

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"

namespace genperf {

#if defined(__AVX512F__)
#define GENPERF_HAS_AMX 1
#endif

constexpr int kGroup = 16;  // codes to a group
constexpr int kDepth = 32;  // bfloat16 components to a row of an AMX tile

// Codes of so few dimensions are split in two bfloat16 parts, f = fh + fl + rest, so that the three
// products zh.fh + zh.fl + zl.fh fill one row of a tile with nearly float32's accuracy.
constexpr int kMaxSplitDim = kDepth / 3;

struct CodePanel {
  int64_t codes = 0;         // real codes; what pads them has bias = -infinity
  int64_t dim = 0;           // D
  int64_t depth = 0;         // rows of kDepth components that hold D, or 3 D if split
  int64_t capacity = 0;      // codes that the buffers hold
  int64_t groups = 0;        // groups in use, an even number and a multiple of block_groups
  int64_t block_groups = 2;  // groups to a block, of which only the largest scores are kept
  bool cosine = false;
  bool bf16 = false;  // packed for AMX
  bool split = false;
  float scale = 1;
  Buffer<float> center;  // [D], padded with zeros to whole vectors
  Buffer<float> values;  // [groups, D, 16], unless halved
  Buffer<uint16_t>
      bf16_values;      // [groups, depth, 16 pairs of components, 16, 2] bfloat16, if halved
  Buffer<float> bias;   // [groups, 16]
  double norm = 0;      // longest f
  double low_norm = 0;  // longest fl, if split
  double residual = 0;  // longest part of f that bfloat16 leaves out
  double max_bias = 0;  // largest |b|

  int64_t blocks() const { return groups / block_groups; }
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

// What holds a code in a panel takes this much.
int64_t packed_code_bytes(int64_t dim, bool bf16);

// Allocates a panel for `capacity` codes of the codebook, whose components are contiguous and of
// absolute value at most `largest`, those that are finite: center and scale depend on the whole
// codebook.
template <class C>
CodePanel prepare_panel(const Codes<C>& codebook,
                        double largest,
                        int64_t capacity,
                        bool cosine,
                        bool bf16);

// Packs the codes from `first` on, as many as there is room for.
template <class C>
void pack_panel(CodePanel& panel, const Codes<C>& codebook, int64_t first);

}  // namespace genperf
