// SPDX-License-Identifier: Apache-2.0
//
// The search as functions, for kernels that search on their way.
#pragma once

#include "codebook_cache.h"
#include "query_tile.h"

namespace genperf {

constexpr int64_t kMaxQueries = 512;  // positions that a thread keeps packed

// What a thread needs to search a panel for `chunk` positions at a time.
struct SearchScratch {
  SearchScratch(const CodePanel& panel, int64_t chunk)
      : z(chunk * panel.dim),
        halves(panel.halved ? chunk * panel.depth * kDepth : 0),
        maxima(chunk * panel.blocks()),
        scores(panel.groups * kGroup),
        survivors(kTile * panel.blocks()) {}

  int64_t positions[kMaxQueries], offsets[kMaxQueries];
  Buffer<float> z;            // [tiles, D, kTile]
  Buffer<uint16_t> halves;    // [tiles, 2, depth, 16, 32]
  Buffer<float> maxima;       // [tiles, blocks, kTile]
  Buffer<float> scores;       // of the surviving blocks of one query
  Buffer<int32_t> survivors;  // [kTile, blocks]
};

// Whether codes of this dimension are packed for AMX as well.
bool searched_with_amx(int64_t dim);

// Positions, a multiple of kTile, for a thread to search at a time when there are `count` in all.
int64_t queries_per_chunk(const CodePanel& panel, int64_t count);

// Indices of the nearest codes, -1 where the mask is False, of at most a chunk of positions on the
// calling thread. The codebook, whose components are contiguous, is packed in `panel`.
template <class T>
void search_chunk(const Positions<T>& x,
                  const Codes<T>& codebook,
                  const CodePanel& panel,
                  const bool* mask,
                  bool cosine,
                  SearchScratch& scratch,
                  int64_t* indices);

// The same of all positions, on all threads, in a codebook of any size.
template <class T>
void search(const Positions<T>& x,
            const Codes<T>& codebook,
            const bool* mask,
            bool cosine,
            int64_t* indices);

}  // namespace genperf
