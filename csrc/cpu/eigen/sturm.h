// SPDX-License-Identifier: Apache-2.0
//
// Eigenvalues of a symmetric tridiagonal matrix by bisection on Sturm counts: the number of
// eigenvalues below x is the number of sign changes between successive leading principal minors of
// T - x. The minors follow a three-term recurrence without division (Givens 1954; Wilkinson, "The
// Algebraic Eigenvalue Problem", 5.39: each count is exact for a matrix within a few roundings of
// |T|), so vectors of shifts run at multiplication throughput; rescaling every few rows keeps the
// minors in range. Each eigenvalue is found independently, so clusters cost no more and nothing can
// diverge.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common/simd.h"

namespace genperf {

class Sturm {
 public:
  // Diagonal d [n], off-diagonal e [n - 1].
  Sturm(const double* d, const double* e, int64_t n) : n_(n), rows_(n) {
    double bound = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double radius = (i ? std::abs(e[i - 1]) : 0) + (i + 1 < n ? std::abs(e[i]) : 0);
      // Keeps a NaN, unlike max(bound, NaN).
      const double reach = std::abs(d[i]) + radius;
      bound = reach > bound || std::isnan(reach) ? reach : bound;
      if (std::isnan(bound))
        break;
    }
    finite_ = std::isfinite(bound);
    if (!finite_ || bound == 0)
      return;
    // Scales to |T| <= 1, with a margin for rounding in Gershgorin's disks.
    std::frexp(bound, &exponent_);
    ++exponent_;
    for (int64_t i = 0; i < n; ++i) {
      const double off = i ? std::ldexp(e[i - 1], -exponent_) : 0;
      // If a square were zero, all following minors would be zero; an entry of 2^-60 is far below a
      // rounding of |T|.
      rows_[i] = {std::ldexp(d[i], -exponent_), std::max(off * off, 0x1p-120)};
    }
    scaled_ = true;
  }

  // All n eigenvalues in ascending order; NaN if the matrix is not finite.
  void eigenvalues(double* out) const {
    if (!scaled_) {
      std::fill_n(out, n_, finite_ ? 0.0 : std::numeric_limits<double>::quiet_NaN());
      return;
    }
    // Counts at evenly spaced points replace the first log2(n) bisections of each eigenvalue.
    const int64_t groups = (n_ + kGroup - 1) / kGroup, points = groups * kGroup;
    const double spacing = 2.0 / double(points + 1);
    std::vector<int64_t> counts(points);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        DVec x[kVectors];
        DBits count[kVectors];
        for (int64_t i = 0; i < kGroup; ++i)
          x[i / kDoubles][i % kDoubles] = double(g * kGroup + i + 1) * spacing - 1;
        count_below(x, count);
        for (int64_t i = 0; i < kGroup; ++i)
          counts[g * kGroup + i] = int64_t(count[i / kDoubles][i % kDoubles]);
      }
    });
    for (int64_t k = 1; k < points; ++k)
      counts[k] = std::max(counts[k], counts[k - 1]);
    const int halvings = 55 - int(std::log2(double(points)));
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        DVec low[kVectors] = {}, high[kVectors] = {}, x[kVectors];
        DBits index[kVectors] = {}, count[kVectors];
        for (int64_t i = 0; i < kGroup; ++i) {
          const int64_t k = std::min(g * kGroup + i, n_ - 1);
          const int64_t point = std::upper_bound(counts.begin(), counts.end(), k) - counts.begin();
          index[i / kDoubles][i % kDoubles] = uint64_t(k);
          low[i / kDoubles][i % kDoubles] = double(point) * spacing - 1;
          high[i / kDoubles][i % kDoubles] = double(point + 1) * spacing - 1;
        }
        for (int step = 0; step <= halvings; ++step) {
          for (int v = 0; v < kVectors; ++v)
            x[v] = 0.5 * (low[v] + high[v]);
          if (step == halvings)
            break;
          count_below(x, count);
          for (int v = 0; v < kVectors; ++v) {
            const DMask below = count[v] <= index[v];
            low[v] = below ? x[v] : low[v];
            high[v] = below ? high[v] : x[v];
          }
        }
        for (int64_t i = 0; i < std::min<int64_t>(kGroup, n_ - g * kGroup); ++i)
          out[g * kGroup + i] = std::ldexp(x[i / kDoubles][i % kDoubles], exponent_);
      }
    });
    std::sort(out, out + n_);
  }

 private:
  struct Row {
    double diagonal = 0, square = 0x1p-120;
  };

  // Independent recurrences that hide each other's latency.
  static constexpr int kVectors = 4;
  static constexpr int64_t kGroup = kVectors * kDoubles;
  // Two successive minors can shrink by 2^-120 per row and grow threefold.
  static constexpr int64_t kRescale = 8;

  void count_below(const DVec (&x)[kVectors], DBits (&count)[kVectors]) const {
    DVec last[kVectors], before[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      last[v] = broadcast(1.0);
      before[v] = DVec{};
      count[v] = DBits{};
    }
    for (int64_t first = 0; first < n_; first += kRescale) {
      const int64_t end = std::min(first + kRescale, n_);
      for (int64_t i = first; i < end; ++i) {
        const DVec diagonal = broadcast(rows_[i].diagonal), square = broadcast(rows_[i].square);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const DVec minor = fma(diagonal - x[v], last[v], -(square * before[v]));
          count[v] += (DBits(minor) ^ DBits(last[v])) >> 63;
          before[v] = last[v];
          last[v] = minor;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        // A power of two that makes the exponent of the larger minor zero.
        const DBits a = DBits(last[v]) & kExponent, b = DBits(before[v]) & kExponent;
        const DVec scale = DVec((uint64_t{2046} << 52) - (a > b ? a : b));
        last[v] *= scale;
        before[v] *= scale;
      }
    }
  }

  static constexpr uint64_t kExponent = uint64_t{2047} << 52;

  int64_t n_;
  std::vector<Row> rows_;
  int exponent_ = 0;
  bool finite_ = true, scaled_ = false;
};

}  // namespace genperf
