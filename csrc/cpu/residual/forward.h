// SPDX-License-Identifier: Apache-2.0
//
// The search and subtraction of all stages.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/residual/codebooks.h"
#include "cpu/search/search.h"

namespace genperf {

constexpr int64_t kBlockBytes = 1 << 20;  // residuals that stay in L2 across the stages

template <class T>
class ResidualForward {
 public:
  using W = OpMath<T>;

  ResidualForward(const Positions<T>& x,
                  const Codebooks<W>& codebooks,
                  int64_t stages,
                  const bool* mask,
                  bool cosine,
                  const Positions<T>& quantized,
                  int64_t* indices)
      : x_(x),
        codebooks_(codebooks),
        stages_(stages),
        mask_(mask),
        cosine_(cosine),
        quantized_(quantized),
        indices_(indices),
        errors_(tiles_of(x.count()) * stages) {}

  void run() {
    const Packing packing = packing_for(x_.dim, codebooks_.first.count, x_.count());
    const int64_t codes = (codebooks_.codebook_stride ? stages_ : 1) * codebooks_.first.count;
    if (codes * packed_code_bytes(x_.dim, packing) > kPanelBytes)
      return by_stage();
    std::vector<std::shared_ptr<const CodePanel>> panels;
    for (int64_t stage = 0; stage < stages_; ++stage)
      panels.push_back(stage && !codebooks_.codebook_stride
                           ? panels[0]
                           : packed_codebook(codebooks_.codes(stage), cosine_, packing));
    by_block(panels);
  }

  // Sum of the squared residuals after a stage, independent of the number of threads.
  double error(int64_t stage) const {
    double total = 0;
    for (int64_t tile = 0; tile < tiles_of(x_.count()); ++tile)
      total += errors_[tile * stages_ + stage];
    return total;
  }

 private:
  void by_block(const std::vector<std::shared_ptr<const CodePanel>>& panels) {
    const int64_t chunk =
        std::max<int64_t>(queries_per_chunk(*panels[0], x_.count()) / kRows * kRows, kRows);
    const int64_t fit = kBlockBytes / (x_.dim * int64_t(sizeof(W)));
    const int64_t share = x_.count() / (2 * torch::stable::get_num_threads());
    const int64_t block = std::max(std::min(fit, share) / chunk, int64_t{1}) * chunk;
    torch::stable::parallel_for(
        0, (x_.count() + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
          SearchScratch scratch(*panels[0], chunk);
          Buffer<W> rows(block * x_.dim);
          Buffer<int64_t> found(stages_ * block);  // [stages, block]
          for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * block, last = std::min(x_.count(), first + block);
            load(first, last, rows.get());
            for (int64_t stage = 0; stage < stages_; ++stage)
              for (int64_t start = first; start < last; start += chunk) {
                const int64_t stop = std::min(last, start + chunk);
                W* const row = rows.get() + (start - first) * x_.dim;
                int64_t* const stage_indices = found.get() + stage * block + start - first;
                search_chunk(Positions<W>(row, stop - start, x_.dim), codebooks_.codes(stage),
                             *panels[stage], mask_ ? mask_ + start : nullptr, cosine_, scratch,
                             stage_indices);
                advance(stage, start, stop, stage_indices, row);
              }
            finish(first, last, found.get(), block, rows.get());
          }
        });
  }

  void by_stage() {
    const int64_t count = x_.count();
    Buffer<W> rows(count * x_.dim);
    Buffer<int64_t> found(stages_ * count);  // [stages, positions]
    const auto in_parallel = [&](const auto& f) {
      torch::stable::parallel_for(0, tiles_of(count), 8, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kRows;
        f(first, std::min(count, end * kRows), rows.get() + first * x_.dim);
      });
    };
    in_parallel([&](int64_t first, int64_t last, W* row) { load(first, last, row); });
    for (int64_t stage = 0; stage < stages_; ++stage) {
      int64_t* const stage_indices = found.get() + stage * count;
      search(Positions<W>(rows.get(), count, x_.dim), codebooks_.codes(stage), mask_, cosine_,
             stage_indices);
      in_parallel([&](int64_t first, int64_t last, W* row) {
        advance(stage, first, last, stage_indices + first, row);
      });
    }
    in_parallel([&](int64_t first, int64_t last, W* row) {
      finish(first, last, found.get() + first, count, row);
    });
  }

  // Copies positions first ... last - 1 to rows [last - first, D].
  void load(int64_t first, int64_t last, W* rows) const {
    for_each_tile(first, last, [&](int64_t position, int count) {
      Tile(x_, position, count).copy(rows + (position - first) * x_.dim);
    });
  }

  void advance(int64_t stage, int64_t first, int64_t last, const int64_t* found, W* rows) {
    for_each_tile(first, last, [&](int64_t position, int count) {
      double error = 0;
      for (int64_t i = position - first; i < position - first + count; ++i)
        if (found[i] >= 0)
          error += subtract(rows + i * x_.dim, codebooks_.code(stage, found[i]), x_.dim);
      errors_[position / kRows * stages_ + stage] = error;
    });
  }

  // Writes indices and quantized vectors from found [stages, stride]. Overwrites the rows.
  void finish(int64_t first, int64_t last, const int64_t* found, int64_t stride, W* rows) const {
    for_each_tile(first, last, [&](int64_t position, int count) {
      W* const buffer = rows + (position - first) * x_.dim;
      W* to[kRows];
      const Tile target(quantized_, position, count);
      target.output_rows(buffer, to);
      for (int lane = 0; lane < count; ++lane) {
        int64_t* const index = indices_ + (position + lane) * codebooks_.count;
        for (int64_t stage = 0; stage < codebooks_.count; ++stage)
          index[stage] = stage < stages_ ? found[stage * stride + position - first + lane] : -1;
        if (index[0] >= 0)
          add_codes(codebooks_, index, stages_, x_.dim, to[lane]);
        else
          std::fill_n(to[lane], x_.dim, W(0));
      }
      target.write(buffer);
    });
  }

  const Positions<T> x_;
  const Codebooks<W> codebooks_;
  const int64_t stages_;
  const bool* const mask_;  // [outer, inner]
  const bool cosine_;
  const Positions<T> quantized_;
  int64_t* const indices_;  // [outer, inner, Q]
  Buffer<double> errors_;   // [tiles, stages]
};

}  // namespace genperf
