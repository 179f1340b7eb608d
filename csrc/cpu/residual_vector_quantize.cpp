// SPDX-License-Identifier: Apache-2.0
//
// Residual quantization: every level searches what the levels before it leave of a vector.
//
// A block of positions goes through all levels on one thread while its residual, in float32
// whatever the dtype and layout of x, stays in L2: a megabyte of it, so that the codes of a level,
// which every block reads again, serve many positions. Against passes over the whole tensor that
// saves a quarter where the search is short (65536 positions, K = 64), nothing where it is long (K
// = 1024), and a barrier for every level. Codebooks that do not stay packed in cache together are
// passed over level by level instead, each once, by all threads. In either case the residual is
// rounded after every level, c_0 first, and a level's index is the exact one for it.
//
// Backward and statistics find the residuals again from x and the indices: a chain of subtractions
// costs less than reading what has been written to memory. The statistics need the vectors of a
// code one after the other, so theirs is a chain over one residual for all positions, of which
// every level adds up and updates the rows code by code.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/vector_rows.h"
#include "cpu/search/search.h"

namespace genperf {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // residual that goes through all levels in L2

// [Q, K, D], components contiguous.
template <class W>
struct Levels {
  explicit Levels(const Tensor& codebooks)
      : first(torch::stable::select(codebooks, 0, 0)),
        count(codebooks.size(0)),
        level_stride(codebooks.stride(0)) {}

  Codes<W> codes(int64_t level) const {
    Codes<W> codes = first;
    codes.data += level * level_stride;
    return codes;
  }

  const W* code(int64_t level, int64_t k) const {
    return first.data + level * level_stride + k * first.code_stride;
  }

  Codes<W> first;
  int64_t count, level_stride;
};

// residual -= code; returns |residual|^2.
template <class W>
double subtract(W* residual, const W* code, int64_t dim) {
  using P = Pack<W>;
  typename P::V square{};
  for_each_pack<W>(dim, [&](int64_t d, auto n) {
    const auto left = P::get(residual + d, n) - P::get(code + d, n);
    square = P::multiply_add(left, left, square);
    P::set(residual + d, n, left);
  });
  return P::total(square);
}

// Sum of a position's codes, the first level's first.
template <class W>
void add_codes(const Levels<W>& levels,
               const int64_t* indices,
               int64_t count,
               int64_t dim,
               W* sum) {
  using P = Pack<W>;
  for_each_pack<W>(dim, [&](int64_t d, auto n) {
    auto total = P::get(levels.code(0, indices[0]) + d, n);
    for (int64_t level = 1; level < count; ++level)
      total += P::get(levels.code(level, indices[level]) + d, n);
    P::set(sum + d, n, total);
  });
}

// How many levels a position went through.
int64_t depth_of(const int64_t* indices, int64_t levels) {
  int64_t depth = 0;
  while (depth < levels && indices[depth] >= 0)
    ++depth;
  return depth;
}

int64_t tiles_of(int64_t positions) {
  return (positions + kRows - 1) / kRows;
}

// Calls f(first, count) for every tile of the positions first ... last - 1.
template <class F>
void for_each_tile(int64_t first, int64_t last, const F& f) {
  for (; first < last; first += kRows)
    f(first, int(std::min<int64_t>(kRows, last - first)));
}

template <class T>
class Forward {
 public:
  using W = Wide<T>;

  Forward(const Positions<T>& x,
          const Levels<W>& levels,
          int64_t used,
          const bool* mask,
          bool cosine,
          const Positions<T>& quantized,
          int64_t* indices)
      : x_(x),
        levels_(levels),
        used_(used),
        mask_(mask),
        cosine_(cosine),
        quantized_(quantized),
        indices_(indices),
        errors_(tiles_of(x.count()) * used) {}

  void run() {
    const bool halved = searched_with_amx(x_.dim);
    const int64_t codes = (levels_.level_stride ? used_ : 1) * levels_.first.count;
    if (codes * packed_code_bytes(x_.dim, halved) > kPanelBytes)
      return by_level();
    std::vector<std::shared_ptr<const CodePanel>> panels;
    for (int64_t level = 0; level < used_; ++level)
      panels.push_back(level && !levels_.level_stride
                           ? panels[0]
                           : packed_codebook(levels_.codes(level), cosine_, halved));
    by_block(panels);
  }

  // Squared residuals after a level, in a sum that does not depend on the number of threads.
  double error(int64_t level) const {
    double total = 0;
    for (int64_t tile = 0; tile < tiles_of(x_.count()); ++tile)
      total += errors_[tile * used_ + level];
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
          Buffer<int64_t> found(used_ * block);  // [levels, block]
          for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * block, last = std::min(x_.count(), first + block);
            load(first, last, rows.get());
            for (int64_t level = 0; level < used_; ++level)
              for (int64_t start = first; start < last; start += chunk) {
                const int64_t stop = std::min(last, start + chunk);
                W* const row = rows.get() + (start - first) * x_.dim;
                int64_t* const at_level = found.get() + level * block + start - first;
                search_chunk(Positions<W>(row, stop - start, x_.dim), levels_.codes(level),
                             *panels[level], mask_ ? mask_ + start : nullptr, cosine_, scratch,
                             at_level);
                advance(level, start, stop, at_level, row);
              }
            finish(first, last, found.get(), block, rows.get());
          }
        });
  }

  void by_level() {
    const int64_t count = x_.count();
    Buffer<W> rows(count * x_.dim);
    Buffer<int64_t> found(used_ * count);  // [levels, positions]
    const auto in_parallel = [&](const auto& f) {
      torch::stable::parallel_for(0, tiles_of(count), 8, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kRows;
        f(first, std::min(count, end * kRows), rows.get() + first * x_.dim);
      });
    };
    in_parallel([&](int64_t first, int64_t last, W* row) { load(first, last, row); });
    for (int64_t level = 0; level < used_; ++level) {
      int64_t* const at_level = found.get() + level * count;
      search(Positions<W>(rows.get(), count, x_.dim), levels_.codes(level), mask_, cosine_,
             at_level);
      in_parallel([&](int64_t first, int64_t last, W* row) {
        advance(level, first, last, at_level + first, row);
      });
    }
    in_parallel([&](int64_t first, int64_t last, W* row) {
      finish(first, last, found.get() + first, count, row);
    });
  }

  // Rows [last - first, D] of the positions.
  void load(int64_t first, int64_t last, W* rows) const {
    for_each_tile(first, last, [&](int64_t position, int count) {
      Tile(x_, position, count).copy(rows + (position - first) * x_.dim);
    });
  }

  void advance(int64_t level, int64_t first, int64_t last, const int64_t* found, W* rows) {
    for_each_tile(first, last, [&](int64_t position, int count) {
      double error = 0;
      for (int64_t i = position - first; i < position - first + count; ++i)
        if (found[i] >= 0)
          error += subtract(rows + i * x_.dim, levels_.code(level, found[i]), x_.dim);
      errors_[position / kRows * used_ + level] = error;
    });
  }

  // Writes the results, found [levels, stride], in place of the rows.
  void finish(int64_t first, int64_t last, const int64_t* found, int64_t stride, W* rows) const {
    for_each_tile(first, last, [&](int64_t position, int count) {
      W* const buffer = rows + (position - first) * x_.dim;
      W* to[kRows];
      const Tile target(quantized_, position, count);
      target.place(buffer, to);
      for (int lane = 0; lane < count; ++lane) {
        int64_t* const index = indices_ + (position + lane) * levels_.count;
        for (int64_t level = 0; level < levels_.count; ++level)
          index[level] = level < used_ ? found[level * stride + position - first + lane] : -1;
        if (index[0] >= 0)
          add_codes(levels_, index, used_, x_.dim, to[lane]);
        else
          std::fill_n(to[lane], x_.dim, W(0));
      }
      target.write(buffer);
    });
  }

  const Positions<T> x_;
  const Levels<W> levels_;
  const int64_t used_;
  const bool* const mask_;  // [outer, inner]
  const bool cosine_;
  const Positions<T> quantized_;
  int64_t* const indices_;  // [outer, inner, Q]
  Buffer<double> errors_;   // [tiles, levels]
};

// The gradient of one vector, from the residuals that the levels leave and that of the quantized
// vector. residual, a row of its own, starts as x.
template <class W>
class Pull {
 public:
  Pull(const Levels<W>& levels, const std::vector<W>& pulls, bool rotate, bool per_level)
      : levels_(levels), pulls_(pulls), rotate_(rotate), per_level_(per_level) {}

  void operator()(const int64_t* indices,
                  W* residual,
                  const W* gradient,
                  int64_t dim,
                  W* scratch,
                  W* out) const {
    const int64_t depth = depth_of(indices, levels_.count);
    if (depth == 0) {
      std::fill_n(out, dim, W(0));
    } else if (gradient && rotate_ && per_level_) {
      std::fill_n(out, dim, W(0));
      for (int64_t level = 0; level < depth; ++level) {
        const W* const code = levels_.code(level, indices[level]);
        add(rotation(residual, code, gradient, dim), gradient, residual, code, dim, out);
        descend(indices, level, level + 1, residual, dim, out);
      }
    } else {
      std::fill_n(out, dim, W(0));
      if (gradient && rotate_) {
        add_codes(levels_, indices, depth, dim, scratch);
        add(rotation(residual, scratch, gradient, dim), gradient, residual, scratch, dim, out);
      } else if (gradient) {
        const W times = per_level_ ? W(depth) : W(1);
        for (int64_t d = 0; d < dim; ++d)
          out[d] = times * gradient[d];
      }
      descend(indices, 0, depth, residual, dim, out);
    }
  }

 private:
  using P = Pack<W>;

  static void add(const Carry<W>& carry,
                  const W* gradient,
                  const W* x,
                  const W* code,
                  int64_t dim,
                  W* out) {
    const auto carried = P::constant(carry.gradient), along_x = P::constant(carry.x),
               along_code = P::constant(carry.code);
    for_each_pack<W>(dim, [&](int64_t d, auto n) {
      P::set(out + d, n,
             P::get(out + d, n) + carried * P::get(gradient + d, n) +
                 (along_x * P::get(x + d, n) + along_code * P::get(code + d, n)));
    });
  }

  // Subtracts the codes of the levels begin ... end - 1, with every level's pull on what it leaves.
  void descend(const int64_t* indices, int64_t begin, int64_t end, W* residual, int64_t dim, W* out)
      const {
    for_each_pack<W>(dim, [&](int64_t d, auto n) {
      auto left = P::get(residual + d, n), value = P::get(out + d, n);
      for (int64_t level = begin; level < end; ++level) {
        left -= P::get(levels_.code(level, indices[level]) + d, n);
        value += P::constant(pulls_[level]) * left;
      }
      P::set(residual + d, n, left);
      P::set(out + d, n, value);
    });
  }

  const Levels<W>& levels_;
  const std::vector<W>& pulls_;
  const bool rotate_, per_level_;
};

template <class T>
void backward(const Positions<T>* gradient,
              const Positions<T>& x,
              const int64_t* indices,
              int64_t levels,
              const Pull<Wide<T>>& pull,
              const Positions<T>& out) {
  using W = Wide<T>;
  const int64_t dim = x.dim;
  torch::stable::parallel_for(0, tiles_of(x.count()), 8, [&](int64_t begin, int64_t end) {
    Buffer<W> buffer((3 * kRows + 1) * dim);
    W *const residual = buffer.get(), *const incoming = residual + kRows * dim,
             *const outgoing = incoming + kRows * dim, *const scratch = outgoing + kRows * dim;
    for_each_tile(begin * kRows, std::min(x.count(), end * kRows), [&](int64_t first, int count) {
      const W* from[kRows] = {};
      W* to[kRows];
      Tile(x, first, count).copy(residual);
      if (gradient)
        Tile(*gradient, first, count).read(incoming, from);
      const Tile target(out, first, count);
      target.place(outgoing, to);
      for (int lane = 0; lane < count; ++lane)
        pull(indices + (first + lane) * levels, residual + lane * dim, from[lane], dim, scratch,
             to[lane]);
      target.write(outgoing);
    });
  });
}

// The positions of every level, sorted by code.
struct Sorted {
  Sorted(const int64_t* indices, int64_t positions, int64_t levels, int64_t codes)
      : starts(levels * (codes + 1)), order(levels * positions) {
    std::fill_n(starts.get(), levels * (codes + 1), 0);
    torch::stable::parallel_for(0, levels, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> next(codes);
      for (int64_t level = begin; level < end; ++level) {
        int64_t* const start = starts.get() + level * (codes + 1);
        for (int64_t p = 0; p < positions; ++p)
          if (indices[p * levels + level] >= 0)
            ++start[indices[p * levels + level] + 1];
        for (int64_t k = 0; k < codes; ++k)
          start[k + 1] += start[k];
        std::copy_n(start, codes, next.begin());
        for (int64_t p = 0; p < positions; ++p)
          if (indices[p * levels + level] >= 0)
            order[level * positions + next[indices[p * levels + level]]++] = p;
      }
    });
  }

  Buffer<int64_t> starts;  // [Q, K + 1]
  Buffer<int64_t> order;   // [Q, positions]
};

template <class T>
void statistics(const Positions<T>& x,
                const Levels<Wide<T>>& levels,
                const int64_t* indices,
                bool left,
                Wide<T>* counts,
                Wide<T>* sums) {
  using W = Wide<T>;
  const int64_t dim = x.dim, positions = x.count(), codes = levels.first.count;
  const Sorted sorted(indices, positions, levels.count, codes);
  Buffer<W> rows(positions * dim);
  torch::stable::parallel_for(0, tiles_of(positions), 8, [&](int64_t begin, int64_t end) {
    for_each_tile(begin * kRows, std::min(positions, end * kRows), [&](int64_t first, int count) {
      Tile(x, first, count).copy(rows.get() + first * dim);
    });
  });
  for (int64_t level = 0; level < levels.count; ++level) {
    const int64_t* const start = sorted.starts.get() + level * (codes + 1);
    const int64_t* const order = sorted.order.get() + level * positions;
    torch::stable::parallel_for(0, codes, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> totals(dim);
      double* const total = totals.data();
      for (int64_t k = begin; k < end; ++k) {
        std::fill_n(total, dim, 0.0);
        const W* const code = levels.code(level, k);
        for (int64_t i = start[k]; i < start[k + 1]; ++i) {
          W* const row = rows.get() + order[i] * dim;
          if (left)
            for (int64_t d = 0; d < dim; ++d) {
              row[d] -= code[d];
              total[d] += double(row[d]);
            }
          else
            for (int64_t d = 0; d < dim; ++d) {
              total[d] += double(row[d]);
              row[d] -= code[d];
            }
        }
        counts[level * codes + k] = W(start[k + 1] - start[k]);
        std::copy_n(total, dim, sums + (level * codes + k) * dim);
      }
    });
  }
}

// The codebooks with contiguous components.
Tensor check_codebooks(const Tensor& x, const Tensor& codebooks) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [outer, D, inner]");
  STD_TORCH_CHECK(
      codebooks.dim() == 3 && codebooks.numel() > 0 && codebooks.size(2) == x.size(1) &&
          codebooks.scalar_type() == accumulator_type(x),
      "codebooks must be [Q, K, D] with the D of x, float64 for a float64 x, else float32");
  return codebooks.stride(2) == 1 ? codebooks : torch::stable::contiguous(codebooks);
}

const int64_t* check_level_indices(const Tensor& indices,
                                   const Tensor& x,
                                   const Tensor& codebooks) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 3 &&
                      indices.size(0) == x.size(0) && indices.size(1) == x.size(2) &&
                      indices.size(2) == codebooks.size(0) && indices.is_contiguous(),
                  "indices must be contiguous int64 [outer, inner, Q]");
  const int64_t* data = static_cast<const int64_t*>(indices.data_ptr());
  check_range(data, indices.numel(), codebooks.size(1));
  return data;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_vector_quantize(const Tensor& x,
                                                                    const Tensor& codebooks,
                                                                    std::optional<Tensor> mask,
                                                                    std::optional<Tensor> levels,
                                                                    bool cosine) {
  const Tensor codes = check_codebooks(x, codebooks);
  const int64_t count = codes.size(0), positions = x.size(0) * x.size(2);
  int64_t used = count;
  if (levels.has_value()) {
    STD_TORCH_CHECK(levels->scalar_type() == ScalarType::Long && levels->numel() == 1,
                    "levels must be one int64");
    used = std::clamp<int64_t>(*static_cast<const int64_t*>(levels->data_ptr()), 1, count);
  }
  Tensor contiguous_mask;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == positions,
                    "mask must be bool, one for each position");
    contiguous_mask = torch::stable::contiguous(*mask);
  }
  const bool* const kept =
      mask.has_value() ? static_cast<const bool*>(contiguous_mask.data_ptr()) : nullptr;
  Tensor quantized = torch::stable::empty_like(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2), count}, ScalarType::Long);
  Tensor mse = torch::stable::new_empty(x, {count}, accumulator_type(x));
  Tensor valid = torch::stable::new_empty(x, {}, ScalarType::Long);
  const int64_t number = kept ? std::count(kept, kept + positions, true) : positions;
  *static_cast<int64_t*>(valid.data_ptr()) = number;
  with_types(x, codes, [&]<class T>(T*, auto*) {
    using W = Wide<T>;
    Forward<T> forward(Positions<T>(x), Levels<W>(codes), used, kept, cosine,
                       Positions<T>(quantized), static_cast<int64_t*>(indices.data_ptr()));
    if (positions > 0)
      forward.run();
    W* const errors = static_cast<W*>(mse.data_ptr());
    for (int64_t level = 0; level < count; ++level)
      errors[level] = level < used && number
                          ? W(forward.error(level) / (double(number) * double(x.size(1))))
                          : W(0);
  });
  return {quantized, indices, mse, valid};
}

Tensor residual_vector_quantize_backward(std::optional<Tensor> grad_quantized,
                                         std::optional<Tensor> grad_mse,
                                         const Tensor& x,
                                         const Tensor& codebooks,
                                         const Tensor& indices,
                                         const Tensor& valid,
                                         double commitment_weight,
                                         bool rotation,
                                         bool per_level) {
  const Tensor codes = check_codebooks(x, codebooks);
  const int64_t* const index = check_level_indices(indices, x, codes);
  STD_TORCH_CHECK(valid.scalar_type() == ScalarType::Long && valid.numel() == 1,
                  "valid must be one int64");
  const int64_t number = std::max<int64_t>(*static_cast<const int64_t*>(valid.data_ptr()), 1);
  Tensor slopes;
  if (grad_mse.has_value()) {
    STD_TORCH_CHECK(
        grad_mse->numel() == codes.size(0) && grad_mse->scalar_type() == codes.scalar_type(),
        "grad_mse must hold one value of the codebooks' dtype for each level");
    slopes = torch::stable::contiguous(*grad_mse);
  }
  if (grad_quantized.has_value())
    check_gradient(*grad_quantized, x);
  Tensor grad_x = torch::stable::empty_like(x);
  with_types(x, codes, [&]<class T>(T*, auto*) {
    using W = Wide<T>;
    std::vector<W> pulls(codes.size(0));
    if (grad_mse.has_value())
      for (int64_t level = 0; level < codes.size(0); ++level)
        pulls[level] =
            W(2 * commitment_weight * double(static_cast<const W*>(slopes.data_ptr())[level]) /
              (double(number) * double(x.size(1))));
    std::optional<Positions<T>> gradient;
    if (grad_quantized.has_value())
      gradient.emplace(*grad_quantized);
    const Levels<W> levels(codes);
    backward(gradient ? &*gradient : nullptr, Positions<T>(x), index, levels.count,
             Pull<W>(levels, pulls, rotation, per_level), Positions<T>(grad_x));
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> residual_code_statistics(const Tensor& x,
                                                    const Tensor& codebooks,
                                                    const Tensor& indices,
                                                    bool left) {
  const Tensor codes = check_codebooks(x, codebooks);
  const int64_t* const index = check_level_indices(indices, x, codes);
  const ScalarType type = accumulator_type(x);
  Tensor counts = torch::stable::new_empty(x, {codes.size(0), codes.size(1)}, type);
  Tensor sums = torch::stable::new_empty(x, {codes.size(0), codes.size(1), codes.size(2)}, type);
  with_types(x, codes, [&]<class T>(T*, auto*) {
    using W = Wide<T>;
    statistics(Positions<T>(x), Levels<W>(codes), index, left, static_cast<W*>(counts.data_ptr()),
               static_cast<W*>(sums.data_ptr()));
  });
  return {counts, sums};
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("residual_vector_quantize", TORCH_BOX(&genperf::residual_vector_quantize));
  m.impl("residual_vector_quantize_backward",
         TORCH_BOX(&genperf::residual_vector_quantize_backward));
  m.impl("residual_code_statistics", TORCH_BOX(&genperf::residual_code_statistics));
}
