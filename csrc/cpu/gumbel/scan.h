// SPDX-License-Identifier: Apache-2.0
//
// Maxima and sums over the classes, from which the sample, its index and the KL are computed.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "cpu/gumbel/logits.h"

namespace genperf {

// x - largest, bounded from below so that -inf times a zero probability does not give NaN.
inline Vec relative_to(Vec x, Vec largest) {
  return Simd::at_least(x - largest, broadcast(-88.0f));
}

// Where a is larger than b, or is the first NaN.
inline IVec is_better(Vec a, Vec b) {
  return ~(a <= b) & (b == b);
}

// The maximum that is subtracted from perturbed logits; finite, so that -inf - maximum is not NaN.
inline Vec finite_maximum(Vec best) {
  return best < -FLT_MAX ? broadcast(-FLT_MAX) : best;
}

struct SoftmaxSums {
  float largest = -FLT_MAX;  // the lowest finite number, so that -inf is never subtracted
  double sum = 0;            // of exp(logit - largest)
  double weighted = 0;       // of exp(logit - largest) * (logit - largest)

  // sum_k q_k log q_k; NaN if no logit is finite.
  double negative_entropy() const {
    return sum > 0 || sum != sum ? weighted / sum - std::log(sum)
                                 : std::numeric_limits<double>::quiet_NaN();
  }
};

struct PerturbedSums {
  float largest = -std::numeric_limits<float>::infinity();
  double sum = 0;  // of exp((perturbed - largest) / tau)
  int64_t index = 0;
};

// Maxima and sums of a tile of positions, one vector for every kLanes positions.
struct TileState {
  Vec largest[kVectors], sum[kVectors], weighted[kVectors];
  Vec best[kVectors], soft_sum[kVectors];
  UVec index[kVectors];
};

// Adds up to 16 classes: one pass for the maxima, one for the sums, which are rescaled when a
// maximum grows.
template <class T, class N>
void scan_classes_of_tile(const GumbelInputs<T>& in,
                          int64_t o,
                          int64_t i,
                          N n,
                          int64_t first,
                          TileState& tile,
                          int v) {
  constexpr int kBlock = 16;
  const int block = int(std::min<int64_t>(kBlock, in.classes - first));
  Vec l[kBlock], s[kBlock];
  Vec largest = tile.largest[v], best = tile.best[v];
  UVec index = tile.index[v];
  for (int k = 0; k < block; k += kClasses) {
    const auto logits = in.read(o, i, n, first + k);
    const auto perturbed = in.perturb(o, i, n, first + k, logits);
    for (int w = 0; w < kClasses; ++w) {
      const Vec value = perturbed.at[w];
      l[k + w] = logits.at[w];
      s[k + w] = value;
      if (k + w >= block)
        continue;
      const IVec better = is_better(value, best);
      best = better ? value : best;
      index = better ? UVec{} + uint32_t(first + k + w) : index;
      largest = max(logits.at[w], largest);
    }
  }
  const Vec shift = relative_to(tile.largest[v], largest), factor = exp_or_zero<Simd>(shift);
  Vec sum{}, weighted{}, soft_sum{};  // sums of the block, which round less than one long sum
  constexpr int kSide = kClasses / 2;
  for (int k = 0; k < block; k += kSide) {
    const auto relative = several<kSide>([&](int w) { return relative_to(l[k + w], largest); });
    const auto soft =
        several<kSide>([&](int w) { return (s[k + w] - finite_maximum(best)) * in.inverse_tau; });
    const auto e = exp_or_zero<SeveralSimd<kClasses>>(joined(relative, soft));
    for (int w = 0; w < kSide; ++w) {
      sum += e.at[w];
      weighted = fma(e.at[w], relative.at[w], weighted);
      soft_sum += e.at[kSide + w];
    }
  }
  const Vec soft_factor =
      exp_or_zero<Simd>((finite_maximum(tile.best[v]) - finite_maximum(best)) * in.inverse_tau);
  tile.weighted[v] = fma(factor, fma(tile.sum[v], shift, tile.weighted[v]), weighted);
  tile.sum[v] = fma(tile.sum[v], factor, sum);
  tile.soft_sum[v] = fma(tile.soft_sum[v], soft_factor, soft_sum);
  tile.largest[v] = largest;
  tile.best[v] = best;
  tile.index[v] = index;
}

template <class T>
void scan_positions(const GumbelInputs<T>& in,
                    int64_t o,
                    int64_t i,
                    int64_t count,
                    bool vectorizable,
                    TileState& tile) {
  std::fill_n(tile.largest, kVectors, broadcast(-FLT_MAX));
  std::fill_n(tile.best, kVectors, broadcast(PerturbedSums().largest));
  for (Vec* zeros : {tile.sum, tile.weighted, tile.soft_sum})
    std::fill_n(zeros, kVectors, Vec{});
  std::fill_n(tile.index, kVectors, UVec{});
  for (int64_t first = 0; first < in.classes; first += 16)
    for_each_vector(count, vectorizable, [&](int64_t at, auto n) {
      scan_classes_of_tile(in, o, i + at, n, first, tile, int(at / kLanes));
    });
  std::transform(tile.best, tile.best + kVectors, tile.best, finite_maximum);
}

// Maxima and sums of one position with perturbed logits s.
template <class T>
void scan_classes(const GumbelInputs<T>& in,
                  int64_t o,
                  int64_t i,
                  const float* s,
                  SoftmaxSums& softmax,
                  PerturbedSums& perturbed) {
  const Rows<T> row = in.logits.transposed().at(o, i, 0);
  Vec largest = broadcast(-FLT_MAX), best = broadcast(perturbed.largest);
  UVec index{};
  for (int64_t k = 0; k < in.classes; k += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, in.classes - k));
    const IVec inside = IVec(GumbelInputs<T>::lane_numbers()) < n;
    const Vec value = load(s + k);
    const IVec better = inside & is_better(value, best);
    best = better ? value : best;
    index = better ? UVec{} + uint32_t(k) : index;
    largest = max(inside ? row.get(k, n) : largest, largest);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    softmax.largest = std::max(softmax.largest, largest[lane]);
    const int64_t k = int64_t(index[lane]) + lane;
    const bool better =
        !(best[lane] <= perturbed.largest) && perturbed.largest == perturbed.largest;
    const bool same = best[lane] == perturbed.largest ||
                      (best[lane] != best[lane] && perturbed.largest != perturbed.largest);
    if (better || (same && k < perturbed.index)) {
      perturbed.largest = best[lane];
      perturbed.index = k;
    }
  }
  perturbed.largest = finite_maximum(broadcast(perturbed.largest))[0];
  for (int64_t first = 0; first < in.classes; first += kSumLength) {
    Vec sum{}, weighted{}, soft_sum{};
    for (int64_t k = first; k < std::min(in.classes, first + kSumLength); k += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, in.classes - k));
      const IVec inside = IVec(GumbelInputs<T>::lane_numbers()) < n;
      const Vec relative = relative_to(row.get(k, n), broadcast(softmax.largest));
      const Vec e = inside ? exp_or_zero<Simd>(relative) : Vec{};
      sum += e;
      weighted = fma(e, relative, weighted);
      const Vec soft = exp_or_zero<Simd>((load(s + k) - perturbed.largest) * in.inverse_tau);
      soft_sum += inside ? soft : Vec{};
    }
    softmax.sum += genperf::sum(sum);
    softmax.weighted += genperf::sum(weighted);
    perturbed.sum += genperf::sum(soft_sum);
  }
}

}  // namespace genperf
