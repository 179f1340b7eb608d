// SPDX-License-Identifier: Apache-2.0
//
// A run of codes, packed for the search: centred, scaled, in groups of 16 with the codes along the
// lanes.
//
// The search maximises s = z.f - b over the codes, with z = (x - c) * scale, f = (code - c) * scale
// and b = |f|^2 / 2, which orders the codes as their distance to x does. The centre c makes data
// far from the origin harmless; the power of two `scale` brings the longest f near 1, out of reach
// of overflow and underflow. For cosine similarity c = 0, f = code / |code| and b = 0.
#pragma once

#include <cstdint>

#include "positions.h"

namespace genperf {

constexpr int kGroup = 16;  // codes to a group
constexpr int kDepth = 32;  // bfloat16 components to a row of an AMX tile

struct CodePanel {
  int64_t codes = 0;     // real codes; what pads them has bias = infinity
  int64_t dim = 0;       // D
  int64_t depth = 0;     // rows of kDepth components that hold D
  int64_t capacity = 0;  // codes that the buffers hold
  int64_t groups = 0;    // groups in use, a multiple of block_groups
  int64_t block_groups = 2;
  float scale = 1;
  Buffer<float> centre;      // [D]
  Buffer<float> values;      // [groups, D, 16]
  Buffer<uint16_t> halves;   // [groups, depth, 16, 32] bfloat16, if AMX is used
  Buffer<float> bias;        // [groups, 16]
  double norm = 0;           // longest f
  double half_residual = 0;  // longest f - bfloat16(f)
  double max_bias = 0;

  int64_t blocks() const { return groups / block_groups; }
};

// Centre and scale depend on the whole codebook, so they are found before it is cut into panels.
template <class C>
CodePanel prepare_panel(const Codes<C>& codebook, int64_t capacity, bool cosine, bool use_amx);

template <class C>
void pack_panel(CodePanel& panel,
                const Codes<C>& codebook,
                int64_t first,
                bool cosine,
                bool use_amx);

}  // namespace genperf
