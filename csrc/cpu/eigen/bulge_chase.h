// SPDX-License-Identifier: Apache-2.0
//
// Reduces a symmetric band matrix to tridiagonal form by chasing bulges down the diagonal (Schwarz
// 1968; in blocks, Lang, "A parallel algorithm for reducing symmetric banded matrices to
// tridiagonal form", 1993).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "cpu/common/positions.h"
#include "cpu/common/simd.h"

namespace genperf {

// A band of half-bandwidth B during the reduction.
//
// Sweep s annihilates column s below its first off-diagonal entry by a reflection of rows s + 1 ...
// s + B. Step k of the sweep applies the reflection of rows r ... r + B - 1, r = s + 1 + k B, from
// both sides to the diagonal block of those rows and from the right to the block below it. It then
// annihilates the first column of that block by the reflection of the next step, and applies it to
// the rest of the block from the left.
//
// Column j holds rows j - B ... j + 2 B - 1: full diagonal blocks, and room for the bulge below
// them. Rows that are multiples of kDoubles are aligned, and the vectors of a block start at such a
// row; zeros in the reflections leave their rows outside the block unchanged. The matrix is zero
// past row n, so every block is full and reflections there have no effect.
class BulgeChase {
 public:
  static constexpr int B = 32;

  explicit BulgeChase(int64_t n) : n_(n), entries_((n + B + 1) * (kStride + 1)) {
    std::fill_n(entries_.get(), (n + B + 1) * (kStride + 1), 0.0);
  }

  // Entry (i, j) of the band, j <= i <= j + B.
  void set(int64_t i, int64_t j, double value) {
    *at(i, j) = value;
    if (i < j + B)
      *at(j, i) = value;
  }

  // Writes the diagonal to d [n] and the off-diagonal to e [n - 1].
  void run(double* d, double* e) {
    const int64_t sweeps = std::max<int64_t>(n_ - 2, 0);
    const int64_t groups = (sweeps + kSweeps - 1) / kSweeps;
    std::vector<Progress> done(groups);
    std::atomic<int64_t> next{0};
    // A worker waits for the group before its own, which another running worker has taken.
    const int64_t workers = n_ <= 512 ? 1 : torch::stable::get_num_threads();
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      for (int64_t group; (group = next++) < groups;)
        run_group(group * kSweeps, std::min(kSweeps, sweeps - group * kSweeps), e,
                  group ? &done[group - 1] : nullptr, done[group]);
    });
    for (int64_t i = 0; i < n_; ++i)
      d[i] = *at(i, i);
    for (int64_t i = sweeps; i < n_ - 1; ++i)
      e[i] = *at(i + 1, i);
  }

 private:
  static constexpr int L = kDoubles;
  static constexpr int kHalf = B / L;     // vectors between a block and the one below
  static constexpr int kOwn = kHalf + 1;  // vectors that overlap a block
  static constexpr int kBoth =
      2 * kHalf + 1;  // vectors that overlap a diagonal block or the one below
  static constexpr int64_t kStride = 3 * B + 16;
  static constexpr int64_t kSweeps = 8;  // sweeps of a group, run by one thread to reuse the cache
  static constexpr int64_t kFinished = int64_t{1} << 62;

  // Steps that the last sweep of a group has finished, on a cache line of its own.
  struct alignas(64) Progress {
    std::atomic<int64_t> steps{0};
  };

  // I - scale v v' on rows starting at `row`; v is zero in the rest of its vectors.
  struct Reflection {
    alignas(64) double v[kOwn * L];
    double scale;
    int64_t row;
  };

  double* at(int64_t i, int64_t j) const { return entries_.get() + i + j * kStride + B + 8; }

  static DVec from(DVec v, int64_t first) { return lane_numbers() >= first ? v : DVec{}; }
  static DVec up_to(DVec v, int64_t end) { return lane_numbers() < end ? v : DVec{}; }
  static DMask lane_numbers() {
    DMask lanes{};
    for (int i = 0; i < L; ++i)
      lanes[i] = i;
    return lanes;
  }

  int64_t steps(int64_t sweep) const { return (n_ - 2 - sweep) / B + 1; }

  void run_group(int64_t first, int64_t count, double* e, const Progress* before, Progress& done) {
    Reflection reflections[kSweeps];
    for (int64_t time = 0; time < steps(first) + count; ++time) {
      for (int64_t q = 0; q < count; ++q) {
        const int64_t k = time - q, sweep = first + q;
        if (k < 0 || k >= steps(sweep))
          continue;
        // Step k of a sweep needs step k + 1 of the sweep before.
        if (q == 0 && before)
          for (int spins = 0; before->steps.load(std::memory_order_acquire) < k + 2;)
            if (++spins > 1000)
              std::this_thread::yield();
        if (k == 0)
          e[sweep] = begin_sweep(sweep, reflections[q]);
        step(reflections[q]);
      }
      done.steps.store(std::max<int64_t>(time - count + 2, 0), std::memory_order_release);
    }
    done.steps.store(kFinished, std::memory_order_release);
  }

  // The reflection that maps x, which starts at lane `offset` of its first vector, to a multiple of
  // the first unit vector. Returns that multiple.
  static double reflect(const DVec (&x)[kOwn], int64_t offset, Reflection& out) {
    const double first = x[0][offset];
    DVec rest[kOwn];
    DVec squares = {};
    for (int q = 0; q < kOwn; ++q) {
      rest[q] = q == 0 ? from(x[q], offset + 1) : x[q];
      squares = fma(rest[q], rest[q], squares);
    }
    const double square = sum(squares);
    double image = first, scale = 0, inverse = 0;
    // Entries are at most about n in size, so 1e-145 is far below a rounding error.
    if (!(square < 1e-290)) {
      image = -std::copysign(std::sqrt(first * first + square), first);
      scale = (image - first) / image;
      inverse = 1 / (first - image);
    }
    for (int q = 0; q < kOwn; ++q)
      store(out.v + q * L, rest[q] * inverse);
    out.v[offset] = 1;
    out.scale = scale;
    return image;
  }

  double begin_sweep(int64_t sweep, Reflection& reflection) const {
    const int64_t row = sweep + 1, offset = row % L;
    const double* const column = at(row - offset, sweep);
    DVec x[kOwn];
    for (int q = 0; q < kOwn; ++q)
      x[q] = load_doubles(column + q * L);
    x[0] = from(x[0], offset);
    x[kHalf] = up_to(x[kHalf], offset);
    reflection.row = row;
    return reflect(x, offset, reflection);
  }

  void step(Reflection& reflection) const {
    const int64_t row = reflection.row, offset = row % L;
    // The last column above the diagonal was not part of this block in the previous sweep.
    double* const diagonal = at(row, row);
    for (int j = 0; j < B - 1; ++j)
      diagonal[j + (B - 1) * kStride] = diagonal[B - 1 + j * kStride];

    double* const block = at(row - offset, row);
    const double* const v = reflection.v + offset;
    // Columns of the rank-one updates from the right, for the diagonal block and the block below.
    alignas(64) double both[kBoth * L];
    multiply(block, v, both);
    for (int q = 0; q < kBoth; ++q) {
      DVec y = load_doubles(both + q * L) * reflection.scale;
      y = q == 0 ? from(y, offset) : q == 2 * kHalf ? up_to(y, offset) : y;
      store(both + q * L, y);
    }
    DVec products{};
    for (int q = 0; q < kOwn; ++q)
      products = fma(load_doubles(both + q * L), load_doubles(reflection.v + q * L), products);
    const DVec part = broadcast(-0.5 * reflection.scale * sum(products));
    for (int q = 0; q < kOwn; ++q)
      store(both + q * L,
            fma(part, load_doubles(reflection.v + q * L), load_doubles(both + q * L)));

    // The first column of the block below, after the update from the right.
    Reflection next;
    DVec x[kOwn];
    for (int q = 0; q < kOwn; ++q)
      x[q] = load_doubles(block + (kHalf + q) * L) - load_doubles(both + (kHalf + q) * L);
    x[0] = from(x[0], offset);
    x[kHalf] = up_to(x[kHalf], offset);
    const double image = reflect(x, offset, next);
    next.row = row + B;

    // Factors of next.v in the update of the block below, one per column.
    alignas(64) double rows[B];
    DVec overlap{};
    for (int q = 0; q < kOwn; ++q)
      overlap = fma(load_doubles(both + (kHalf + q) * L), load_doubles(next.v + q * L), overlap);
    const DVec twice = broadcast(sum(overlap)), scale = broadcast(next.scale);
    for (int j = 0; j < B; j += L) {
      DVec sums[L] = {};
      for (int q = 0; q < kOwn; ++q) {
        const DVec w = load_doubles(next.v + q * L);
#pragma GCC unroll 8
        for (int c = 0; c < L; ++c)
          sums[c] = fma(load_doubles(block + (j + c) * kStride + (kHalf + q) * L), w, sums[c]);
      }
      store(rows + j, scale * fnma(twice, load_doubles(v + j), sums_of(sums)));
    }

    update(block, both, reflection.v, next.v, offset, rows);
    double* const first = at(row + B, row);
    first[0] = image;
    std::fill_n(first + 1, B - 1, 0.0);
    reflection = next;
  }

  // out = the B columns starting at `block`, times v.
  static void multiply(const double* block, const double* v, double* out) {
#if defined(__AVX512F__)
    constexpr int kChunk = kBoth <= 17 ? kBoth : 8;
#else
    constexpr int kChunk = 8;
#endif
    multiply_rows<kChunk>(block, v, out);
    constexpr int kWhole = kBoth / kChunk * kChunk;
    for (int q = kChunk; q < kWhole; q += kChunk)
      multiply_rows<kChunk>(block + q * L, v, out + q * L);
    if constexpr (kBoth > kWhole)
      multiply_rows<kBoth - kWhole>(block + kWhole * L, v, out + kWhole * L);
  }

  template <int Q>
  static void multiply_rows(const double* block, const double* v, double* out) {
    DVec y[Q] = {};
    for (int j = 0; j < B; ++j) {
      const DVec factor = broadcast(v[j]);
#pragma GCC unroll 32
      for (int q = 0; q < Q; ++q)
        y[q] = fma(load_doubles(block + j * kStride + q * L), factor, y[q]);
    }
#pragma GCC unroll 32
    for (int q = 0; q < Q; ++q)
      store(out + q * L, y[q]);
  }

  // Column j minus both * v[j], minus v * both[j] in the diagonal block and next * rows[j] below
  // it.
  static void update(double* block,
                     const double* both,
                     const double* v,
                     const double* next,
                     int64_t offset,
                     const double* rows) {
    const double* const right = v + offset;
    for (int q = 0; q < kHalf; q += kChunk)
      update_rows<kChunk>(block + q * L, both + q * L, right, v + q * L, both + offset);
    const DVec b = load_doubles(both + kHalf * L), w = load_doubles(v + kHalf * L),
               z = load_doubles(next);
    for (int j = 0; j < B; ++j) {
      double* const p = block + j * kStride + kHalf * L;
      const DVec y = fnma(b, broadcast(right[j]), load_doubles(p));
      store(p, fnma(z, broadcast(rows[j]), fnma(w, broadcast(both[offset + j]), y)));
    }
    for (int q = 0; q < kHalf; q += kChunk)
      update_rows<kChunk>(block + (kOwn + q) * L, both + (kOwn + q) * L, right, next + (1 + q) * L,
                          rows);
  }

  static constexpr int kChunk = 4;
  static_assert(kHalf % kChunk == 0);

  template <int Q>
  static void update_rows(double* block,
                          const double* a,
                          const double* a_factors,
                          const double* b,
                          const double* b_factors) {
    DVec minus_a[Q], minus_b[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      minus_a[q] = -load_doubles(a + q * L);
      minus_b[q] = -load_doubles(b + q * L);
    }
    for (int j = 0; j < B; ++j) {
      const DVec s = broadcast(a_factors[j]), t = broadcast(b_factors[j]);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        double* const p = block + j * kStride + q * L;
        store(p, fma(minus_b[q], t, fma(minus_a[q], s, load_doubles(p))));
      }
    }
  }

  int64_t n_;
  Buffer<double> entries_;
};

}  // namespace genperf
