// SPDX-License-Identifier: Apache-2.0
//
// Finite scalar quantization: bounds each channel and rounds it to a grid; backward is the gradient
// of the bound.
//
// With 3, 4, 5, 6 or 8 channels, tanh, and without `symmetric`, a thread has all channels of a
// position in registers, and the constants of the channels are operands of its instructions. Other
// cases take the tiles of implicit_codes.h.
#include "finite_scalar_quantize.h"

#include "implicit_codes.h"

namespace genperf {
namespace {

constexpr int64_t kMaxPositions = INT32_MAX - kCodeThreads;  // of the kernels for few channels

struct Table {
  ChannelGrid levels[kMaxChannels];
};

template <typename Params>
Table table_of(const Params& p) {
  Table table{};
  uint64_t basis = 1;  // may wrap if no indices are wanted
  for (int64_t d = 0; d < p.channels; ++d) {
    table.levels[d] = channel_grid(p.levels[d], p.symmetric, p.hard, static_cast<int64_t>(basis));
    basis *= static_cast<uint64_t>(p.levels[d]);
  }
  return table;
}

__device__ inline void load_constants(CodeShared& shared, const Table& table, int channels) {
  if (static_cast<int>(threadIdx.x) < channels) {
    const int d = threadIdx.x;
    const ChannelGrid level = table.levels[d];
    const float constants[] = {level.shift,   level.half, level.offset, level.middle,
                               level.divisor, level.top,  level.slope};
#pragma unroll
    for (int i = 0; i < 7; ++i)
      shared.constants[i][d] = constants[i];
    shared.basis[d] = level.basis;
  }
  __syncthreads();
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kCodeThreads)
    finite_scalar_quantize_kernel(FiniteScalarQuantizeParams p, CodeTiling tiling, Table table) {
  CodeShared& shared = shared_memory<CodeShared>();
  load_constants(shared, table, tiling.channels);
  const bool symmetric = p.symmetric;
  const bool hard = p.hard;
  quantize_tiles<T, kWidth>(
      static_cast<const T*>(p.x), static_cast<T*>(p.quantized), p.indices, tiling, p.x_strides,
      p.quantized_strides, shared.digits(), shared.basis, [&](float x, int d) {
        const auto& c = shared.constants;
        return quantize_channel<Scalar>(x, {c[0][d], c[1][d], c[2][d], c[3][d], c[4][d], c[5][d]},
                                        symmetric, hard);
      });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kCodeThreads)
    finite_scalar_quantize_backward_kernel(FiniteScalarQuantizeBackwardParams p,
                                           CodeTiling tiling,
                                           Table table) {
  CodeShared& shared = shared_memory<CodeShared>();
  load_constants(shared, table, tiling.channels);
  const T* const x = static_cast<const T*>(p.x);
  const T* const grad = static_cast<const T*>(p.grad_quantized);
  T* const out = static_cast<T*>(p.grad_x);
  for_each_tile(tiling, [&](int64_t first, int count) {
    const int elements = (tiling.channels_last ? count : kCodePositions) * tiling.channels;
    for (int n = threadIdx.x * kWidth; n < elements; n += kCodeThreads * kWidth) {
      const TileElement e = element_of(n, tiling);
      if (e.position >= count)
        continue;
      const int64_t left = tiling.channels_last ? elements - n : count - e.position;
      const bool full = kWidth > 1 && left >= kWidth;
      const auto xs =
          load_pack<T, kWidth>(x + element_offset(first, e, tiling, p.x_strides), 1, left, full);
      const auto grads = load_pack<T, kWidth>(
          grad + element_offset(first, e, tiling, p.grad_quantized_strides), 1, left, full);
      Pack<T, kWidth> values;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int d = tiling.channels_last ? element_of(n + j, tiling).channel : e.channel;
        const float slope = channel_slope<Scalar>(to_float(xs.values[j]), shared.constants[0][d],
                                                  shared.constants[6][d], p.hard);
        values.values[j] = convert<T>(to_float(grads.values[j]) * slope);
      }
      store_pack(out + element_offset(first, e, tiling, p.grad_x_strides), 1, left, full, values);
    }
  });
}

struct FewChannel {
  float shift, half, offset, middle, divisor, inverse, top, slope;
  uint32_t basis;
};

template <int kChannels>
struct FewChannels {
  FewChannel channel[kChannels];
  uint32_t origin;  // of the index
  uint32_t positions;
  FastDivisor inner;
};

// The bits of an integer below 2^22 plus 1.5 * 2^23 are those of this number plus the integer.
constexpr uint32_t kWholeBits = 0x4b400000;

template <int kChannels, typename Params>
FewChannels<kChannels> few_channels(const Params& p) {
  const Table table = table_of(p);
  FewChannels<kChannels> few{};
  for (int d = 0; d < kChannels; ++d) {
    const ChannelGrid& level = table.levels[d];
    const auto basis = static_cast<uint32_t>(level.basis);
    few.channel[d] = {level.shift,          level.half, level.offset, level.middle, level.divisor,
                      1.0f / level.divisor, level.top,  level.slope,  basis};
    few.origin -= kWholeBits * basis;
  }
  few.positions = static_cast<uint32_t>(p.outer * p.inner);
  few.inner = FastDivisor::of(p.inner);
  return few;
}

// The widest access that divides the channels of a position, in elements.
template <typename T, int kChannels>
constexpr int kPieceOf = kChannels * sizeof(T) % 16 == 0 ? 16 / sizeof(T)
                         : kChannels % 4 == 0            ? 4
                         : kChannels % 2 == 0            ? 2
                                                         : 1;

// The channels of a position, loaded and stored in pieces.
template <typename T, int kChannels, bool kContiguous>
struct PositionChannels {
  static __device__ void load(const T* data, int64_t stride, float (&values)[kChannels]) {
    constexpr int kPiece = kPieceOf<T, kChannels>;
    if constexpr (kContiguous) {
#pragma unroll
      for (int first = 0; first < kChannels; first += kPiece) {
        const auto pack = *reinterpret_cast<const Pack<T, kPiece>*>(data + first);
#pragma unroll
        for (int j = 0; j < kPiece; ++j)
          values[first + j] = to_float(pack.values[j]);
      }
    } else {
#pragma unroll
      for (int d = 0; d < kChannels; ++d)
        values[d] = to_float(data[d * stride]);
    }
  }

  static __device__ void store(T* data, int64_t stride, const float (&values)[kChannels]) {
    constexpr int kPiece = kPieceOf<T, kChannels>;
    if constexpr (kContiguous) {
#pragma unroll
      for (int first = 0; first < kChannels; first += kPiece) {
        Pack<T, kPiece> pack;
#pragma unroll
        for (int j = 0; j < kPiece; ++j)
          pack.values[j] = convert<T>(values[first + j]);
        *reinterpret_cast<Pack<T, kPiece>*>(data + first) = pack;
      }
    } else {
#pragma unroll
      for (int d = 0; d < kChannels; ++d)
        data[d * stride] = convert<T>(values[d]);
    }
  }
};

template <typename T, int kChannels, bool kContiguous>
__global__ void __launch_bounds__(kCodeThreads)
    finite_scalar_quantize_few_kernel(FiniteScalarQuantizeParams p, FewChannels<kChannels> few) {
  using Channels = PositionChannels<T, kChannels, kContiguous>;
  const uint32_t position = blockIdx.x * kCodeThreads + threadIdx.x;
  if (position >= few.positions)
    return;
  float values[kChannels];
  Channels::load(static_cast<const T*>(p.x) + offset_of(position, few.inner, p.x_strides),
                 p.x_strides.channel, values);
  uint32_t index = few.origin;
#pragma unroll
  for (int d = 0; d < kChannels; ++d) {
    const FewChannel& c = few.channel[d];
    const auto coded = quantize_channel<Scalar>(
        values[d],
        {c.shift, c.half, c.offset, c.middle, Divisor<Scalar>(c.divisor, c.inverse), c.top}, false,
        false);
    values[d] = coded.value;
    index += Scalar::bits(coded.digit + 12582912.0f) * c.basis;
  }
  Channels::store(
      static_cast<T*>(p.quantized) + offset_of(position, few.inner, p.quantized_strides),
      p.quantized_strides.channel, values);
  if (p.indices != nullptr)
    p.indices[position] = index;
}

template <typename T, int kChannels, bool kContiguous>
__global__ void __launch_bounds__(kCodeThreads)
    finite_scalar_quantize_backward_few_kernel(FiniteScalarQuantizeBackwardParams p,
                                               FewChannels<kChannels> few) {
  using Channels = PositionChannels<T, kChannels, kContiguous>;
  const uint32_t position = blockIdx.x * kCodeThreads + threadIdx.x;
  if (position >= few.positions)
    return;
  float values[kChannels], grads[kChannels];
  Channels::load(static_cast<const T*>(p.x) + offset_of(position, few.inner, p.x_strides),
                 p.x_strides.channel, values);
  Channels::load(static_cast<const T*>(p.grad_quantized) +
                     offset_of(position, few.inner, p.grad_quantized_strides),
                 p.grad_quantized_strides.channel, grads);
#pragma unroll
  for (int d = 0; d < kChannels; ++d) {
    const FewChannel& c = few.channel[d];
    values[d] = grads[d] * channel_slope<Scalar>(values[d], c.shift, c.slope, false);
  }
  Channels::store(static_cast<T*>(p.grad_x) + offset_of(position, few.inner, p.grad_x_strides),
                  p.grad_x_strides.channel, values);
}

// Whether the kernels for few channels compute this: the index has 31 bits.
template <typename Params>
bool fits_few_kernel(const Params& p, bool indexed) {
  double codes = 1;  // may be more than an integer holds
  for (int64_t d = 0; d < p.channels; ++d)
    codes *= p.levels[d];
  return !p.hard && p.outer * p.inner <= kMaxPositions && (!indexed || codes <= INT32_MAX);
}

// Calls run<kChannels>() with the number of channels, if there is a kernel for it.
template <typename Run>
bool with_few_channels(int64_t channels, Run run) {
  const auto tried = [&]<int kChannels>() {
    if (channels == kChannels)
      run.template operator()<kChannels>();
    return channels == kChannels;
  };
  return tried.template operator()<3>() || tried.template operator()<4>() ||
         tried.template operator()<5>() || tried.template operator()<6>() ||
         tried.template operator()<8>();
}

unsigned position_blocks(const CodeTiling& tiling) {
  return static_cast<unsigned>((tiling.positions + kCodeThreads - 1) / kCodeThreads);
}

template <typename T, int kChannels, typename Params>
bool contiguous_channels(const Params& p, const void* data, Strides strides) {
  return channels_vectorizable(data, p.outer, p.channels, p.inner, strides, kPieceOf<T, kChannels>);
}

}  // namespace

void launch_finite_scalar_quantize(const FiniteScalarQuantizeParams& p,
                                   DType type,
                                   cudaStream_t stream) {
  constexpr const char* kOp = "finite_scalar_quantize";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const CodeTiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto few = [&]<int kChannels>() {
      const bool contiguous =
          contiguous_channels<T, kChannels>(p, p.x, p.x_strides) &&
          contiguous_channels<T, kChannels>(p, p.quantized, p.quantized_strides);
      const auto kernel = contiguous ? finite_scalar_quantize_few_kernel<T, kChannels, true>
                                     : finite_scalar_quantize_few_kernel<T, kChannels, false>;
      launch(kOp, kernel, position_blocks(tiling), kCodeThreads, 0, stream, p,
             few_channels<kChannels>(p));
    };
    if (!p.symmetric && fits_few_kernel(p, p.indices != nullptr) &&
        with_few_channels(p.channels, few))
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kCodeThreads,
             shared_bytes(tiling, p.indices != nullptr), stream, p, tiling, table_of(p));
    };
    if (runs_vectorizable(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_vectorizable(p.quantized, tiling, p.outer, p.quantized_strides, kWidth))
      run(finite_scalar_quantize_kernel<T, kWidth>);
    else
      run(finite_scalar_quantize_kernel<T, 1>);
  });
}

void launch_finite_scalar_quantize_backward(const FiniteScalarQuantizeBackwardParams& p,
                                            DType type,
                                            cudaStream_t stream) {
  constexpr const char* kOp = "finite_scalar_quantize_backward";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const CodeTiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto few = [&]<int kChannels>() {
      const bool contiguous =
          contiguous_channels<T, kChannels>(p, p.x, p.x_strides) &&
          contiguous_channels<T, kChannels>(p, p.grad_quantized, p.grad_quantized_strides) &&
          contiguous_channels<T, kChannels>(p, p.grad_x, p.grad_x_strides);
      const auto kernel = contiguous
                              ? finite_scalar_quantize_backward_few_kernel<T, kChannels, true>
                              : finite_scalar_quantize_backward_few_kernel<T, kChannels, false>;
      launch(kOp, kernel, position_blocks(tiling), kCodeThreads, 0, stream, p,
             few_channels<kChannels>(p));
    };
    if (fits_few_kernel(p, false) && with_few_channels(p.channels, few))
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kCodeThreads, shared_bytes(tiling, false), stream, p,
             tiling, table_of(p));
    };
    if (runs_vectorizable(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_vectorizable(p.grad_quantized, tiling, p.outer, p.grad_quantized_strides, kWidth) &&
        runs_vectorizable(p.grad_x, tiling, p.outer, p.grad_x_strides, kWidth))
      run(finite_scalar_quantize_backward_kernel<T, kWidth>);
    else
      run(finite_scalar_quantize_backward_kernel<T, 1>);
  });
}

}  // namespace genperf
