// SPDX-License-Identifier: Apache-2.0
//
// Gumbel-softmax over logits [outer, K, inner]. Where the classes of a position lie together, lanes
// are classes, and a position's perturbed logits stay in a buffer. Else lanes are neighboring
// positions: a quad of a position's noise falls into one lane of four vectors, and a tile of
// positions is carried through the classes, so that memory is read in runs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/common/draw.h"
#include "cpu/common/elements.h"
#include "cpu/common/positions.h"

namespace genperf {
namespace {

constexpr int64_t kGrain = 16384;  // logits to a task
constexpr int kTile = 512;         // positions that go through the classes together
constexpr int kVectors = kTile / kLanes;
constexpr int kSummed = 32 * kLanes;  // classes to a sum in float32

// x - largest, kept from becoming -inf so that its product with a zero is zero.
inline Vec below(Vec x, Vec largest) {
  const Vec difference = x - largest;
  return difference < -88.0f ? broadcast(-88.0f) : difference;
}

// Where a is above b, or is the first NaN.
inline IVec above(Vec a, Vec b) {
  return ~(a <= b) & (b == b);
}

// What is subtracted from perturbed logits: the best of them, or the lowest finite number.
inline Vec finite(Vec best) {
  return best < -FLT_MAX ? broadcast(-FLT_MAX) : best;
}

struct Distribution {
  float largest = -FLT_MAX;  // lowest finite: nothing is subtracted from an infinity
  double sum = 0;            // of exp(logit - largest)
  double weighted = 0;       // of exp(logit - largest) * (logit - largest)

  // sum_k q_k log q_k; NaN where no logit is finite.
  double negative_entropy() const {
    return sum > 0 || sum != sum ? weighted / sum - std::log(sum)
                                 : std::numeric_limits<double>::quiet_NaN();
  }
};

struct Perturbed {
  float largest = -std::numeric_limits<float>::infinity();
  double sum = 0;  // of exp((perturbed - largest) / tau)
  int64_t index = 0;
};

// What one position needs besides its logits.
template <class T>
struct Problem {
  Rows<T> logits, noise;
  int64_t outer, classes, inner;
  uint64_t seed;
  float inverse_tau;

  int64_t position(int64_t o, int64_t i) const { return o * inner + i; }

  // The perturbed logits of classes [first, first + 4) for the n positions from (o, i) on.
  template <class N>
  void perturb(int64_t o, int64_t i, N n, int64_t first, const Vec (&l)[4], Vec (&s)[4]) const {
    if (noise) {
      for (int w = 0; w < 4; ++w)
        s[w] = l[w] + (first + w < classes ? noise.at(o, first + w, i).get(0, n) : Vec{});
      return;
    }
    const Counters rows(position(o, i), lane_numbers());
    const Words<Simd> words =
        lane_words(split_low(first / 4), split_high(first / 4), rows.low, rows.high, seed);
    for (int w = 0; w < 4; ++w)
      s[w] = l[w] + gumbel<Simd>(words.word[w]);
  }

  // The perturbed logits of one position in their order; `out` holds classes + kDrawn.
  void perturb_all(int64_t o, int64_t i, float* out) const {
    const Rows<T> row = logits.transposed().at(o, i, 0);
    if (!noise)
      draw(seed, position(o, i), 0, classes, out, [](const Words<Simd>& words, Vec(&values)[4]) {
        for (int w = 0; w < 4; ++w)
          values[w] = gumbel<Simd>(words.word[w]);
      });
    const Rows<T> given = noise.transposed().at(o, i, 0);
    for (int64_t k = 0; k < classes; k += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, classes - k));
      store(out + k, row.get(k, n) + (noise ? given.get(k, n) : load(out + k)));
    }
  }

  static UVec lane_numbers() {
    UVec numbers{};
    for (int lane = 0; lane < kLanes; ++lane)
      numbers[lane] = uint32_t(lane);
    return numbers;
  }
};

// What a tile of positions carries through the classes, a vector to each kLanes positions.
struct TileState {
  Vec largest[kVectors], sum[kVectors], weighted[kVectors];
  Vec best[kVectors], soft_sum[kVectors];
  UVec index[kVectors];
};

// Classes in blocks: one look for the maxima, one for the sums, which are rescaled when a maximum
// grows.
template <class T, class N>
void scan_block(const Problem<T>& in,
                int64_t o,
                int64_t i,
                N n,
                int64_t first,
                TileState& tile,
                int v) {
  constexpr int kBlock = 16;
  const int block = int(std::min<int64_t>(kBlock, in.classes - first));
  Vec l[kBlock / 4][4], s[kBlock / 4][4];
  Vec largest = tile.largest[v], best = tile.best[v];
  UVec index = tile.index[v];
  for (int k = 0; k < block; k += 4) {
    auto& quad = l[k / 4];
    for (int w = 0; w < 4; ++w)
      quad[w] = k + w < block ? in.logits.at(o, first + k + w, i).get(0, n) : Vec{};
    in.perturb(o, i, n, first + k, quad, s[k / 4]);
    for (int w = 0; w < std::min(4, block - k); ++w) {
      const Vec value = s[k / 4][w];
      const IVec better = above(value, best);
      best = better ? value : best;
      index = better ? UVec{} + uint32_t(first + k + w) : index;
      largest = max(quad[w], largest);
    }
  }
  const Vec grown = below(tile.largest[v], largest), kept = exp_or_zero<Simd>(grown);
  Vec sum{}, weighted{}, soft_sum{};  // of the block: less is rounded than in one long sum
  for (int k = 0; k < block; ++k) {
    const Vec relative = below(l[k / 4][k % 4], largest), e = exp_or_zero<Simd>(relative);
    sum += e;
    weighted = fma(e, relative, weighted);
    soft_sum += exp_or_zero<Simd>((s[k / 4][k % 4] - finite(best)) * in.inverse_tau);
  }
  const Vec soft_kept = exp_or_zero<Simd>((finite(tile.best[v]) - finite(best)) * in.inverse_tau);
  tile.weighted[v] = fma(kept, fma(tile.sum[v], grown, tile.weighted[v]), weighted);
  tile.sum[v] = fma(tile.sum[v], kept, sum);
  tile.soft_sum[v] = fma(tile.soft_sum[v], soft_kept, soft_sum);
  tile.largest[v] = largest;
  tile.best[v] = best;
  tile.index[v] = index;
}

template <class T>
void scan_positions(const Problem<T>& in,
                    int64_t o,
                    int64_t i,
                    int64_t count,
                    bool together,
                    TileState& tile) {
  std::fill_n(tile.largest, kVectors, broadcast(-FLT_MAX));
  std::fill_n(tile.best, kVectors, broadcast(Perturbed().largest));
  for (Vec* zeros : {tile.sum, tile.weighted, tile.soft_sum})
    std::fill_n(zeros, kVectors, Vec{});
  std::fill_n(tile.index, kVectors, UVec{});
  for (int64_t first = 0; first < in.classes; first += 16)
    for_each_vector(count, together, [&](int64_t at, auto n) {
      scan_block(in, o, i + at, n, first, tile, int(at / kLanes));
    });
  std::transform(tile.best, tile.best + kVectors, tile.best, finite);
}

// One position whose perturbed logits are in `s`.
template <class T>
void scan_classes(const Problem<T>& in,
                  int64_t o,
                  int64_t i,
                  const float* s,
                  Distribution& distribution,
                  Perturbed& perturbed) {
  const Rows<T> row = in.logits.transposed().at(o, i, 0);
  Vec largest = broadcast(-FLT_MAX), best = broadcast(perturbed.largest);
  UVec index{};
  for (int64_t k = 0; k < in.classes; k += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, in.classes - k));
    const IVec inside = IVec(Problem<T>::lane_numbers()) < n;
    const Vec value = load(s + k);
    const IVec better = inside & above(value, best);
    best = better ? value : best;
    index = better ? UVec{} + uint32_t(k) : index;
    largest = max(inside ? row.get(k, n) : largest, largest);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    distribution.largest = std::max(distribution.largest, largest[lane]);
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
  perturbed.largest = finite(broadcast(perturbed.largest))[0];
  for (int64_t first = 0; first < in.classes; first += kSummed) {
    Vec sum{}, weighted{}, soft_sum{};
    for (int64_t k = first; k < std::min(in.classes, first + kSummed); k += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, in.classes - k));
      const IVec inside = IVec(Problem<T>::lane_numbers()) < n;
      const Vec relative = below(row.get(k, n), broadcast(distribution.largest));
      const Vec e = inside ? exp_or_zero<Simd>(relative) : Vec{};
      sum += e;
      weighted = fma(e, relative, weighted);
      const Vec soft = exp_or_zero<Simd>((load(s + k) - perturbed.largest) * in.inverse_tau);
      soft_sum += inside ? soft : Vec{};
    }
    distribution.sum += genperf::sum(sum);
    distribution.weighted += genperf::sum(weighted);
    perturbed.sum += genperf::sum(soft_sum);
  }
}

template <class T>
Problem<T> problem_of(const Tensor& logits,
                      const std::optional<Tensor>& temperature,
                      double tau,
                      const std::optional<Tensor>& noise,
                      const std::optional<Tensor>& seed) {
  check_rows(logits, logits, true, "logits");
  STD_TORCH_CHECK(logits.size(1) > 0 && logits.size(1) < int64_t{1} << 31,
                  "logits must hold at least one class and fewer than 2^31");
  STD_TORCH_CHECK(noise.has_value() || seed.has_value(), "noise or a seed must be given");
  if (noise.has_value())
    check_rows(*noise, logits, false, "noise");
  float divisor = float(tau);
  if (temperature.has_value()) {
    STD_TORCH_CHECK(temperature->scalar_type() == ScalarType::Float && temperature->numel() == 1,
                    "temperature must be one float32");
    divisor = *static_cast<const float*>(temperature->const_data_ptr());
  }
  // At tau = 0 the largest keeps 0 = 0 * FLT_MAX, and everything else falls to -inf.
  const float inverse = divisor == 0 ? FLT_MAX : std::min(1 / divisor, FLT_MAX);
  return {Rows<T>(logits),
          Rows<T>(noise),
          logits.size(0),
          logits.size(1),
          logits.size(2),
          seed_of(seed),
          divisor == divisor ? inverse : divisor};
}

// Calls classes(o, i, buffer) for every position, or positions(o, i, count) for tiles of them.
template <class T, class Classes, class Positions>
void for_each_position(const Problem<T>& in, const Classes& classes, const Positions& positions) {
  const bool by_class = in.logits.row_stride == 1 || in.inner == 1;
  const int64_t step = by_class ? 1 : std::min<int64_t>(kTile, in.inner);
  const int64_t tiles = step ? (in.inner + step - 1) / step : 0;
  torch::stable::parallel_for(
      0, in.outer * tiles, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, in.classes * step)),
      [&](int64_t begin, int64_t end) {
        const Buffer<float> buffer(by_class ? in.classes + kDrawn : 0);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t o = tile / tiles, i = tile % tiles * step;
          if (by_class)
            classes(o, i, buffer.get());
          else
            positions(o, i, std::min(step, in.inner - i));
        }
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_sample(const Tensor& logits,
                                                         std::optional<Tensor> temperature,
                                                         double tau,
                                                         std::optional<Tensor> noise,
                                                         std::optional<Tensor> seed,
                                                         bool hard,
                                                         bool dense) {
  const int64_t outer = logits.size(0), inner = logits.size(2);
  Tensor sample = dense ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
  Tensor indices = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Long);
  Tensor kl = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(logits, {4, outer, inner}, ScalarType::Float);
  with_type(logits, [&]<class T>(T*) {
    const Problem<T> in = problem_of<T>(logits, temperature, tau, noise, seed);
    const bool one_hot = hard || in.inverse_tau == FLT_MAX;
    if (dense && one_hot)
      torch::stable::zero_(sample);
    const Rows<T> out = dense ? Rows<T>(sample) : Rows<T>();
    int64_t* const index = static_cast<int64_t*>(indices.mutable_data_ptr());
    float* const divergence = static_cast<float*>(kl.mutable_data_ptr());
    float* const kept = static_cast<float*>(statistics.mutable_data_ptr());
    const int64_t count = outer * inner;
    const double log_classes = std::log(double(in.classes));

    const auto finish = [&](int64_t o, int64_t i, const Distribution& d, const Perturbed& p) {
      const int64_t position = in.position(o, i);
      index[position] = p.index;
      divergence[position] = float(d.negative_entropy() + log_classes);
      kept[position] = d.largest;
      kept[count + position] = float(std::log(d.sum));
      kept[2 * count + position] = p.largest;
      kept[3 * count + position] = float(std::log(p.sum));
      if (dense && one_hot)
        out.at(o, p.index, i).set(0, 1, broadcast(1));
    };
    for_each_position(
        in,
        [&](int64_t o, int64_t i, float* s) {
          Distribution distribution;
          Perturbed perturbed;
          in.perturb_all(o, i, s);
          scan_classes(in, o, i, s, distribution, perturbed);
          finish(o, i, distribution, perturbed);
          if (!dense || one_hot)
            return;
          const Rows<T> row = out.transposed().at(o, i, 0);
          const float scale = float(1 / perturbed.sum);
          for (int64_t k = 0; k < in.classes; k += kLanes)
            row.set(k, int(std::min<int64_t>(kLanes, in.classes - k)),
                    scale * exp_or_zero<Simd>((load(s + k) - perturbed.largest) * in.inverse_tau));
        },
        [&](int64_t o, int64_t i, int64_t n) {
          const bool together = in.logits.together() && in.noise.together() && out.together();
          TileState tile;
          scan_positions(in, o, i, n, together, tile);
          for (int64_t at = 0; at < n; ++at) {
            const int v = int(at / kLanes), lane = int(at % kLanes);
            finish(o, i + at, {tile.largest[v][lane], tile.sum[v][lane], tile.weighted[v][lane]},
                   {tile.best[v][lane], tile.soft_sum[v][lane], tile.index[v][lane]});
          }
          if (!dense || one_hot)
            return;
          for (int64_t k = 0; k < in.classes; k += 4)
            for_each_vector(n, together, [&](int64_t at, auto lanes) {
              const int quad = int(std::min<int64_t>(4, in.classes - k)), v = int(at / kLanes);
              Vec l[4] = {}, s[4];
              for (int w = 0; w < quad; ++w)
                l[w] = in.logits.at(o, k + w, i + at).get(0, lanes);
              in.perturb(o, i + at, lanes, k, l, s);
              for (int w = 0; w < quad; ++w)
                out.at(o, k + w, i + at)
                    .set(0, lanes,
                         exp_or_zero<Simd>((s[w] - tile.best[v]) * in.inverse_tau) /
                             tile.soft_sum[v]);
            });
        });
  });
  return {sample, indices, kl, statistics};
}

// With y = softmax(perturbed / tau): y (dy - sum y dy) / tau + grad_kl q (log q - sum q log q).
// grad_logits may be grad_sample: an element is written after it was read for the last time.
void gumbel_sample_backward(Tensor grad_logits,
                            std::optional<Tensor> grad_sample,
                            std::optional<Tensor> grad_kl,
                            const Tensor& logits,
                            const Tensor& statistics,
                            std::optional<Tensor> temperature,
                            double tau,
                            std::optional<Tensor> noise,
                            std::optional<Tensor> seed) {
  const int64_t count = logits.size(0) * logits.size(2);
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.is_contiguous() &&
                      statistics.numel() == 4 * count,
                  "statistics must be contiguous float32 [4, outer, inner]");
  if (grad_sample.has_value())
    check_rows(*grad_sample, logits, true, "grad_sample");
  check_rows(grad_logits, logits, true, "grad_logits");
  if (grad_kl.has_value())
    STD_TORCH_CHECK(grad_kl->scalar_type() == ScalarType::Float && grad_kl->dim() == 2 &&
                        grad_kl->size(0) == logits.size(0) && grad_kl->size(1) == logits.size(2),
                    "grad_kl must be float32 [outer, inner]");
  with_type(logits, [&]<class T>(T*) {
    const Problem<T> in = problem_of<T>(logits, temperature, tau, noise, seed);
    const Rows<T> upstream(grad_sample), out(grad_logits);
    const bool soft = bool(upstream) && in.inverse_tau < FLT_MAX;
    const float* const kept = static_cast<const float*>(statistics.const_data_ptr());
    const Rows<float> pull = [&] {
      Rows<float> rows;
      if (grad_kl.has_value()) {
        rows.data = static_cast<char*>(grad_kl->data_ptr());
        rows.batch_stride = grad_kl->stride(0);
        rows.stride = grad_kl->stride(1);
      }
      return rows;
    }();
    for_each_position(
        in,
        [&](int64_t o, int64_t i, float* s) {
          const float* const own = kept + in.position(o, i);
          const float log_sum = own[count], soft_log_sum = own[3 * count];
          const Vec largest = broadcast(own[0]), best = broadcast(own[2 * count]);
          const float weight = pull ? pull.at(o, 0, i).get(0, 1)[0] : 0;
          const Rows<T> row = in.logits.transposed().at(o, i, 0);
          const Rows<T> grad = upstream.transposed().at(o, i, 0), to = out.transposed().at(o, i, 0);
          Vec product{}, entropy{};
          if (soft)
            in.perturb_all(o, i, s);
          for (int64_t k = 0; k < in.classes; k += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, in.classes - k));
            if (soft) {
              const Vec y = exp_or_zero<Simd>((load(s + k) - best) * in.inverse_tau - soft_log_sum);
              store(s + k, y);
              const Vec term = y * grad.get(k, n);
              product += n == kLanes ? term : IVec(Problem<T>::lane_numbers()) < n ? term : Vec{};
            }
            if (pull) {
              const Vec log_q = below(row.get(k, n), largest) - log_sum;
              const Vec term = exp_or_zero<Simd>(log_q) * log_q;
              entropy += n == kLanes ? term : IVec(Problem<T>::lane_numbers()) < n ? term : Vec{};
            }
          }
          const float mean_gradient = float(sum(product)), negative_entropy = float(sum(entropy));
          for (int64_t k = 0; k < in.classes; k += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, in.classes - k));
            Vec value{};
            if (soft)
              value = in.inverse_tau * load(s + k) * (grad.get(k, n) - mean_gradient);
            if (pull) {
              const Vec log_q = below(row.get(k, n), largest) - log_sum;
              value += weight * exp_or_zero<Simd>(log_q) * (log_q - negative_entropy);
            }
            to.set(k, n, value);
          }
        },
        [&](int64_t o, int64_t i, int64_t n) {
          const bool together =
              in.logits.together() && in.noise.together() && upstream.together() && out.together();
          const Rows<float> own(statistics);
          Vec product[kVectors] = {}, entropy[kVectors] = {};
          // Calls f(vector, lanes, class, soft sample, log q) for all; the first pass sums what the
          // second subtracts, and drawing the noise again is cheaper than keeping it.
          const auto for_all = [&](const auto& f) {
            for (int64_t k = 0; k < in.classes; k += 4)
              for_each_vector(n, together, [&](int64_t at, auto lanes) {
                const int quad = int(std::min<int64_t>(4, in.classes - k));
                const auto kept = [&](int64_t which) {
                  return own.at(which, o, i + at).get(0, int(lanes));
                };
                const Vec largest = kept(0), log_sum = kept(1), best = kept(2),
                          soft_log_sum = kept(3);
                Vec l[4] = {}, s[4];
                for (int w = 0; w < quad; ++w)
                  l[w] = in.logits.at(o, k + w, i + at).get(0, lanes);
                if (soft)
                  in.perturb(o, i + at, lanes, k, l, s);
                for (int w = 0; w < quad; ++w)
                  f(at, lanes, k + w,
                    soft ? exp_or_zero<Simd>((s[w] - best) * in.inverse_tau - soft_log_sum) : Vec{},
                    below(l[w], largest) - log_sum);
              });
          };
          for_all([&](int64_t at, auto lanes, int64_t k, Vec y, Vec log_q) {
            const int v = int(at / kLanes);
            if (soft)
              product[v] = fma(y, upstream.at(o, k, i + at).get(0, lanes), product[v]);
            if (pull)
              entropy[v] = fma(exp_or_zero<Simd>(log_q), log_q, entropy[v]);
          });
          for_all([&](int64_t at, auto lanes, int64_t k, Vec y, Vec log_q) {
            const int v = int(at / kLanes);
            Vec value{};
            if (soft)
              value = in.inverse_tau * y * (upstream.at(o, k, i + at).get(0, lanes) - product[v]);
            if (pull)
              value = fma(pull.at(o, 0, i + at).get(0, int(lanes)) * exp_or_zero<Simd>(log_q),
                          log_q - entropy[v], value);
            out.at(o, k, i + at).set(0, lanes, value);
          });
        });
  });
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("gumbel_sample", TORCH_BOX(&genperf::gumbel_sample));
  m.impl("gumbel_sample_backward", TORCH_BOX(&genperf::gumbel_sample_backward));
}
