// SPDX-License-Identifier: Apache-2.0
//
// The gradient through the rotation and scaling that map x to its code e.
//
// With h = x + e |x|/|e|, the gradient is multiplied by |e|/|x| (1 - 2 h h'/|h|^2 + 2 x
// e'/(|x||e|)). There are three passes over the position, the last two from cache: h cancels where
// x and its code are nearly opposite, so its norm is summed from h and not derived from x.e.
#pragma once

#include "position_teams.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

// The channels of a position that a thread of a team processes.
struct TeamChannels {
  int64_t first;
  int64_t end;
  int64_t step;
};

template <typename T, int kWidth>
__device__ Pack<float, kWidth> load_floats(const T* row,
                                           int64_t channel,
                                           int64_t stride,
                                           int64_t channels,
                                           bool vectorizable) {
  const auto pack =
      load_pack<T, kWidth>(row + channel * stride, stride, channels - channel, vectorizable);
  Pack<float, kWidth> floats;
#pragma unroll
  for (int j = 0; j < kWidth; ++j)
    floats.values[j] = to_float(pack.values[j]);
  return floats;
}

struct Rotation {
  bool exists = false;
  float stretch = 0;     // |x| / |e|
  float ratio = 1;       // |e| / |x|
  float along_half = 0;  // 2 h.g / |h|^2
  float along_x = 0;     // 2 e.g / (|x||e|)

  // Of a component of x, for components of the gradient g, x and the code.
  __device__ float gradient(float g, float x, float e) const {
    const float half = x + e * stretch;
    return ratio * (g - half * along_half + x * along_x);
  }
};

// The rotation of a team's position, from functions that load kWidth components. Every thread of
// the block takes part; there is a rotation only for a position that is kept.
template <int kWidth, typename LoadX, typename LoadCode, typename LoadGrad>
__device__ Rotation rotation_of(const Tiling& tiling,
                                const ThreadTile& thread_tile,
                                const TeamChannels& channels,
                                bool kept,
                                const LoadX& load_x,
                                const LoadCode& load_code,
                                const LoadGrad& load_grad) {
  Rotation rotation;
  float squares[2] = {};
  for (int64_t d = channels.first; kept && d < channels.end; d += channels.step) {
    const auto xs = load_x(d);
    const auto codes = load_code(d);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      squares[0] += xs.values[j] * xs.values[j];
      squares[1] += codes.values[j] * codes.values[j];
    }
  }
  team_sum(squares, tiling, thread_tile);
  rotation.exists = kept && squares[0] > 0 && squares[1] > 0;
  const float x_norm = sqrtf(squares[0]);
  const float code_norm = sqrtf(squares[1]);
  if (rotation.exists) {
    rotation.stretch = x_norm / code_norm;
    rotation.ratio = code_norm / x_norm;
  }
  float products[3] = {};  // h.h, h.g, e.g
  for (int64_t d = channels.first; rotation.exists && d < channels.end; d += channels.step) {
    const auto xs = load_x(d);
    const auto codes = load_code(d);
    const auto grads = load_grad(d);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float half = xs.values[j] + codes.values[j] * rotation.stretch;
      products[0] += half * half;
      products[1] += half * grads.values[j];
      products[2] += codes.values[j] * grads.values[j];
    }
  }
  team_sum(products, tiling, thread_tile);
  rotation.exists = rotation.exists && sqrtf(products[0]) > 1e-3f * x_norm;
  if (rotation.exists) {
    rotation.along_half = 2 * products[1] / products[0];
    rotation.along_x = 2 * (products[2] / code_norm) / x_norm;
  }
  return rotation;
}

}  // namespace genperf

#endif
