// SPDX-License-Identifier: Apache-2.0
//
// Eigenvalues of a dense symmetric matrix: reduction to a band with matrix products, from the band
// to tridiagonal form in cache, then bisection. A one-stage reduction spends half its flops on
// matrix-vector products, which are limited by memory bandwidth.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/eigen/band_reduction.h"
#include "cpu/eigen/bulge_chase.h"
#include "cpu/eigen/sturm.h"

namespace genperf {
namespace {

// The largest magnitude in the lower triangle; NaN if there is a NaN.
double largest_entry(const double* a, int64_t n, int64_t row_stride, int64_t column_stride) {
  std::vector<double> largest(n);
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double found = 0;
      for (int64_t j = 0; j <= i; ++j) {
        const double value = std::abs(a[i * row_stride + j * column_stride]);
        found = value <= found || found != found ? found : value;  // keeps a NaN
      }
      largest[i] = found;
    }
  });
  double found = 0;
  for (const double value : largest)
    found = value <= found || found != found ? found : value;
  return found;
}

Tensor symmetric_eigenvalues(const Tensor& a) {
  STD_TORCH_CHECK(a.dim() == 2 && a.size(0) == a.size(1) && a.scalar_type() == ScalarType::Double,
                  "a must be float64 [n, n]");
  const int64_t n = a.size(0);
  Tensor out = torch::stable::new_empty(a, {n});
  if (n == 0)
    return out;
  const double* const in = static_cast<const double*>(a.const_data_ptr());
  double* const eigenvalues = static_cast<double*>(out.mutable_data_ptr());
  const double largest = largest_entry(in, n, a.stride(0), a.stride(1));
  if (!(largest > 0 && std::isfinite(largest))) {
    std::fill_n(eigenvalues, n, largest == 0 ? 0 : std::numeric_limits<double>::quiet_NaN());
    return out;
  }
  // Scales the largest entry to about 1, unless it is subnormal.
  const int exponent = std::clamp(std::ilogb(largest), -1000, 1023);
  std::vector<double> d(n), e(n);
  {
    BulgeChase chase(n);
    {
      BandReduction reduction(n);
      reduction.copy(in, a.stride(0), a.stride(1), std::ldexp(1.0, -exponent));
      reduction.run();
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = j; i <= std::min(j + BandReduction::B, n - 1); ++i)
          chase.set(i, j, reduction.band(i, j));
    }
    chase.run(d.data(), e.data());
  }
  Sturm(d.data(), e.data(), n).eigenvalues(eigenvalues);
  for (int64_t i = 0; i < n; ++i)
    eigenvalues[i] = std::ldexp(eigenvalues[i], exponent);
  return out;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("symmetric_eigenvalues", TORCH_BOX(&genperf::symmetric_eigenvalues));
}
