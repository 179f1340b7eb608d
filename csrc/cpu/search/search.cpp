// SPDX-License-Identifier: Apache-2.0
//
// The search has three passes, and none of them can lose the answer.
//
// 1. Scores s = z.f + b (code_panel.h) of all codes, in bfloat16 with AMX, in 8 bits with AVX-512
//    VNNI, or in float32. Only the maximum of each block of codes is kept, in low precision one for
//    each of its 16 columns. The error of a score has a bound that is computed per query
//    (error_bounds.cpp), in 8 bits per query and code (int8_codes.cpp), so a block whose maximum is
//    more than twice the bound below the largest one cannot hold the nearest code.
// 2. The codes of the remaining maxima, one or two of hundreds, are scored again in float32, under
//    the bound of that arithmetic: from the packed codes or, after low precision, from the original
//    inputs, which are not read otherwise.
// 3. If more than one code remains, float64 on the original inputs decides, with components in
//    ascending order and the lowest index on ties, as in the reference.
//
// An instruction of VNNI computes 64 products, one of float32 16. AMX computes 16 to 32 scores per
// cycle for any D up to 32, float32 multiply-adds 32 / (D + 1). Below D = 5 float32 is faster.
//
// Many codes of few dimensions are searched in a tree (tree_search.h), which leaves most of them
// out.
#include "cpu/search/search.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/search/block_maxima.h"
#include "cpu/search/panel_search.h"
#include "cpu/search/tree_search.h"

namespace genperf {
namespace {

constexpr int64_t kQueryBytes = 1 << 20;  // queries in a chunk, with their maxima
constexpr int64_t kMinAmxDim = 5;

// Where 8 bits are faster, and their products do not overflow 32 bits.
constexpr int64_t kMinInt8Dim = 16, kMaxInt8Dim = 32768;
constexpr int64_t kMinInt8Codes = 32, kMinInt8CodesOfFewDims = 128, kFewDims = 32;
constexpr int64_t kMinInt8Positions = 32;

// Where a tree is faster, with the time that it takes to build.
bool tree_pays(int64_t dim, int64_t codes, int64_t positions, bool cosine) {
  return dim <= kMaxTreeDim && codes >= int64_t{512} << (dim / 2) && positions >= 1024 && !cosine &&
         packing_for(dim, codes, positions) == Packing::kFloat32 &&
         codes <= kPanelBytes / packed_code_bytes(dim, Packing::kFloat32);
}

// The positions begin ... end - 1, at most one chunk, on the calling thread.
template <class T, class C>
void search_positions(const PanelSearch<T, C>& search,
                      int64_t begin,
                      int64_t end,
                      SearchScratch& s) {
  const Positions<T>& x = search.x;
  int count = 0;
  int64_t outer = begin / x.inner, inner = begin % x.inner;
  for (int64_t position = begin; position < end; ++position) {
    if (search.mask && !search.mask[position]) {
      search.indices[position] = -1;
    } else {
      s.positions[count] = position;
      s.offsets[count++] = outer * x.outer_stride + inner * x.inner_stride;
    }
    if (++inner == x.inner) {
      inner = 0;
      ++outer;
    }
  }
#if defined(GENPERF_HAS_AMX)
  if (search.panel->low_precision())
    return search_low_precision(search, count, s);
#endif
  search_fp32(search, count, s);
}

template <class T, class C>
void search_panel(PanelSearch<T, C>& search,
                  const CodePanel& panel,
                  int64_t chunk,
                  Chunks& chunks) {
  search.panel = &panel;
  chunks.search(
      panel, [&] { return SearchScratch(panel, chunk); },
      [&](SearchScratch& scratch, int64_t c) {
        scratch.rescored = 0;
        const int64_t first = c * chunk, last = std::min(search.x.count(), first + chunk);
        search_positions(search, first, last, scratch);
        return float(scratch.rescored) / float(last - first);
      });
}

}  // namespace

Packing packing_for(int64_t dim, int64_t codes, int64_t positions) {
  if (amx_allowed() && dim >= kMinAmxDim)
    return Packing::kBFloat16;
  const int64_t least = dim < kFewDims ? kMinInt8CodesOfFewDims : kMinInt8Codes;
  if (vnni_allowed() && dim >= kMinInt8Dim && dim <= kMaxInt8Dim && codes >= least &&
      positions >= kMinInt8Positions)
    return Packing::kInt8;
  return Packing::kFloat32;
}

// As many chunks for every thread, each small enough for the cache. Large codebooks, which are read
// from memory once per chunk, get larger chunks.
int64_t queries_per_chunk(const CodePanel& panel, int64_t count) {
  const int64_t bytes = std::clamp(panel.bytes() / 2, kQueryBytes, 4 * kQueryBytes);
  const int64_t fit = std::min(bytes / SearchScratch::query_bytes(panel), kMaxQueries) / kRows;
  const int64_t most = std::max<int64_t>(fit, 1);  // tiles
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = std::max<int64_t>((count + kRows * threads - 1) / (kRows * threads), 1);
  const int64_t chunks = (share + most - 1) / most;
  return (share + chunks - 1) / chunks * kRows;
}

template <class T>
void search_chunk(const Positions<T>& x,
                  const Codes<T>& codebook,
                  const CodePanel& panel,
                  const bool* mask,
                  bool cosine,
                  SearchScratch& scratch,
                  int64_t* indices) {
  PanelSearch<T, T> search(x, codebook, mask, cosine, indices);
  search.panel = &panel;
  search_positions(search, 0, x.count(), scratch);
}

template <class T, class C>
void search(const Positions<T>& x,
            const Codes<C>& codebook,
            const bool* mask,
            bool cosine,
            int64_t* indices) {
  PanelSearch<T, C> search(x, codebook, mask, cosine, indices);
  const Packing packing = packing_for(x.dim, codebook.count, x.count());
  if constexpr (!std::is_same_v<T, double>)
    if (tree_pays(x.dim, codebook.count, x.count(), cosine)) {
      Chunks chunks((x.count() + kTreeChunk - 1) / kTreeChunk, true);
      search_tree(search, CodeTree(codebook), chunks);
      if (chunks.stopped())
        search_panel(search, *packed_codebook(codebook, cosine, packing), kTreeChunk, chunks);
      return;
    }
  for_each_panel(codebook, cosine, packing, [&](const CodePanel& panel, int64_t first_code) {
    if (panel.codes < codebook.count && first_code == 0)
      search.distances = Buffer<double>(x.count());
    search.first_code = first_code;
    const int64_t chunk = queries_per_chunk(panel, x.count());
    search_chunks(
        codebook, panel, (x.count() + chunk - 1) / chunk,
        [&](const CodePanel& p, Chunks& chunks) { search_panel(search, p, chunk, chunks); });
  });
}

#define INSTANTIATE(T, C) \
  template void search(const Positions<T>&, const Codes<C>&, const bool*, bool, int64_t*);
GENPERF_FOR_SEARCH_TYPES(INSTANTIATE)
#undef INSTANTIATE

#define INSTANTIATE(T)                                                                            \
  template void search_chunk(const Positions<T>&, const Codes<T>&, const CodePanel&, const bool*, \
                             bool, SearchScratch&, int64_t*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace genperf
