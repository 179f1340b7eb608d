// SPDX-License-Identifier: Apache-2.0
//
// Exact nearest-code search. nearest_code calls it, and so does residual quantization, which
// searches the residual of every stage.
#pragma once

#include "cpu/common/vector_rows.h"
#include "cpu/search/codebook_cache.h"

namespace genperf {

constexpr int64_t kMaxQueries = 512;  // positions in a chunk

// Buffers of one thread for searching a panel, `chunk` positions at a time.
struct SearchScratch {
  SearchScratch(const CodePanel& panel, int64_t chunk)
      : z(panel.low_precision() ? 0 : chunk * panel.dim),
        packed(panel.low_precision() ? chunk * panel.query_bytes() : 0),
        maxima(chunk * maxima_per_query(panel)),
        candidate_blocks(panel.low_precision() ? 0 : kRows * maxima_per_query(panel)),
        candidate_bits(panel.low_precision() ? kRows * words_per_query(panel) : 0),
        scores(panel.groups * kGroup + 4),
        codes(panel.low_precision() ? panel.groups * kGroup : 0) {
    if (panel.low_precision())
      std::fill_n(candidate_bits.get(), kRows * words_per_query(panel), 0);
  }

  static int64_t maxima_per_query(const CodePanel& panel) {
    return panel.blocks() * (panel.low_precision() ? kGroup : 1);
  }

  static int64_t words_per_query(const CodePanel& panel) { return (panel.blocks() + 3) / 4; }

  // Bytes of a packed query and its maxima.
  static int64_t query_bytes(const CodePanel& panel) {
    return panel.query_bytes() + maxima_per_query(panel) * 4;
  }

  // Room for the rows of vectors that are not contiguous in memory.
  void* rows(int64_t bytes) {
    if (bytes > row_bytes_) {
      rows_ = Buffer<char>(bytes);
      row_bytes_ = bytes;
    }
    return rows_.get();
  }

  int64_t positions[kMaxQueries], offsets[kMaxQueries];
  Buffer<float> z;                   // [tiles, D, kTile], in float32
  Buffer<char> packed;               // tiles of 32 queries, in low precision
  Buffer<float> maxima;              // [tiles, blocks, kTile]; [tiles, blocks, 32, 16]
  Buffer<int32_t> candidate_blocks;  // [kTile, blocks], in float32
  Buffer<uint64_t> candidate_bits;   // [32, words], one bit per maximum, in low precision
  Buffer<float> scores;              // of the candidates of one query
  Buffer<int32_t> codes;             // to which the scores belong, in low precision
  int64_t rescored = 0;              // codes scored again in low precision

 private:
  Buffer<char> rows_;
  int64_t row_bytes_ = 0;
};

// How the search of a codebook for a number of positions packs the codes.
Packing packing_for(int64_t dim, int64_t codes, int64_t positions);

// Positions in a chunk, a multiple of kRows, for a search of `count` positions.
int64_t queries_per_chunk(const CodePanel& panel, int64_t count);

// Writes the indices of the nearest codes of at most one chunk of positions, on the calling thread;
// -1 where the mask is False. `panel` holds the codebook, whose components are contiguous.
template <class T>
void search_chunk(const Positions<T>& x,
                  const Codes<T>& codebook,
                  const CodePanel& panel,
                  const bool* mask,
                  bool cosine,
                  SearchScratch& scratch,
                  int64_t* indices);

// The same for all positions, on all threads, with a codebook of any size.
template <class T, class C>
void search(const Positions<T>& x,
            const Codes<C>& codebook,
            const bool* mask,
            bool cosine,
            int64_t* indices);

}  // namespace genperf
