// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/int8_codes.h"

#include <algorithm>
#include <cmath>

#include "cpu/search/error_bounds.h"
#include "cpu/search/int8_rows.h"
#include "cpu/search/interleave.h"

namespace genperf {

#if defined(GENPERF_HAS_VNNI)

Int8Codes int8_codes(const CodePanel& panel) {
  const int64_t codes = panel.capacity, maxima = codes / panel.block_groups;
  Int8Codes int8;
  int8.values = Buffer<uint8_t>(codes * panel.int8_units() * 4);
  for (auto* values : {&int8.scale, &int8.rest, &int8.length, &int8.bias_error})
    *values = Buffer<float>(codes);
  for (auto* values : {&int8.block_rest, &int8.block_length, &int8.block_bias_error})
    *values = Buffer<float>(maxima);
  return int8;
}

// Derivation. With z = zq + zr and f = fq + fr, of which zq.fq is exact up to its scales,
//   z.f - zq.fq = zr.f + zq.fr <= |zr| (F + |fr|) + |z| |fr|.
// Packing and the roundings of the sum add at most 9 u |z| F + 8 u |b| (error_bounds.cpp), and so
// do the comparisons. The error of the float64 distance, split by (|z| + F)^2 <= 2 |z|^2 + 2 F^2,
// belongs to the query and to the code.
void pack_int8(CodePanel& panel,
               int64_t group,
               const float* rows,
               int64_t row_length,
               const double* lengths) {
  const int64_t units = panel.int8_units(), q_length = round_up(panel.dim, 4 * kLanes);
  const float slack = error_slack(panel.dim);
  const float float64_unit = (panel.dim + 4) * 4 * kUnit64;
  Buffer<int8_t> q(kGroup * q_length);
  std::fill_n(q.get(), kGroup * q_length, 0);
  Int8Codes& int8 = panel.int8;
  for (int lane = 0; lane < kGroup; ++lane) {
    const int64_t k = group * kGroup + lane;
    const Int8Row row =
        round_to_int8(rows + lane * row_length, panel.dim, q.get() + lane * q_length);
    const float length = float(lengths[lane]) * slack;
    const float rest = (std::sqrt(row.rest) + lost_length(panel.dim)) * slack;
    const float bias = -panel.bias[k];
    int8.scale[k] = row.scale;
    int8.length[k] = length + rest;
    int8.rest[k] = rest + (12 * kUnit + (panel.cosine ? float64_unit : 0)) * length;
    int8.bias_error[k] = std::isfinite(bias) && !panel.cosine
                             ? 10 * kUnit * bias + float64_unit * length * length
                             : 0;
    panel.bias[k] += int8.bias_error[k];
  }
  uint8_t* const values = int8.values.get() + group * units * 4 * kGroup;
  interleave(reinterpret_cast<const float*>(q.get()), q_length / 4, units,
             reinterpret_cast<float*>(values));
  for (int64_t i = 0; i < units * 4 * kGroup; ++i)
    values[i] ^= 0x80;
}

void set_block_errors(CodePanel& panel) {
  Int8Codes& int8 = panel.int8;
  int8.most_rest = int8.most_length = int8.most_bias_error = 0;
  for (int64_t block = 0; block < panel.blocks(); ++block)
    for (int lane = 0; lane < kGroup; ++lane) {
      const int64_t first = block * panel.block_groups * kGroup + lane, to = block * kGroup + lane;
      float rest = 0, length = 0, bias_error = 0;
      for (int64_t g = 0; g < panel.block_groups; ++g) {
        rest = std::max(rest, int8.rest[first + g * kGroup]);
        length = std::max(length, int8.length[first + g * kGroup]);
        bias_error = std::max(bias_error, int8.bias_error[first + g * kGroup]);
      }
      int8.most_rest = std::max(int8.most_rest, rest);
      int8.most_length = std::max(int8.most_length, length);
      int8.most_bias_error = std::max(int8.most_bias_error, bias_error);
      int8.block_rest[to] = rest;
      int8.block_length[to] = length;
      int8.block_bias_error[to] = bias_error;
    }
}

#else

Int8Codes int8_codes(const CodePanel&) {
  return {};
}

void pack_int8(CodePanel&, int64_t, const float*, int64_t, const double*) {}

void set_block_errors(CodePanel&) {}

#endif

}  // namespace genperf
