// SPDX-License-Identifier: Apache-2.0
//
// Reduces a dense symmetric matrix to a band by orthogonal similarity transformations: Householder
// QR of 32 columns below the band at a time, applied to the trailing matrix from both sides as one
// block reflection (Bischof, Lang and Sun, "The SBR toolbox", 2000). All flops except those of the
// narrow QR are matrix products.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common/positions.h"
#include "cpu/common/simd.h"

namespace genperf {

class BandReduction {
 public:
  static constexpr int64_t B = 32;  // half-bandwidth

  explicit BandReduction(int64_t n)
      : n_(n),
        rows_((n + B - 1) / B * B),
        stride_(rows_ + 8),  // so that the rows of a tile fall into different cache sets
        a_(rows_ * stride_),
        v_(rows_ * B),
        y_(rows_ * B),
        parts_(rows_ > B ? kParts * rows_ * B : 0),
        vw_(rows_ * 2 * B),
        wv_(rows_ * 2 * B) {
#if defined(__linux__)
    // A tile reads a piece of many rows, each on its own page unless pages are large.
    constexpr uintptr_t kPage = 1 << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(a_.get()) + kPage - 1) / kPage * kPage;
    const uintptr_t end = reinterpret_cast<uintptr_t>(a_.get() + rows_ * stride_) / kPage * kPage;
    if (end > begin)
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }

  // Copies the lower triangle of a, times scale.
  void copy(const double* a, int64_t row_stride, int64_t column_stride, double scale) {
    torch::stable::parallel_for(0, rows_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* const row = at(i, 0);
        const int64_t count = i < n_ ? i + 1 : 0;
        for (int64_t j = 0; j < count; ++j)
          row[j] = scale * a[i * row_stride + j * column_stride];
        std::fill(row + count, row + std::min((i / kTile + 1) * kTile, rows_), 0.0);
      }
    });
  }

  // Afterwards band(i, j) returns entry (i, j), j <= i <= j + B.
  void run() {
    for (int64_t first = 0;; first += B) {
      if (first)
        for_rows(first, [&](int64_t begin, int64_t end) { update(begin, end, first, first + B); });
      if (first + B >= n_)
        return;
      annihilate(first);
      multiply(first + B, first > 0);
      finish(first + B);
    }
  }

  double band(int64_t i, int64_t j) const { return *at(i, j); }

 private:
  static constexpr int64_t kTile = 64;
  // Number of partial sums of a product, independent of the number of threads.
  static constexpr int64_t kParts = 8;
  static constexpr double kNegligible = 4 * std::numeric_limits<double>::epsilon();
  static constexpr int64_t kRows = 256;  // per task, where rows are independent

  double* at(int64_t i, int64_t j) const { return a_.get() + i * stride_ + j; }

  // Calls f(begin, end) on ranges of tasks for the matrix starting at row `first`. Below 512 rows a
  // task takes less time than waking a thread, so the calling thread runs all of them.
  template <class F>
  void share(int64_t tasks, int64_t first, const F& f) const {
    if (rows_ - first <= 512)
      f(0, tasks);
    else
      torch::stable::parallel_for(0, tasks, 1, f);
  }

  template <class F>
  void for_rows(int64_t first, const F& f) const {
    const int64_t tasks = (rows_ - first + kRows - 1) / kRows;
    share(tasks, first, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        f(first + task * kRows, std::min(first + (task + 1) * kRows, rows_));
    });
  }

  // c += a b with c [4, B] of row stride c_stride, a [4, count] and b [count, B]; a(r, k) is a[r *
  // a_row + k * a_column].
  static void multiply_add(const double* a,
                           int64_t a_row,
                           int64_t a_column,
                           const double* b,
                           int64_t count,
                           double* c,
                           int64_t c_stride) {
#if defined(__AVX512F__)
    constexpr int kWidth = 4;
#else
    constexpr int kWidth = 2;
#endif
    for (int64_t column = 0; column < B; column += kWidth * kDoubles) {
      DVec sum[4][kWidth];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < kWidth; ++q)
          sum[r][q] = load_doubles(c + r * c_stride + column + q * kDoubles);
      const double* p = a;
      const double* row = b + column;
      for (int64_t k = 0; k < count; ++k, p += a_column, row += B) {
        DVec right[kWidth];
#pragma GCC unroll 4
        for (int q = 0; q < kWidth; ++q)
          right[q] = load_doubles(row + q * kDoubles);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const DVec left = broadcast(p[r * a_row]);
#pragma GCC unroll 4
          for (int q = 0; q < kWidth; ++q)
            sum[r][q] = fma(left, right[q], sum[r][q]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < kWidth; ++q)
          store(c + r * c_stride + column + q * kDoubles, sum[r][q]);
    }
  }

  // Applies the last block reflection to rows begin ... end - 1 of columns from ... to - 1.
  void update(int64_t begin, int64_t end, int64_t from, int64_t to) const {
    for (int64_t i = begin; i < end; i += 4)
      for (int64_t j = from; j < std::min(to, i / B * B + B); j += B)
        multiply_add(vw_.get() + i * 2 * B, 2 * B, 1, wv_.get() + j * 2 * B, 2 * B, at(i, j),
                     stride_);
  }

  // QR of columns first ... first + B - 1 below the band. R stays in the matrix; the reflection is
  // I - v t v' with v in v_ and t upper triangular.
  void annihilate(int64_t first) {
    const int64_t count = rows_ - first - B;
    double* const v = v_.get() + (first + B) * B;
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(at(first + B + i, first), B, v + i * B);
    std::fill_n(&t_[0][0], B * B, 0.0);
    // The products of column c with all columns, from row c down, are computed during the update
    // for the previous column. Those with finished columns give t.
    double products[B], weights[B], squares[B];
    project<false>(v, count, 0, 0, nullptr, products);
    squares_of(v, count, squares);
    for (int64_t c = 0; c < B; ++c) {
      double* const row = v + c * B;
      const double diagonal = row[c];
      double image = diagonal, scale = 0, inverse = 0;
      // A column that depends on the previous ones leaves only its rounding error. Reflections made
      // of such columns are alike and their errors accumulate. The entries of the matrix are about
      // 1 or larger, so 1e-145 is negligible.
      if (!(products[c] < std::max(kNegligible * kNegligible * squares[c], 1e-290))) {
        image = -std::copysign(std::sqrt(products[c]), diagonal);
        scale = (image - diagonal) / image;
        inverse = 1 / (diagonal - image);
      }
      for (int64_t j = 0; j < B; ++j)
        products[j] = (products[j] - image * row[j]) * inverse;
      for (int64_t i = 0; i < c; ++i) {
        double total = 0;
        for (int64_t k = i; k < c; ++k)
          total += t_[i][k] * products[k];
        t_[i][c] = -scale * total;
      }
      t_[c][c] = scale;
      double* const r = at(first + B + c, first);
      r[c] = image;
      for (int64_t j = 0; j < B; ++j) {
        weights[j] = j > c ? scale * products[j] : 0;
        if (j > c)
          r[j] = row[j] - weights[j];
      }
      row[c] = 1;
      std::fill(row + c + 1, row + B, 0.0);
      project<true>(v, count, c, inverse, weights, products);
    }
  }

  // Sums of the squares of the columns.
  static void squares_of(const double* panel, int64_t count, double* squares) {
    std::fill_n(squares, B, 0.0);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < B; ++j)
        squares[j] += panel[i * B + j] * panel[i * B + j];
  }

  // With kUpdate, scales column c below row c by `inverse`, which gives v, and subtracts v *
  // weights from the rows. Returns the products of the next column (without kUpdate, of column c)
  // with all columns.
  template <bool kUpdate>
  static void project(double* panel,
                      int64_t count,
                      int64_t c,
                      double inverse,
                      const double* weights,
                      double* products) {
    constexpr int Q = B / kDoubles;
    const int64_t next = kUpdate ? std::min(c + 1, B - 1) : c;
    DVec w[Q] = {}, total[Q] = {};
    if constexpr (kUpdate)
      for (int q = 0; q < Q; ++q)
        w[q] = -load_doubles(weights + q * kDoubles);
    for (int64_t i = kUpdate ? c + 1 : 0; i < count; ++i) {
      double* const row = panel + i * B;
      DVec entries[Q];
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q)
        entries[q] = load_doubles(row + q * kDoubles);
      if constexpr (kUpdate) {
        const double factor = row[c] * inverse;
        const DVec factors = broadcast(factor);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
          entries[q] = fma(factors, w[q], entries[q]);
          store(row + q * kDoubles, entries[q]);
        }
        const double other = row[next];
        row[c] = factor;
        const DVec others = broadcast(other);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q)
          total[q] = fma(others, entries[q], total[q]);
      } else {
        const DVec others = broadcast(row[next]);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q)
          total[q] = fma(others, entries[q], total[q]);
      }
    }
    for (int q = 0; q < Q; ++q)
      store(products + q * kDoubles, total[q]);
    if constexpr (kUpdate)
      products[c] *= inverse;  // the sum was taken before column c became v
  }

  // Partial sums of A v_ in parts_, where A is the matrix starting at row `first` after the last
  // block reflection.
  void multiply(int64_t first, bool pending) const {
    constexpr int64_t kOrder[kParts] = {0, 4, 2, 6, 1, 5, 3, 7};
    const int64_t last = (rows_ - 1) / kTile;
    share(kParts, first, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        double* const y = parts_.get() + part * rows_ * B;
        std::fill(y + first * B, y + rows_ * B, 0.0);
        // Stripes are dealt longest first, in alternating order.
        for (int64_t stripe = last, dealt = 0; stripe >= first / kTile; --stripe, ++dealt) {
          const int64_t turn = dealt % (2 * kParts);
          if (kOrder[turn < kParts ? turn : 2 * kParts - 1 - turn] == part)
            multiply_stripe(stripe, first, pending, y);
        }
      }
    });
  }

  void multiply_stripe(int64_t stripe, int64_t first, bool pending, double* y) const {
    const int64_t top = std::max(stripe * kTile, first);
    const int64_t bottom = std::min((stripe + 1) * kTile, rows_);
    for (int64_t tile = first / kTile; tile <= stripe; ++tile) {
      const int64_t left = std::max(tile * kTile, first),
                    right = std::min((tile + 1) * kTile, rows_);
      if (pending)
        update(top, bottom, left, right);
      const bool diagonal = tile == stripe;
      const int64_t height = diagonal ? B : bottom - top;
      for (int64_t i = top; i < bottom; i += height) {
        if (diagonal)
          mirror(i);
        const int64_t above = std::min(i, right), end = diagonal ? i + B : right;
        for (int64_t r = i; r < i + height; r += 4)
          multiply_add(at(r, left), stride_, 1, v_.get() + left * B, end - left, y + r * B, B);
        for (int64_t j = left; j < above; j += 4)
          multiply_add(at(i, j), 1, stride_, v_.get() + i * B, height, y + j * B, B);
      }
    }
  }

  // Fills the upper triangle of the diagonal block at i.
  void mirror(int64_t i) const {
    for (int64_t j = 0; j < B; ++j)
      for (int64_t k = 0; k < j; ++k)
        *at(i + k, i + j) = *at(i + j, i + k);
  }

  // The pending update A - v w' - w v' with w = A v t - v t' (v' A v) t / 2, stored as [v w] in
  // vw_ and -[w v] in wv_, transposed in blocks of B rows.
  void finish(int64_t first) {
    const int64_t tasks = (rows_ - first + kRows - 1) / kRows;
    std::vector<double> grams(tasks * B * B);
    for_rows(first, [&](int64_t begin, int64_t end) {
      std::copy(parts_.get() + begin * B, parts_.get() + end * B, y_.get() + begin * B);
      for (int64_t part = 1; part < kParts; ++part) {
        const double* const share = parts_.get() + part * rows_ * B;
        for (int64_t i = begin * B; i < end * B; ++i)
          y_[i] += share[i];
      }
      double* const gram = grams.data() + (begin - first) / kRows * B * B;
      for (int64_t c = 0; c < B; c += 4)
        multiply_add(v_.get() + begin * B + c, 1, B, y_.get() + begin * B, end - begin,
                     gram + c * B, B);
    });
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = 0; i < B * B; ++i)
        grams[i] += grams[task * B * B + i];
    double half[B][B] = {}, inner[B][B] = {};
    for (int64_t c = 0; c < B; c += 4)
      multiply_add(grams.data() + c * B, B, 1, &t_[0][0], B, &half[c][0], B);
    for (int64_t c = 0; c < B; c += 4)
      multiply_add(&t_[0][c], 1, B, &half[0][0], B, &inner[c][0], B);
    for (auto& row : inner)
      for (double& value : row)
        value *= -0.5;
    for_rows(first, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 4) {
        for (int64_t r = i; r < i + 4; ++r) {
          std::copy_n(v_.get() + r * B, B, vw_.get() + r * 2 * B);
          std::fill_n(vw_.get() + r * 2 * B + B, B, 0.0);
        }
        double* const w = vw_.get() + i * 2 * B + B;
        multiply_add(y_.get() + i * B, B, 1, &t_[0][0], B, w, 2 * B);
        multiply_add(v_.get() + i * B, B, 1, &inner[0][0], B, w, 2 * B);
      }
      for (int64_t i = begin; i < end; ++i) {
        double* const block = wv_.get() + i / B * B * 2 * B + i % B;
        for (int64_t k = 0; k < B; ++k) {
          block[k * B] = -vw_[i * 2 * B + B + k];
          block[(B + k) * B] = -vw_[i * 2 * B + k];
        }
      }
    });
  }

  int64_t n_, rows_, stride_;
  Buffer<double> a_;      // [rows, stride], the lower triangle
  Buffer<double> v_, y_;  // [rows, B]
  Buffer<double> parts_;  // [kParts, rows, B]
  Buffer<double> vw_;     // [rows, 2 B]
  Buffer<double> wv_;     // [rows / B, 2 B, B]
  double t_[B][B];
};

}  // namespace genperf
