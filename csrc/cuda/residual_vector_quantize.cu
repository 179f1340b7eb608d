// SPDX-License-Identifier: Apache-2.0
//
// A residual quantizer: one launch for each level after its search, and one for the gradient of x.
//
// In backward a team processes a position, and recomputes the residuals from x and the codes: a
// chain of subtractions costs less than reading stored residuals. If every level passes the
// gradient through a rotation of its own, the residual and the gradient so far are kept between the
// levels, in shared memory or, for wide vectors, in a scratch buffer.
#include "residual_vector_quantize.h"

#include "rotation.h"

namespace genperf {
namespace {

constexpr const char* kStep = "residual_vector_quantize";
constexpr const char* kBackward = "residual_vector_quantize_backward";
constexpr size_t kTeamShared = sizeof(float[3][kThreads]);
constexpr size_t kMaxShared = 48 << 10;
constexpr int kScratchBlocks = 264;  // the grid if there is a scratch buffer

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    residual_step_kernel(ResidualStepParams p, Tiling tiling, Vectorizable vectorizable) {
  constexpr int kWidth = kWidthOf<float>;
  using Floats = Pack<float, kWidth>;
  const ThreadTile thread_tile(tiling);
  const int64_t num_levels =
      p.num_levels == nullptr || *p.num_levels > p.levels ? p.levels : *p.num_levels;
  float error = 0;
  int64_t valid = 0;
  for (int64_t tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    const int64_t position = tile * tiling.positions + thread_tile.position;
    if (position >= p.outer * p.inner)
      break;
    const int64_t index = p.found[position];
    const bool kept = index >= 0 && index < p.num_codes;
    int64_t* indices = p.indices + position * p.levels;
    if (thread_tile.lane == 0) {
      indices[p.level] = kept ? index : -1;
      if (kept)
        ++valid;
      if (p.next_mask != nullptr)
        p.next_mask[position] = (p.mask == nullptr || p.mask[position]) && p.level + 1 < num_levels;
    }
    const auto load_code = [&](int64_t level, int64_t code, int64_t d) {
      return load_floats<float, kWidth>(
          p.codebooks + level * p.codebook_stride + code * p.code_stride, d, p.code_channel_stride,
          p.channels, vectorizable.code);
    };
    const S* source =
        static_cast<const S*>(p.source) + offset_of(position, p.inner, p.source_strides);
    for (int64_t d = thread_tile.lane * kWidth; d < p.channels; d += tiling.team * kWidth) {
      Floats residual =
          load_floats<S, kWidth>(source, d, p.source_strides.channel, p.channels, vectorizable.x);
      Floats code{};
      if (kept) {
        code = load_code(p.level, index, d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          residual.values[j] -= code.values[j];
          error += residual.values[j] * residual.values[j];
        }
      }
      if (p.residual != nullptr)
        store_pack(p.residual + offset_of(position, p.inner, p.residual_strides) +
                       d * p.residual_strides.channel,
                   p.residual_strides.channel, p.channels - d, vectorizable.grad, residual);
      if (p.quantized == nullptr)
        continue;
      Floats total{};
      bool first = true;
      for (int64_t level = 0; level <= p.level; ++level) {
        const int64_t found = level < p.level ? indices[level] : kept ? index : -1;
        if (found < 0)
          continue;
        const Floats other = level < p.level ? load_code(level, found, d) : code;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          total.values[j] = first ? other.values[j] : total.values[j] + other.values[j];
        first = false;
      }
      Pack<T, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        result.values[j] = convert<T>(total.values[j]);
      store_pack(static_cast<T*>(p.quantized) + offset_of(position, p.inner, p.quantized_strides) +
                     d * p.quantized_strides.channel,
                 p.quantized_strides.channel, p.channels - d, vectorizable.out, result);
    }
  }
  PairOfSums total{error, static_cast<double>(valid)};
  if (!sum_over_blocks(total, p.partials, p.ticket))
    return;
  const auto [total_error, total_valid] = total;
  if (threadIdx.x == 0) {
    if (p.level == 0)
      *p.valid = static_cast<int64_t>(total_valid);
    const double elements = static_cast<double>(*p.valid) * static_cast<double>(p.channels);
    p.mse[p.level] = elements > 0 ? static_cast<float>(total_error / elements) : 0.0f;
  }
}

// How `quantized` passes its gradient to x.
enum class Passes { kUnchanged, kRotatedOnce, kRotatedByLevel };

template <typename T, Passes kPasses>
__global__ void __launch_bounds__(kThreads, 3) residual_backward_kernel(ResidualBackwardParams p,
                                                                        Tiling tiling,
                                                                        Vectorizable vectorizable,
                                                                        int packs) {
  constexpr int kWidth = kWidthOf<T>;
  using Floats = Pack<float, kWidth>;
  const ThreadTile thread_tile(tiling);
  const int64_t valid = *p.valid > 0 ? *p.valid : 1;
  const float factor = p.commitment_weight * 2.0f / static_cast<float>(valid * p.channels);
  // Component j of this thread's pack number k is kept at (k * kWidth + j) * kThreads.
  const int64_t size = int64_t{packs} * kWidth * kThreads;
  float* kept_residual = p.scratch != nullptr
                             ? p.scratch + blockIdx.x * 2 * size
                             : &shared_memory<float>() + kTeamShared / sizeof(float);
  kept_residual += threadIdx.x;
  float* kept_sums = kept_residual + size;

  for (int64_t tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    // Teams past the end take part in the sums of the others.
    const int64_t position = tile * tiling.positions + thread_tile.position;
    const bool inside = position < p.outer * p.inner;
    const TeamChannels channels{thread_tile.lane * kWidth, inside ? p.channels : 0,
                                tiling.team * kWidth};
    const int64_t* indices = p.indices + (inside ? position * p.levels : 0);
    const auto index_of = [&](int64_t level) {
      const int64_t index = inside && level < p.levels ? indices[level] : -1;
      return index < p.num_codes ? index : -1;
    };
    const T* x_row = static_cast<const T*>(p.x) + offset_of(position, p.inner, p.x_strides);
    const T* grad_row =
        static_cast<const T*>(p.grad_quantized) +
        (p.grad_quantized == nullptr ? 0 : offset_of(position, p.inner, p.grad_quantized_strides));
    const auto load_x = [&](int64_t d) {
      return load_floats<T, kWidth>(x_row, d, p.x_strides.channel, p.channels, vectorizable.x);
    };
    const auto load_grad = [&](int64_t d) {
      return load_floats<T, kWidth>(grad_row, d, p.grad_quantized_strides.channel, p.channels,
                                    vectorizable.grad);
    };
    const auto load_code = [&](int64_t level, int64_t index, int64_t d) {
      return load_floats<float, kWidth>(
          p.codebooks + level * p.codebook_stride + index * p.code_stride, d, p.code_channel_stride,
          p.channels, vectorizable.code);
    };
    const auto load_total = [&](int64_t d) {
      Floats total{};
      for (int64_t level = 0, index; (index = index_of(level)) >= 0; ++level) {
        const Floats code = load_code(level, index, d);
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          total.values[j] = level == 0 ? code.values[j] : total.values[j] + code.values[j];
      }
      return total;
    };
    // residual -= code, and sums += the gradient of the level's commitment loss.
    const auto subtract = [&](int64_t level, int64_t index, int64_t d, Floats& residual,
                              Floats& sums) {
      const Floats code = load_code(level, index, d);
      const float scale = p.grad_mse == nullptr ? 0.0f : p.grad_mse[level] * factor;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        residual.values[j] -= code.values[j];
        if (p.grad_mse != nullptr)
          sums.values[j] += scale * residual.values[j];
      }
    };
    T* out = static_cast<T*>(p.grad_x) + offset_of(position, p.inner, p.grad_x_strides);
    const auto store = [&](int64_t d, const Floats& sums) {
      Pack<T, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        result.values[j] = convert<T>(sums.values[j]);
      store_pack(out + d * p.grad_x_strides.channel, p.grad_x_strides.channel, p.channels - d,
                 vectorizable.out, result);
    };

    if constexpr (kPasses == Passes::kRotatedByLevel) {
      const auto keep = [&](float* kept, const Floats& values) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          kept[j * kThreads] = values.values[j];
      };
      const auto recall = [&](const float* kept) {
        Floats values;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          values.values[j] = kept[j * kThreads];
        return values;
      };
      const auto place_of = [&](int64_t d) {
        return (d - channels.first) / channels.step * kWidth * kThreads;
      };
      for (int64_t d = channels.first; d < channels.end; d += channels.step) {
        keep(kept_residual + place_of(d), load_x(d));
        keep(kept_sums + place_of(d), Floats{});
      }
      const auto load_residual = [&](int64_t d) { return recall(kept_residual + place_of(d)); };
      bool runs = true;
      for (int64_t level = 0; level < p.levels; ++level) {
        const int64_t index = runs ? index_of(level) : -1;
        runs = index >= 0;
        const Rotation rotation = rotation_of<kWidth>(
            tiling, thread_tile, channels, runs, load_residual,
            [&](int64_t d) { return load_code(level, index, d); }, load_grad);
        for (int64_t d = channels.first; runs && d < channels.end; d += channels.step) {
          Floats residual = load_residual(d);
          Floats sums = recall(kept_sums + place_of(d));
          const Floats grads = load_grad(d);
          const Floats codes = load_code(level, index, d);
#pragma unroll
          for (int j = 0; j < kWidth; ++j)
            sums.values[j] +=
                rotation.exists
                    ? rotation.gradient(grads.values[j], residual.values[j], codes.values[j])
                    : grads.values[j];
          subtract(level, index, d, residual, sums);
          keep(kept_residual + place_of(d), residual);
          keep(kept_sums + place_of(d), sums);
        }
      }
      for (int64_t d = channels.first; d < channels.end; d += channels.step)
        store(d, recall(kept_sums + place_of(d)));
    } else {
      const bool runs = index_of(0) >= 0;
      Rotation rotation;
      if constexpr (kPasses == Passes::kRotatedOnce)
        rotation =
            rotation_of<kWidth>(tiling, thread_tile, channels, runs, load_x, load_total, load_grad);
      int64_t levels = 0;
      if (p.per_quantizer) {
        while (index_of(levels) >= 0)
          ++levels;
      }
      for (int64_t d = channels.first; d < channels.end; d += channels.step) {
        Floats sums{};
        if (runs && p.grad_quantized != nullptr) {
          sums = load_grad(d);
          if (p.per_quantizer) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j)
              sums.values[j] *= static_cast<float>(levels);
          }
        }
        if (runs && (rotation.exists || p.grad_mse != nullptr)) {
          Floats residual = load_x(d);
          if (rotation.exists) {
            const Floats total = load_total(d);
#pragma unroll
            for (int j = 0; j < kWidth; ++j)
              sums.values[j] =
                  rotation.gradient(sums.values[j], residual.values[j], total.values[j]);
          }
          if (p.grad_mse != nullptr) {
            for (int64_t level = 0, index; (index = index_of(level)) >= 0; ++level)
              subtract(level, index, d, residual, sums);
          }
        }
        store(d, sums);
      }
    }
  }
}

template <typename Params>
bool codes_vectorizable(const Params& p, int width) {
  const Strides strides{p.code_stride, p.code_channel_stride, 0};
  return channels_vectorizable(p.codebooks, p.num_codes, p.channels, 1, strides, width) &&
         (p.levels == 1 || p.codebook_stride % width == 0);
}

struct BackwardShape {
  BackwardShape(const ResidualBackwardParams& p, int width)
      : tiling(tiling_of(p.outer, p.channels, p.inner, p.x_strides, width)),
        passes(!p.rotation || p.grad_quantized == nullptr ? Passes::kUnchanged
               : p.per_quantizer                          ? Passes::kRotatedByLevel
                                                          : Passes::kRotatedOnce) {
    const int64_t step = int64_t{tiling.team} * width;
    packs = static_cast<int>((p.channels + step - 1) / step);
    kept = passes == Passes::kRotatedByLevel ? sizeof(float[2][kThreads]) * packs * width : 0;
    in_shared = kTeamShared + kept <= kMaxShared;
  }

  Tiling tiling;
  Passes passes;
  int packs;    // of a thread for a position
  size_t kept;  // bytes for a block
  bool in_shared;
};

}  // namespace

void launch_residual_step(const ResidualStepParams& params,
                          DType source_type,
                          DType x_type,
                          cudaStream_t stream) {
  const ResidualStepParams& p = params;
  constexpr int kWidth = kWidthOf<float>;
  const Tiling tiling = tiling_of(p.outer, p.channels, p.inner, p.source_strides, kWidth);
  const auto check = [&](const void* data, Strides strides) {
    return channels_vectorizable(data, p.outer, p.channels, p.inner, strides, kWidth);
  };
  const Vectorizable vectorizable{check(p.source, p.source_strides), codes_vectorizable(p, kWidth),
                                  check(p.residual, p.residual_strides),
                                  check(p.quantized, p.quantized_strides)};
  const unsigned blocks = blocks_of(tiling);
  const auto run = [&]<typename S, typename T>() {
    launch(kStep, residual_step_kernel<S, T>, blocks > 0 ? blocks : 1, kThreads,
           sizeof(double[kWarps]), stream, p, tiling, vectorizable);
  };
  dispatch(kStep, x_type, [&]<typename T>() {
    if (source_type == DType::kFloat32) {
      run.template operator()<float, T>();
    } else {
      run.template operator()<T, T>();
    }
  });
}

int64_t residual_backward_scratch(const ResidualBackwardParams& params, DType x_type) {
  const BackwardShape shape(params, x_type == DType::kFloat32 ? kWidthOf<float> : kWidthOf<__half>);
  return shape.in_shared ? 0 : static_cast<int64_t>(shape.kept) * kScratchBlocks;
}

void launch_residual_backward(const ResidualBackwardParams& params,
                              DType x_type,
                              cudaStream_t stream) {
  dispatch(kBackward, x_type, [&]<typename T>() {
    constexpr int kWidth = kWidthOf<T>;
    const ResidualBackwardParams& p = params;
    const BackwardShape shape(p, kWidth);
    const auto check = [&](const void* data, Strides strides, int width) {
      return channels_vectorizable(data, p.outer, p.channels, p.inner, strides, width);
    };
    const Vectorizable vectorizable{check(p.x, p.x_strides, kWidth), codes_vectorizable(p, kWidth),
                                    check(p.grad_quantized, p.grad_quantized_strides, kWidth),
                                    check(p.grad_x, p.grad_x_strides, kWidth)};
    unsigned blocks = blocks_of(shape.tiling);
    if (blocks == 0)
      return;
    if (!shape.in_shared && blocks > kScratchBlocks)
      blocks = kScratchBlocks;
    const auto run = [&]<Passes kPasses>() {
      launch(kBackward, residual_backward_kernel<T, kPasses>, blocks, kThreads,
             kTeamShared + (shape.in_shared ? shape.kept : 0), stream, p, shape.tiling,
             vectorizable, shape.packs);
    };
    switch (shape.passes) {
      case Passes::kUnchanged:
        return run.template operator()<Passes::kUnchanged>();
      case Passes::kRotatedOnce:
        return run.template operator()<Passes::kRotatedOnce>();
      case Passes::kRotatedByLevel:
        return run.template operator()<Passes::kRotatedByLevel>();
    }
  });
}

}  // namespace genperf
