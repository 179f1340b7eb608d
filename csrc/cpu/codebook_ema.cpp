// SPDX-License-Identifier: Apache-2.0
//
// The update of codebooks by EMA (genperf/nn/_ema.py) in one pass over their sums: averages,
// Laplace-smoothed counts, codes. Arithmetic is in the dtype of the averages, as in the plain
// PyTorch there; totals and norms are summed in float64.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/common/positions.h"

namespace genperf {
namespace {

// As torch.lerp.
template <class W>
W lerp(W from, W to, W weight) {
  return weight < W(0.5) ? from + weight * (to - from) : to - (to - from) * (W(1) - weight);
}

// The norm below which a code has no direction, as in normalized() of genperf/ops/_precision.py.
template <class C>
double least_norm() {
  if (std::is_same_v<C, torch::headeronly::Half>)
    return 6.103515625e-05;
  return 1e-12;
}

// One codebook. W is the dtype of the averages, C that of the codes.
template <class W, class C>
struct CodebookEma {
  int64_t num_codes, dim;
  C* codes;               // [K, D]
  W* counts;              // [K]
  W* sums;                // [K, D]
  const W* batch_counts;  // [K]
  const W* batch_sums;    // [K, D]
  W weight;               // 1 - decay
  W eps, num_eps;         // and K * eps
  bool normalize, follow;

  W total() const {
    double sum = 0;
    for (int64_t k = 0; k < num_codes; ++k)
      sum += double(counts[k]);
    return W(sum);
  }

  W smoothed(int64_t k, W total) const { return (counts[k] + eps) / (total + num_eps) * total; }

  // A codebook without a vector in the batch keeps its averages.
  bool empty_batch() const {
    return std::none_of(batch_counts, batch_counts + num_codes, [](W n) { return n > 0; });
  }

  // The code of the averages, before a rounding to C; `row` [D] is scratch.
  void set_code(const W* average, W count, W* row) const {
    for (int64_t d = 0; d < dim; ++d)
      row[d] = average[d] / count;
    if (!normalize)
      return;
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) {
      row[d] = W(C(row[d]));
      square += double(row[d]) * double(row[d]);
    }
    const W norm = W(std::sqrt(square));
    const bool zero = double(norm) < least_norm<C>();
    for (int64_t d = 0; d < dim; ++d)
      row[d] = zero ? W(0) : row[d] / norm;
  }

  // follow_codes_(): the averages of a code that is not the one of its averages become its own.
  void follow_code(int64_t k, W count, W* row) const {
    C* const code = codes + k * dim;
    W* const sum = sums + k * dim;
    set_code(sum, count, row);
    double difference = 0, square = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double own = double(W(code[d])), gap = own - double(W(C(row[d])));
      difference += gap * gap;
      square += own * own;
    }
    if (difference > 1e-4 * square)
      for (int64_t d = 0; d < dim; ++d)
        sum[d] = W(code[d]) * count;
  }

  void update() const {
    std::vector<W> before(follow ? num_codes : 0);
    if (follow) {
      const W old_total = total();
      for (int64_t k = 0; k < num_codes; ++k)
        before[k] = smoothed(k, old_total);
    }
    const bool moves = !empty_batch();
    if (moves)
      for (int64_t k = 0; k < num_codes; ++k)
        counts[k] = lerp(counts[k], batch_counts[k], weight);
    const W new_total = total();
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / dim);
    torch::stable::parallel_for(0, num_codes, grain, [&](int64_t begin, int64_t end) {
      const Buffer<W> row(dim);
      for (int64_t k = begin; k < end; ++k) {
        if (follow)
          follow_code(k, before[k], row.get());
        W* const __restrict sum = sums + k * dim;
        const W* const __restrict batch = batch_sums + k * dim;
        const W count = smoothed(k, new_total);
        C* const __restrict code = codes + k * dim;
        if (moves && !normalize) {  // in one loop, since codes can be short
          for (int64_t d = 0; d < dim; ++d) {
            sum[d] = lerp(sum[d], batch[d], weight);
            code[d] = C(sum[d] / count);
          }
          continue;
        }
        if (moves)
          for (int64_t d = 0; d < dim; ++d)
            sum[d] = lerp(sum[d], batch[d], weight);
        set_code(sum, count, row.get());
        for (int64_t d = 0; d < dim; ++d)
          code[d] = C(row[d]);
      }
    });
  }
};

void codebook_ema(Tensor codebook,
                  Tensor counts,
                  Tensor sums,
                  const Tensor& batch_counts,
                  const Tensor& batch_sums,
                  double decay,
                  double eps,
                  bool normalize,
                  bool follow) {
  const ScalarType type = accumulator_type(codebook);
  const int64_t dims = sums.dim();
  STD_TORCH_CHECK((dims == 2 || dims == 3) && sums.numel() > 0,
                  "sums must be [K, D] or [codebooks, K, D]");
  const int64_t num_codes = sums.size(dims - 2), dim = sums.size(dims - 1);
  const int64_t codebooks = dims == 3 ? sums.size(0) : 1;
  for (const Tensor& t : {counts, sums, batch_counts, batch_sums})
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(),
                    "averages and statistics must be contiguous, of the dtype of sums of codes");
  STD_TORCH_CHECK(codebook.numel() == sums.numel() && batch_sums.numel() == sums.numel() &&
                      codebook.is_contiguous(),
                  "the codebook and both sums must have one shape and be contiguous");
  STD_TORCH_CHECK(counts.numel() == codebooks * num_codes && batch_counts.numel() == counts.numel(),
                  "both counts must have the shape of sums without its last dimension");
  with_types(codebook, codebook, [&]<class C>(C*, auto*) {
    using W = OpMath<C>;
    for (int64_t i = 0; i < codebooks; ++i) {
      const int64_t first = i * num_codes;
      CodebookEma<W, C>{num_codes,
                        dim,
                        static_cast<C*>(codebook.data_ptr()) + first * dim,
                        static_cast<W*>(counts.data_ptr()) + first,
                        static_cast<W*>(sums.data_ptr()) + first * dim,
                        static_cast<const W*>(batch_counts.data_ptr()) + first,
                        static_cast<const W*>(batch_sums.data_ptr()) + first * dim,
                        W(1 - decay),
                        W(eps),
                        W(double(num_codes) * eps),
                        normalize,
                        follow}
          .update();
    }
  });
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("codebook_ema", TORCH_BOX(&genperf::codebook_ema));
}
