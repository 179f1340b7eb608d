// SPDX-License-Identifier: Apache-2.0
//
// Softmax over the codes, for rows of the matrix product of vectors and codes: squared distances
// where the logit is minus their root, else logits. A row stays in cache between its passes. Sums
// over rows are taken column by column in row order, so they do not depend on the number of
// threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/common/draw.h"
#include "cpu/common/elements.h"
#include "cpu/common/positions.h"

namespace genperf::softmax {

constexpr int64_t kGrain = 16384;            // logits per task
constexpr int64_t kSumLength = 32 * kLanes;  // codes per float32 partial sum
constexpr int kColumns = 8;                  // vectors of columns that are summed at a time
constexpr int64_t kRows = 32;                // rows per float32 partial sum
constexpr int64_t kNoise = 1024;             // codes per draw of noise
constexpr float kSmallest = 1e-8f;  // smallest squared distance; the gradient is 0 below it
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class N>
inline Vec get(const float* p, N n, float otherwise) {
  if constexpr (std::is_same_v<N, FullVector>)
    return load(p);
  Vec v = broadcast(otherwise);
  for (int i = 0; i < n; ++i)
    v[i] = p[i];
  return v;
}

template <class N>
inline void put(float* p, N n, Vec v) {
  if constexpr (std::is_same_v<N, FullVector>)
    store(p, v);
  else
    write(p, 1, n, v);
}

// The logits of a matrix product. NaN is kept.
template <bool kRoot>
inline Vec logit(Vec product) {
  return kRoot ? -sqrt(product < kSmallest ? broadcast(kSmallest) : product) : product;
}

// Bounds y from below, so that -inf times a zero probability does not give NaN.
inline Vec bounded(Vec y) {
  return y < -88.0f ? broadcast(-88.0f) : y;
}

inline float inverse_of(double temperature) {
  return float(std::min(1 / temperature, double(FLT_MAX)));
}

// Logits [rows, K] with the mask and the indices of the rows.
struct Chunk {
  float* data;
  int64_t rows, codes, stride;
  float inverse_temperature;
  const bool* valid;       // [rows], or null for all
  const int64_t* indices;  // [rows], or null

  float* row(int64_t r) const { return data + r * stride; }
  bool is_used(int64_t r) const { return (!valid || valid[r]) && (!indices || indices[r] >= 0); }

  template <class F>
  void for_each_row(const F& f) const {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / codes),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t r = begin; r < end; ++r)
                                    f(r);
                                });
  }
};

// Calls f with a compile-time constant for `root`.
template <class F>
inline void with_root(bool root, const F& f) {
  if (root)
    f(std::true_type());
  else
    f(std::false_type());
}

// Of one row: the largest logit and, for y = (logit - largest) / temperature, the log-sum-exp of y
// and its mean under the softmax.
struct Statistics {
  float largest = 0, log_sum = 0, mean = 0;
};

// The statistics of all rows.
struct SavedStatistics {
  float *largest, *log_sum, *mean;

  Statistics get(int64_t r) const { return {largest[r], log_sum[r], mean[r]}; }
  void set(int64_t r, const Statistics& statistics) const {
    largest[r] = statistics.largest;
    log_sum[r] = statistics.log_sum;
    mean[r] = statistics.mean;
  }
};

// Replaces the logits of a row with exp(y), and returns the sum.
template <bool kRoot>
double exponentials(const Chunk& chunk, int64_t r, Statistics& statistics, float& value) {
  float* const row = chunk.row(r);
  Vec top = broadcast(-FLT_MAX);
  for_each_vector(chunk.codes, true, [&](int64_t k, auto n) {
    const Vec l = logit<kRoot>(get(row + k, n, kRoot ? kInfinity : -kInfinity));
    top = max(l, top);
    put(row + k, n, l);
  });
  const float largest = genperf::largest(top);
  const float scale = chunk.inverse_temperature;
  const float picked = chunk.indices ? (row[chunk.indices[r]] - largest) * scale : 0;
  double sum = 0, weighted = 0;
  for (int64_t first = 0; first < chunk.codes; first += kSumLength) {
    float* const part = row + first;
    Vec exps{}, products{};
    for_each_vector(std::min(kSumLength, chunk.codes - first), true, [&](int64_t k, auto n) {
      const Vec y = bounded((get(part + k, n, -kInfinity) - largest) * scale);
      const Vec e = exp_or_zero<Simd>(y);
      exps += e;
      products = fma(e, y, products);
      put(part + k, n, e);
    });
    sum += genperf::sum(exps);
    weighted += genperf::sum(products);
  }
  const double log = std::log(sum);
  statistics = {largest, float(log), float(weighted / sum)};
  value = float(chunk.indices ? log - picked : log - weighted / sum);
  return sum;
}

// Writes the statistics and the value of every row, replaces its logits with exp(y), and adds the
// probabilities of each code to `usage` [K], if given.
inline void softmax_rows(const Chunk& chunk,
                         bool root,
                         const SavedStatistics& saved,
                         float* values,
                         double* usage) {
  const Buffer<float> inverse(chunk.rows);
  with_root(root, [&](auto is_root) {
    chunk.for_each_row([&](int64_t r) {
      Statistics statistics;
      values[r] = inverse[r] = 0;
      if (chunk.is_used(r))
        inverse[r] = float(1 / exponentials<is_root>(chunk, r, statistics, values[r]));
      saved.set(r, statistics);
    });
  });
  if (!usage)
    return;
  constexpr int64_t kWidth = kColumns * kLanes;
  const int64_t blocks = (chunk.codes + kWidth - 1) / kWidth;
  torch::stable::parallel_for(
      0, blocks, std::max<int64_t>(1, kGrain / (kWidth * std::max<int64_t>(1, chunk.rows))),
      [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kWidth, width = std::min(kWidth, chunk.codes - first);
          for (int64_t rows = 0; rows < chunk.rows; rows += kRows) {
            Vec partial[kColumns] = {};
            for (int64_t r = rows; r < std::min(rows + kRows, chunk.rows); ++r) {
              if (inverse[r] == 0)
                continue;
              const float* const row = chunk.row(r) + first;
              for_each_vector(width, true, [&](int64_t k, auto n) {
                Vec& sum = partial[k / kLanes];
                sum = fma(broadcast(inverse[r]), get(row + k, n, 0), sum);
              });
            }
            for (int64_t k = 0; k < width; ++k)
              usage[first + k] += partial[k / kLanes][k % kLanes];
          }
        }
      });
}

// The gradient with respect to the matrix product: twice that of the squared distance where the
// logit is a root, else that of the logit.
template <bool kRoot>
void gradient_row(const Chunk& chunk,
                  int64_t r,
                  const Statistics& of,
                  float grad_value,
                  const float* grad_usage) {
  float* const row = chunk.row(r);
  const float scale = chunk.inverse_temperature;
  const float threshold = -std::sqrt(kSmallest);
  const auto relative = [&](Vec l) { return bounded((l - of.largest) * scale); };
  const auto probability = [&](Vec y) { return exp_or_zero<Simd>(bounded(y - of.log_sum)); };
  const auto through_logit = [&](Vec l, Vec gradient) {
    if constexpr (!kRoot)
      return gradient * scale;
    const Vec inside = gradient * scale / l;
    return l >= threshold ? Vec{} : inside;
  };
  const int64_t index = chunk.indices ? chunk.indices[r] : 0;
  const Vec chosen = logit<kRoot>(broadcast(row[index]));
  double mean = 0;
  for (int64_t first = 0; first < chunk.codes && grad_usage; first += kSumLength) {
    float* const part = row + first;
    Vec sum{};
    for_each_vector(std::min(kSumLength, chunk.codes - first), true, [&](int64_t k, auto n) {
      const Vec l = logit<kRoot>(get(part + k, n, kRoot ? kInfinity : -kInfinity));
      put(part + k, n, l);
      sum = fma(probability(relative(l)), get(grad_usage + first + k, n, 0), sum);
    });
    mean += genperf::sum(sum);
  }
  const float mean_usage_grad = float(mean);
  for_each_vector(chunk.codes, true, [&](int64_t k, auto n) {
    const Vec found = get(row + k, n, -1);
    const Vec l = grad_usage ? found : logit<kRoot>(found);
    const Vec y = relative(l);
    Vec slope = chunk.indices ? broadcast(grad_value) : -grad_value * (y - of.mean);
    if (grad_usage)
      slope += get(grad_usage + k, n, 0) - mean_usage_grad;
    put(row + k, n, through_logit(l, probability(y) * slope));
  });
  if (chunk.indices)
    row[index] -= through_logit(chosen, broadcast(grad_value))[0];
}

// Replaces the products of every row with the gradient in them.
inline void gradient_rows(const Chunk& chunk,
                          bool root,
                          const SavedStatistics& saved,
                          const float* value_grads,
                          const float* usage_grads) {
  with_root(root, [&](auto is_root) {
    chunk.for_each_row([&](int64_t r) {
      if (chunk.is_used(r))
        gradient_row<is_root>(chunk, r, saved.get(r), value_grads ? value_grads[r] : 0,
                              usage_grads);
      else
        std::fill_n(chunk.row(r), chunk.codes, 0.0f);
    });
  });
}

// Index of the largest logit + temperature * noise, the lowest on ties; a NaN never wins.
template <bool kRoot>
int64_t sample_row(const Chunk& chunk,
                   int64_t r,
                   float temperature,
                   const uint64_t* seed,
                   int64_t number) {
  float noise[kNoise + kDrawn + 4] = {};
  UVec lanes{};
  for (int lane = 0; lane < kLanes; ++lane)
    lanes[lane] = uint32_t(lane);
  Vec best = broadcast(-kInfinity);
  UVec index = lanes;
  for (int64_t first = 0; first < chunk.codes; first += kNoise) {
    const float* const row = chunk.row(r) + first;
    const int64_t count = std::min(kNoise, chunk.codes - first);
    if (seed)
      draw_gumbels(*seed, number, first, count, noise);
    for_each_vector(count, true, [&](int64_t k, auto n) {
      const Vec l = logit<kRoot>(get(row + k, n, kRoot ? kInfinity : -kInfinity));
      const Vec value = fma(broadcast(temperature), load(noise + k), l);
      const IVec better = value > best;
      best = better ? value : best;
      index = better ? lanes + uint32_t(first + k) : index;
    });
  }
  int winner = 0;
  for (int lane = 1; lane < kLanes; ++lane)
    if (best[lane] > best[winner] || (best[lane] == best[winner] && index[lane] < index[winner]))
      winner = lane;
  return index[winner];
}

// Writes the index that is drawn for every row; row r has the noise of row first + r.
inline void sample_rows(const Chunk& chunk,
                        bool root,
                        float temperature,
                        const uint64_t* seed,
                        int64_t first,
                        int64_t* found) {
  with_root(root, [&](auto is_root) {
    chunk.for_each_row(
        [&](int64_t r) { found[r] = sample_row<is_root>(chunk, r, temperature, seed, first + r); });
  });
}

}  // namespace genperf::softmax
