// SPDX-License-Identifier: Apache-2.0
//
// Gumbel-softmax over logits [outer, K, inner]. If the classes of a position are contiguous, the
// lanes are classes and the perturbed logits of a position stay in a buffer. Otherwise the lanes
// are adjacent positions: a quad of a position's noise fills one lane of four vectors, and a tile
// of positions passes over the classes, so that memory is read in runs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <tuple>

#include "cpu/common/outputs.h"
#include "cpu/gumbel/logits.h"
#include "cpu/gumbel/scan.h"

namespace genperf {
namespace {

constexpr int64_t kKeptBytes = 512 << 10;  // y of a tile
constexpr int64_t kMinKeptVectors = 4;

// Rows of `statistics`: what backward needs of each position. The last is sum q log q.
enum Statistic { kLargest, kLogSum, kBest, kNegativeEntropy, kStatistics };

template <class T>
GumbelInputs<T> inputs_of(const Tensor& logits,
                          const std::optional<Tensor>& temperature,
                          double tau,
                          const std::optional<Tensor>& noise,
                          const std::optional<Tensor>& seed,
                          int64_t first) {
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
  // At tau = 0 the largest logit gives 0 * FLT_MAX = 0, and all others -inf. A temperature that is
  // negative or NaN counts as 0.
  const float inverse = divisor > 0 ? std::min(1 / divisor, FLT_MAX) : FLT_MAX;
  return {Rows<T>(logits), Rows<T>(noise), logits.size(0),          logits.size(1), logits.size(2),
          seed_of(seed),   first,          PairKeys(seed_of(seed)), inverse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_sample(const Tensor& logits,
                                                         std::optional<Tensor> temperature,
                                                         double tau,
                                                         std::optional<Tensor> noise,
                                                         std::optional<Tensor> seed,
                                                         int64_t first,
                                                         bool hard,
                                                         bool dense) {
  const int64_t outer = logits.size(0), inner = logits.size(2);
  Tensor sample = dense ? output_like(logits) : torch::stable::new_empty(logits, {0});
  Tensor indices = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Long);
  Tensor kl = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor statistics =
      torch::stable::new_empty(logits, {kStatistics, outer, inner}, ScalarType::Float);
  with_type(logits, [&]<class T>(T*) {
    const GumbelInputs<T> in = inputs_of<T>(logits, temperature, tau, noise, seed, first);
    const bool one_hot = hard || in.inverse_tau == FLT_MAX;
    if (dense && one_hot)
      torch::stable::zero_(sample);
    const Rows<T> out = dense ? Rows<T>(sample) : Rows<T>();
    int64_t* const index = static_cast<int64_t*>(indices.mutable_data_ptr());
    float* const divergence = static_cast<float*>(kl.mutable_data_ptr());
    float* const saved = static_cast<float*>(statistics.mutable_data_ptr());
    const int64_t count = outer * inner;
    const double log_classes = std::log(double(in.classes));

    const auto finish = [&](int64_t o, int64_t i, const SoftmaxSums& d, const PerturbedSums& p) {
      const int64_t position = in.position(o, i);
      const double negative_entropy = d.negative_entropy();
      index[position] = p.index;
      divergence[position] = float(negative_entropy + log_classes);
      saved[kLargest * count + position] = d.largest;
      saved[kLogSum * count + position] = float(std::log(d.sum));
      saved[kBest * count + position] = p.largest;
      saved[kNegativeEntropy * count + position] = float(negative_entropy);
      if (dense && one_hot)
        out.at(o, p.index, i).set(0, 1, broadcast(1.0f));
    };
    for_each_position(
        in, kTile, 0,
        [&](int64_t o, int64_t i, float* s) {
          SoftmaxSums softmax;
          PerturbedSums perturbed;
          in.perturb_all(o, i, s);
          scan_classes(in, o, i, s, softmax, perturbed);
          finish(o, i, softmax, perturbed);
          if (!dense || one_hot)
            return;
          const Rows<T> row = out.transposed().at(o, i, 0);
          const float scale = float(1 / perturbed.sum);
          for (int64_t k = 0; k < in.classes; k += kLanes)
            row.set(k, int(std::min<int64_t>(kLanes, in.classes - k)),
                    scale * exp_or_zero<Simd>((load(s + k) - perturbed.largest) * in.inverse_tau));
        },
        [&](int64_t o, int64_t i, int64_t n, float*) {
          const bool vectorizable =
              in.logits.vectorizable() && in.noise.vectorizable() && out.vectorizable();
          TileState tile;
          scan_positions(in, o, i, n, vectorizable, tile);
          for (int64_t at = 0; at < n; ++at) {
            const int v = int(at / kLanes), lane = int(at % kLanes);
            finish(o, i + at, {tile.largest[v][lane], tile.sum[v][lane], tile.weighted[v][lane]},
                   {tile.best[v][lane], tile.soft_sum[v][lane], tile.index[v][lane]});
          }
          if (!dense || one_hot)
            return;
          for (int64_t k = 0; k < in.classes; k += kClasses)
            for_each_vector(n, vectorizable, [&](int64_t at, auto lanes) {
              const int classes = int(std::min<int64_t>(kClasses, in.classes - k));
              const int v = int(at / kLanes);
              const auto s = in.perturb(o, i + at, lanes, k, in.read(o, i + at, lanes, k));
              const auto y = exp_or_zero<SeveralSimd<kClasses>>((s - tile.best[v]) *
                                                                broadcast(in.inverse_tau));
              for (int w = 0; w < classes; ++w)
                out.at(o, k + w, i + at).set(0, lanes, y.at[w] / tile.soft_sum[v]);
            });
        });
  });
  return {sample, indices, kl, statistics};
}

// With y = softmax(perturbed / tau) the gradient is y (dy - sum y dy) / tau + grad_kl q (log q -
// sum q log q). grad_logits may be grad_sample: each element is read for the last time before it is
// written.
void gumbel_sample_backward(Tensor grad_logits,
                            std::optional<Tensor> grad_sample,
                            std::optional<Tensor> grad_kl,
                            const Tensor& logits,
                            const Tensor& statistics,
                            std::optional<Tensor> temperature,
                            double tau,
                            std::optional<Tensor> noise,
                            std::optional<Tensor> seed,
                            int64_t first) {
  const int64_t count = logits.size(0) * logits.size(2);
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.is_contiguous() &&
                      statistics.numel() == kStatistics * count,
                  "statistics must be contiguous float32 [4, outer, inner]");
  if (grad_sample.has_value())
    check_rows(*grad_sample, logits, true, "grad_sample");
  check_rows(grad_logits, logits, true, "grad_logits");
  use_huge_pages(grad_logits);
  if (grad_kl.has_value())
    STD_TORCH_CHECK(grad_kl->scalar_type() == ScalarType::Float && grad_kl->dim() == 2 &&
                        grad_kl->size(0) == logits.size(0) && grad_kl->size(1) == logits.size(2),
                    "grad_kl must be float32 [outer, inner]");
  with_type(logits, [&]<class T>(T*) {
    const GumbelInputs<T> in = inputs_of<T>(logits, temperature, tau, noise, seed, first);
    Rows<T> upstream(grad_sample);
    const Rows<T> out(grad_logits);
    // The gradient of a sum is one value in all places, which is read as a vector of copies.
    T copies[kLanes];
    const bool one_value =
        upstream && upstream.batch_stride == 0 && upstream.row_stride == 0 && upstream.stride == 0;
    if (one_value) {
      std::fill_n(copies, kLanes, *reinterpret_cast<const T*>(upstream.data));
      upstream.data = reinterpret_cast<char*>(copies);
    }
    const bool soft = bool(upstream) && in.inverse_tau < FLT_MAX;
    const float* const saved = static_cast<const float*>(statistics.const_data_ptr());
    const Rows<float> kl_grad = [&] {
      Rows<float> rows;
      if (grad_kl.has_value()) {
        rows.data = static_cast<char*>(grad_kl->data_ptr());
        rows.batch_stride = grad_kl->stride(0);
        rows.stride = grad_kl->stride(1);
      }
      return rows;
    }();
    // Tiles whose y fit into the cache keep them between the two passes. With more classes, tiles
    // would be too narrow for memory to be read in runs, and the noise is drawn again.
    const int64_t vectors = std::min<int64_t>(kKeptBytes / (in.classes * sizeof(Vec)), kVectors);
    const bool keeps = soft && vectors >= kMinKeptVectors;
    const int64_t tile_size = keeps ? vectors * kLanes : kTile;
    for_each_position(
        in, tile_size, keeps ? tile_size * in.classes : 0,
        [&](int64_t o, int64_t i, float* s) {
          const auto own = [&](int64_t which) { return saved[which * count + in.position(o, i)]; };
          const float log_sum = own(kLogSum), negative_entropy = own(kNegativeEntropy);
          const Vec largest = broadcast(own(kLargest)), best = broadcast(own(kBest));
          const float weight = kl_grad ? kl_grad.at(o, 0, i).get(0, 1)[0] : 0;
          const Rows<T> row = in.logits.transposed().at(o, i, 0);
          const Rows<T> grad = upstream.transposed().at(o, i, 0), to = out.transposed().at(o, i, 0);
          double product = 0, total = 0;  // of the weights exp((perturbed - best) / tau)
          if (soft) {
            in.perturb_all(o, i, s);
            for (int64_t first = 0; first < in.classes; first += kSumLength) {
              Vec products{}, sums{};
              for (int64_t k = first; k < std::min(in.classes, first + kSumLength); k += kLanes) {
                const int n = int(std::min<int64_t>(kLanes, in.classes - k));
                const IVec inside = IVec(GumbelInputs<T>::lane_numbers()) < n;
                const Vec y = exp_or_zero<Simd>((load(s + k) - best) * in.inverse_tau);
                store(s + k, y);
                products += inside ? y * grad.get_expanded(k, n) : Vec{};
                sums += inside ? y : Vec{};
              }
              product += sum(products);
              total += sum(sums);
            }
          }
          const float mean_gradient = float(product / total);
          const float scale = float(in.inverse_tau / total);
          for (int64_t k = 0; k < in.classes; k += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, in.classes - k));
            Vec value{};
            if (soft)
              value = scale * load(s + k) * (grad.get_expanded(k, n) - mean_gradient);
            if (kl_grad) {
              const Vec log_q = relative_to(row.get(k, n), largest) - log_sum;
              value += weight * exp_or_zero<Simd>(log_q) * (log_q - negative_entropy);
            }
            to.set(k, n, value);
          }
        },
        [&](int64_t o, int64_t i, int64_t n, float* kept) {
          const bool vectorizable = in.logits.vectorizable() && in.noise.vectorizable() &&
                                    (one_value || upstream.vectorizable()) && out.vectorizable();
          const Rows<float> own(statistics);
          Vec product[kVectors] = {}, total[kVectors] = {};
          using Classes = Several<Vec, kClasses>;
          // Calls f(position, lanes, first class, classes, logits) for all elements.
          const auto for_all = [&](const auto& f) {
            for (int64_t k = 0; k < in.classes; k += kClasses)
              for_each_vector(n, vectorizable, [&](int64_t at, auto lanes) {
                f(at, lanes, k, int(std::min<int64_t>(kClasses, in.classes - k)),
                  in.read(o, i + at, lanes, k));
              });
          };
          const auto statistic = [&](int64_t which, int64_t at, auto lanes) {
            return own.at(which, o, i + at).get(0, int(lanes));
          };
          // exp((perturbed - best) / tau), proportional to the probabilities.
          const auto weights = [&](int64_t at, auto lanes, int64_t k, const Classes& l) {
            const Vec best = statistic(kBest, at, lanes);
            return exp_or_zero<SeveralSimd<kClasses>>(
                each([&](Vec s) { return (s - best) * in.inverse_tau; },
                     in.perturb(o, i + at, lanes, k, l)));
          };
          const auto place = [&](int64_t k, int64_t at) { return kept + k * tile_size + at; };
          if (soft) {
            for_all([&](int64_t at, auto lanes, int64_t k, int classes, const Classes& l) {
              const Classes y = weights(at, lanes, k, l);
              const Rows<T> grad = upstream.at(o, k, i + at);
              Vec products{}, sum{};  // which round less than one long sum
              for (int w = 0; w < classes; ++w) {
                products = fma(y.at[w], grad.at(0, w, 0).get(0, lanes), products);
                sum += y.at[w];
                if (keeps)
                  store(place(k + w, at), y.at[w]);
              }
              product[at / kLanes] += products;
              total[at / kLanes] += sum;
            });
            for (int v = 0; v * kLanes < n; ++v) {
              product[v] /= total[v];
              total[v] = in.inverse_tau / total[v];
            }
          }
          for_all([&](int64_t at, auto lanes, int64_t k, int classes, const Classes& l) {
            const int v = int(at / kLanes);
            Classes value{};
            if (soft) {
              Classes y{};
              if (keeps)
                for (int w = 0; w < classes; ++w)
                  y.at[w] = load(place(k + w, at));
              else
                y = weights(at, lanes, k, l);
              const Rows<T> grad = upstream.at(o, k, i + at);
              for (int w = 0; w < classes; ++w)
                value.at[w] = total[v] * y.at[w] * (grad.at(0, w, 0).get(0, lanes) - product[v]);
            }
            if (kl_grad) {
              const Vec largest = statistic(kLargest, at, lanes);
              const Vec log_sum = statistic(kLogSum, at, lanes);
              const Vec negative_entropy = statistic(kNegativeEntropy, at, lanes);
              const Vec weight = kl_grad.at(o, 0, i + at).get(0, int(lanes));
              const Classes log_q =
                  each([&](Vec x) { return relative_to(x, largest) - log_sum; }, l);
              const Classes q = exp_or_zero<SeveralSimd<kClasses>>(log_q);
              value = each([&](Vec v, Vec q,
                               Vec log_q) { return fma(weight * q, log_q - negative_entropy, v); },
                           value, q, log_q);
            }
            const Rows<T> to = out.at(o, k, i + at);
            for (int w = 0; w < classes; ++w)
              to.at(0, w, 0).set(0, lanes, value.at[w]);
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
