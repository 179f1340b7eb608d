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
  return {Rows<T>(logits), Rows<T>(noise), logits.size(0), logits.size(1),
          logits.size(2),  seed_of(seed),  first,          inverse};
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
  Tensor statistics = torch::stable::new_empty(logits, {4, outer, inner}, ScalarType::Float);
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
      index[position] = p.index;
      divergence[position] = float(d.negative_entropy() + log_classes);
      saved[position] = d.largest;
      saved[count + position] = float(std::log(d.sum));
      saved[2 * count + position] = p.largest;
      saved[3 * count + position] = float(std::log(p.sum));
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
          for (int64_t k = 0; k < in.classes; k += 4)
            for_each_vector(n, vectorizable, [&](int64_t at, auto lanes) {
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
                      statistics.numel() == 4 * count,
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
          const float* const own = saved + in.position(o, i);
          const float log_sum = own[count], soft_log_sum = own[3 * count];
          const Vec largest = broadcast(own[0]), best = broadcast(own[2 * count]);
          const float weight = kl_grad ? kl_grad.at(o, 0, i).get(0, 1)[0] : 0;
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
              const Vec term = y * grad.get_expanded(k, n);
              product += n == kLanes                                 ? term
                         : IVec(GumbelInputs<T>::lane_numbers()) < n ? term
                                                                     : Vec{};
            }
            if (kl_grad) {
              const Vec log_q = relative_to(row.get(k, n), largest) - log_sum;
              const Vec term = exp_or_zero<Simd>(log_q) * log_q;
              entropy += n == kLanes                                 ? term
                         : IVec(GumbelInputs<T>::lane_numbers()) < n ? term
                                                                     : Vec{};
            }
          }
          const float mean_gradient = float(sum(product)), negative_entropy = float(sum(entropy));
          for (int64_t k = 0; k < in.classes; k += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, in.classes - k));
            Vec value{};
            if (soft)
              value = in.inverse_tau * load(s + k) * (grad.get_expanded(k, n) - mean_gradient);
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
          Vec product[kVectors] = {}, entropy[kVectors] = {}, weight[kVectors] = {};
          if (kl_grad)
            for_each_vector(n, false, [&](int64_t at, int lanes) {
              weight[at / kLanes] = kl_grad.at(o, 0, i + at).get(0, lanes);
            });
          // Calls f(position, lanes, class, y, log q) for all elements. The first pass computes the
          // sums that the second subtracts.
          const auto for_all = [&](bool known, const auto& f) {
            for (int64_t k = 0; k < in.classes; k += 4)
              for_each_vector(n, vectorizable, [&](int64_t at, auto lanes) {
                const int quad = int(std::min<int64_t>(4, in.classes - k));
                const auto saved = [&](int64_t which) {
                  return own.at(which, o, i + at).get(0, int(lanes));
                };
                const Vec largest = saved(0), log_sum = saved(1), best = saved(2),
                          soft_log_sum = saved(3);
                Vec l[4] = {}, y[4] = {};
                for (int w = 0; w < quad; ++w)
                  l[w] = in.logits.at(o, k + w, i + at).get(0, lanes);
                const auto place = [&](int w) { return kept + (k + w) * tile_size + at; };
                if (soft && known) {
                  for (int w = 0; w < quad; ++w)
                    y[w] = load(place(w));
                } else if (soft) {
                  in.perturb(o, i + at, lanes, k, l, y);
                  for (int w = 0; w < quad; ++w)
                    y[w] = exp_or_zero<Simd>((y[w] - best) * in.inverse_tau - soft_log_sum);
                  if (keeps)
                    for (int w = 0; w < quad; ++w)
                      store(place(w), y[w]);
                }
                for (int w = 0; w < quad; ++w)
                  f(at, lanes, k + w, y[w], relative_to(l[w], largest) - log_sum);
              });
          };
          for_all(false, [&](int64_t at, auto lanes, int64_t k, Vec y, Vec log_q) {
            const int v = int(at / kLanes);
            if (soft)
              product[v] = fma(y, upstream.at(o, k, i + at).get(0, lanes), product[v]);
            if (kl_grad)
              entropy[v] = fma(exp_or_zero<Simd>(log_q), log_q, entropy[v]);
          });
          for_all(keeps, [&](int64_t at, auto lanes, int64_t k, Vec y, Vec log_q) {
            const int v = int(at / kLanes);
            Vec value{};
            if (soft)
              value = in.inverse_tau * y * (upstream.at(o, k, i + at).get(0, lanes) - product[v]);
            if (kl_grad)
              value = fma(weight[v] * exp_or_zero<Simd>(log_q), log_q - entropy[v], value);
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
