// SPDX-License-Identifier: Apache-2.0
//
// The low-precision pass of the search: the largest scores of each block of codes, for a tile of
// queries. Indices are not tracked, so the epilogue is one addition and one maximum per 16 scores.
#pragma once

#include "cpu/common/simd.h"
#include "cpu/search/code_panel.h"

namespace genperf {

constexpr int kTile = 2 * kLanes;  // queries per tile
constexpr int kAmxTile = 32;

// Computes maxima [blocks, kTile] of blocks begin ... end - 1, of `block_groups` groups of codes
// each, from z [D, kTile].
void block_maxima_fma(const CodePanel& panel,
                      int64_t block_groups,
                      int64_t begin,
                      int64_t end,
                      const float* z,
                      float* maxima);

// Computes scores [codes, kTile] of the codes of groups begin ... end - 1 from z [D, kTile].
void scores_fma(const CodePanel& panel, int64_t begin, int64_t end, const float* z, float* scores);

#if defined(GENPERF_HAS_AMX)
// Computes maxima [blocks, 32, 16] from z [32, depth, 32], one query per row. Maximum i of the 16
// is over code i of each of the block's groups, whose number is even.
void block_maxima_amx(const CodePanel& panel,
                      int64_t block_groups,
                      int64_t begin,
                      int64_t end,
                      const uint16_t* z,
                      float* maxima);
#endif

// Whether AMX and AVX-512 VNNI may be used; false until the loader allows it.
bool amx_allowed();
bool vnni_allowed();

}  // namespace genperf
