// SPDX-License-Identifier: Apache-2.0
//
// The low-precision pass of the search: the largest scores of each block of codes, for a tile of
// queries. No index is tracked, so the epilogue is one addition and one maximum per 16 scores.
#pragma once

#include "cpu/common/simd.h"
#include "cpu/search/code_panel.h"

namespace genperf {

constexpr int kTile = 2 * kLanes;  // queries to a tile
constexpr int kAmxTile = 32;

// z [D, kTile] -> maxima [blocks, kTile], for the blocks begin ... end - 1.
void block_maxima_fma(const CodePanel& panel,
                      int64_t begin,
                      int64_t end,
                      const float* z,
                      float* maxima);

#if defined(GENPERF_HAS_AMX)
// halves [32, depth, 32], a query to a row -> maxima [blocks, 32, 16]: number i of the 16 is the
// maximum over the codes i of the block's groups, an even number.
void block_maxima_amx(const CodePanel& panel,
                      int64_t begin,
                      int64_t end,
                      const uint16_t* z,
                      float* maxima);
#endif

// Whether the process may use AMX; off until the loader allows it.
bool amx_allowed();

}  // namespace genperf
