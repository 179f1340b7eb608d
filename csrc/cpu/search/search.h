// SPDX-License-Identifier: Apache-2.0
//
// The search as functions, for kernels that search on their way.
#pragma once

#include "cpu/common/vector_rows.h"
#include "cpu/search/codebook_cache.h"

namespace genperf {

constexpr int64_t kMaxQueries = 512;  // positions that a thread keeps packed

// What a thread needs to search a panel for `chunk` positions at a time.
struct SearchScratch {
  SearchScratch(const CodePanel& panel, int64_t chunk)
      : z(panel.halved ? 0 : chunk * panel.dim),
        halves(panel.halved ? chunk * panel.depth * kDepth : 0),
        maxima(chunk * maxima_of(panel)),
        survivors(panel.halved ? 0 : kRows * maxima_of(panel)),
        left(panel.halved ? kRows * words(panel) : 0),
        scores(panel.groups * kGroup),
        codes(panel.halved ? panel.groups * kGroup : 0) {
    if (panel.halved)
      std::fill_n(left.get(), kRows * words(panel), 0);
  }

  // Of a query, and what is packed of it.
  static int64_t maxima_of(const CodePanel& panel) {
    return panel.blocks() * (panel.halved ? kGroup : 1);
  }
  static int64_t query_bytes(const CodePanel& panel) {
    return (panel.halved ? panel.depth * kDepth * 2 : panel.dim * 4) + maxima_of(panel) * 4;
  }

  static int64_t words(const CodePanel& panel) { return (panel.blocks() + 3) / 4; }

  // For vectors that do not lie in memory as rows.
  void* copies(int64_t bytes) {
    if (bytes > copied_bytes_) {
      copies_ = Buffer<char>(bytes);
      copied_bytes_ = bytes;
    }
    return copies_.get();
  }

  int64_t positions[kMaxQueries], offsets[kMaxQueries];
  Buffer<float> z;            // [tiles, D, kTile], for float32
  Buffer<uint16_t> halves;    // [tiles, 32, depth, 32], for AMX
  Buffer<float> maxima;       // [tiles, blocks, kTile], for AMX [tiles, blocks, 32, 16]
  Buffer<int32_t> survivors;  // [kTile, blocks], for float32
  Buffer<uint64_t> left;      // [32, words], a bit for each maximum, for AMX
  Buffer<float> scores;       // of the survivors of one query
  Buffer<int32_t> codes;      // ... to which they belong, after AMX

 private:
  Buffer<char> copies_;
  int64_t copied_bytes_ = 0;
};

// Whether codes of this dimension are packed for AMX as well.
bool searched_with_amx(int64_t dim);

// Positions, a multiple of kRows, for a thread to search at a time when there are `count` in all.
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
