// SPDX-License-Identifier: Apache-2.0
// Finite scalar and lookup-free quantization.
//
// A block takes a tile of positions with all their channels. Its threads go through the elements in
// the order of memory, 16 bytes at a time where the layout allows, so that warps touch whole lines
// in both layouts however few the channels are; digits meet in shared memory, where a thread for
// each position adds up the index.
#include "implicit_codes.h"

#include "positions.h"

namespace genperf {
namespace {

constexpr int kThreads = 256;
constexpr int kPositions = 128;  // in a tile
constexpr unsigned kBlocks = 4096;

struct Table {
  Level levels[kMaxChannels];
};

template <typename Params>
Table table_of(const Params& p) {
  Table table{};
  uint64_t basis = 1;  // wraps where no index is asked for
  for (int64_t d = 0; d < p.channels; ++d) {
    table.levels[d] = level_of(p.levels[d], p.symmetric, p.hard, static_cast<int64_t>(basis));
    basis *= static_cast<uint64_t>(p.levels[d]);
  }
  return table;
}

// How the elements of a tile are numbered: along channels where those lie together, else along
// positions.
struct Tiling {
  int64_t positions;
  int64_t inner;
  int channels;
  bool channels_last;
};

// The runs of kWidth elements of the tensors that may be moved at once.
struct Together {
  bool a, b, c;
};

// Where positions lie back to back, or in rows of whole runs, a run is contiguous in a tensor of
// these strides.
bool runs_together(const void* data,
                   const Tiling& tiling,
                   int64_t outer,
                   Strides strides,
                   int width) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0)
    return false;
  if (tiling.channels_last) {
    const int64_t distance = tiling.inner == 1 ? strides.outer : strides.inner;
    const bool one_row =
        tiling.inner == 1 || outer == 1 || strides.outer == tiling.inner * strides.inner;
    return strides.channel == 1 && distance == tiling.channels && one_row;
  }
  return strides.inner == 1 && tiling.inner % width == 0 && strides.channel % width == 0 &&
         (outer == 1 || strides.outer % width == 0);
}

template <typename Params>
Tiling tiling_of(const Params& p) {
  const bool last = p.inner == 1 || p.channels == 1 || p.x_strides.channel <= p.x_strides.inner;
  return {p.outer * p.inner, p.inner, static_cast<int>(p.channels), last};
}

unsigned blocks_of(const Tiling& tiling) {
  const int64_t tiles = (tiling.positions + kPositions - 1) / kPositions;
  return static_cast<unsigned>(tiles < kBlocks ? tiles : kBlocks);
}

struct Element {
  int position;  // in the tile
  int channel;
};

__device__ inline Element element_of(int number, const Tiling& tiling) {
  return tiling.channels_last ? Element{number / tiling.channels, number % tiling.channels}
                              : Element{number % kPositions, number / kPositions};
}

__device__ inline int64_t place_of(int64_t first,
                                   Element e,
                                   const Tiling& tiling,
                                   Strides strides) {
  return offset_of(first + e.position, tiling.inner, strides) + e.channel * strides.channel;
}

// Calls run(first position, number of positions) for the block's tiles.
template <typename Run>
__device__ void for_each_tile(const Tiling& tiling, Run run) {
  for (int64_t first = int64_t{blockIdx.x} * kPositions; first < tiling.positions;
       first += int64_t{gridDim.x} * kPositions) {
    const int64_t left = tiling.positions - first;
    run(first, static_cast<int>(left < kPositions ? left : kPositions));
  }
}

template <typename T, int kWidth, typename Code>
__device__ void quantize_tiles(const T* x,
                               T* out,
                               int64_t* indices,
                               const Tiling& tiling,
                               Strides x_strides,
                               Strides out_strides,
                               int32_t* digits,
                               const int64_t* basis,
                               Code code) {
  for_each_tile(tiling, [&](int64_t first, int count) {
    const int elements = (tiling.channels_last ? count : kPositions) * tiling.channels;
    for (int n = threadIdx.x * kWidth; n < elements; n += kThreads * kWidth) {
      const Element e = element_of(n, tiling);
      // A run never leaves the tile half way: where runs are wide, rows are whole runs.
      if (e.position >= count)
        continue;
      const int64_t left = tiling.channels_last ? elements - n : count - e.position;
      const bool whole = kWidth > 1 && left >= kWidth;
      const auto xs =
          load_pack<T, kWidth>(x + place_of(first, e, tiling, x_strides), 1, left, whole);
      Pack<T, kWidth> values;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (j >= left) {
          values.values[j] = convert<T>(0.0f);
          continue;
        }
        const Element at = element_of(tiling.channels_last ? n + j : n, tiling);
        const int position = at.position + (tiling.channels_last ? 0 : j);
        const Coded<Scalar> coded = code(to_float(xs.values[j]), at.channel);
        values.values[j] = convert<T>(coded.value);
        if (indices != nullptr)
          digits[position * tiling.channels + at.channel] = static_cast<int32_t>(coded.digit);
      }
      store_pack(out + place_of(first, e, tiling, out_strides), 1, left, whole, values);
    }
    if (indices == nullptr)
      return;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      int64_t index = 0;
      for (int d = 0; d < tiling.channels; ++d)
        index += digits[threadIdx.x * tiling.channels + d] * basis[d];
      indices[first + threadIdx.x] = index;
    }
    __syncthreads();
  });
}

struct Shared {
  int64_t basis[kMaxChannels];
  float constants[7][kMaxChannels];  // of a Level, in its order

  // [kPositions, D], behind this.
  __device__ int32_t* digits() { return reinterpret_cast<int32_t*>(this + 1); }
};

size_t shared_bytes(const Tiling& tiling, bool indexed) {
  return sizeof(Shared) + (indexed ? sizeof(int32_t) * kPositions * tiling.channels : 0);
}

__device__ inline void copy_levels(Shared& shared, const Table& table, int channels) {
  if (static_cast<int>(threadIdx.x) < channels) {
    const int d = threadIdx.x;
    const Level level = table.levels[d];
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
__global__ void __launch_bounds__(kThreads)
    finite_scalar_quantize_kernel(FiniteScalarQuantizeParams p, Tiling tiling, Table table) {
  Shared& shared = shared_memory<Shared>();
  copy_levels(shared, table, tiling.channels);
  const bool symmetric = p.symmetric;
  const bool hard = p.hard;
  quantize_tiles<T, kWidth>(
      static_cast<const T*>(p.x), static_cast<T*>(p.quantized), p.indices, tiling, p.x_strides,
      p.quantized_strides, shared.digits(), shared.basis, [&](float x, int d) {
        const auto& c = shared.constants;
        return quantize_level<Scalar>(x, {c[0][d], c[1][d], c[2][d], c[3][d], c[4][d], c[5][d]},
                                      symmetric, hard);
      });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    lookup_free_quantize_kernel(LookupFreeQuantizeParams p, Tiling tiling) {
  Shared& shared = shared_memory<Shared>();
  if (static_cast<int>(threadIdx.x) < tiling.channels)
    shared.basis[threadIdx.x] = int64_t{1} << (tiling.channels - 1 - threadIdx.x);
  __syncthreads();
  quantize_tiles<T, kWidth>(static_cast<const T*>(p.x), static_cast<T*>(p.quantized), p.indices,
                            tiling, p.x_strides, p.quantized_strides, shared.digits(), shared.basis,
                            [&](float x, int) { return quantize_sign<Scalar>(x, p.size); });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    finite_scalar_quantize_backward_kernel(FiniteScalarQuantizeBackwardParams p,
                                           Tiling tiling,
                                           Table table) {
  Shared& shared = shared_memory<Shared>();
  copy_levels(shared, table, tiling.channels);
  const T* const x = static_cast<const T*>(p.x);
  const T* const grad = static_cast<const T*>(p.grad_quantized);
  T* const out = static_cast<T*>(p.grad_x);
  for_each_tile(tiling, [&](int64_t first, int count) {
    const int elements = (tiling.channels_last ? count : kPositions) * tiling.channels;
    for (int n = threadIdx.x * kWidth; n < elements; n += kThreads * kWidth) {
      const Element e = element_of(n, tiling);
      if (e.position >= count)
        continue;
      const int64_t left = tiling.channels_last ? elements - n : count - e.position;
      const bool whole = kWidth > 1 && left >= kWidth;
      const auto xs =
          load_pack<T, kWidth>(x + place_of(first, e, tiling, p.x_strides), 1, left, whole);
      const auto grads = load_pack<T, kWidth>(
          grad + place_of(first, e, tiling, p.grad_quantized_strides), 1, left, whole);
      Pack<T, kWidth> values;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int d = tiling.channels_last ? (n + j) % tiling.channels : e.channel;
        const float slope = level_slope<Scalar>(to_float(xs.values[j]), shared.constants[0][d],
                                                shared.constants[6][d], p.hard);
        values.values[j] = convert<T>(to_float(grads.values[j]) * slope);
      }
      store_pack(out + place_of(first, e, tiling, p.grad_x_strides), 1, left, whole, values);
    }
  });
}

// The gradient through x / |x|, which loses its part along x; a thread for each position.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lookup_free_quantize_backward_kernel(LookupFreeQuantizeBackwardParams p) {
  constexpr float kLeast = 1e-12f;  // as torch.nn.functional.normalize
  const int64_t positions = p.outer * p.inner;
  for (int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x; position < positions;
       position += int64_t{gridDim.x} * kThreads) {
    const T* x = static_cast<const T*>(p.x) + offset_of(position, p.inner, p.x_strides);
    const T* grad = static_cast<const T*>(p.grad_quantized) +
                    offset_of(position, p.inner, p.grad_quantized_strides);
    T* out = static_cast<T*>(p.grad_x) + offset_of(position, p.inner, p.grad_x_strides);
    // In double: the square of what is not yet too short would be too small for a float.
    double square = 0;
    double product = 0;
    for (int64_t d = 0; d < p.channels; ++d) {
      const float value = to_float(x[d * p.x_strides.channel]);
      square += static_cast<double>(value) * value;
      product += static_cast<double>(value) * to_float(grad[d * p.grad_quantized_strides.channel]);
    }
    const double norm = sqrt(square);
    const float factor = static_cast<float>(p.scale / (norm < kLeast ? kLeast : norm));
    const float along = norm < kLeast ? 0.0f : static_cast<float>(product / square);
    for (int64_t d = 0; d < p.channels; ++d) {
      const float value = to_float(grad[d * p.grad_quantized_strides.channel]) -
                          along * to_float(x[d * p.x_strides.channel]);
      out[d * p.grad_x_strides.channel] = convert<T>(factor * value);
    }
  }
}

}  // namespace

void launch_finite_scalar_quantize(const FiniteScalarQuantizeParams& p,
                                   DType type,
                                   cudaStream_t stream) {
  constexpr const char* kOp = "finite_scalar_quantize";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const Tiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kThreads, shared_bytes(tiling, p.indices != nullptr),
             stream, p, tiling, table_of(p));
    };
    if (runs_together(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_together(p.quantized, tiling, p.outer, p.quantized_strides, kWidth))
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
    const Tiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kThreads, shared_bytes(tiling, false), stream, p,
             tiling, table_of(p));
    };
    if (runs_together(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_together(p.grad_quantized, tiling, p.outer, p.grad_quantized_strides, kWidth) &&
        runs_together(p.grad_x, tiling, p.outer, p.grad_x_strides, kWidth))
      run(finite_scalar_quantize_backward_kernel<T, kWidth>);
    else
      run(finite_scalar_quantize_backward_kernel<T, 1>);
  });
}

void launch_lookup_free_quantize(const LookupFreeQuantizeParams& p,
                                 DType type,
                                 cudaStream_t stream) {
  constexpr const char* kOp = "lookup_free_quantize";
  dispatch(kOp, type, [&]<typename T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const Tiling tiling = tiling_of(p);
    if (tiling.positions == 0)
      return;
    const auto run = [&](auto kernel) {
      launch(kOp, kernel, blocks_of(tiling), kThreads, shared_bytes(tiling, true), stream, p,
             tiling);
    };
    if (runs_together(p.x, tiling, p.outer, p.x_strides, kWidth) &&
        runs_together(p.quantized, tiling, p.outer, p.quantized_strides, kWidth))
      run(lookup_free_quantize_kernel<T, kWidth>);
    else
      run(lookup_free_quantize_kernel<T, 1>);
  });
}

void launch_lookup_free_quantize_backward(const LookupFreeQuantizeBackwardParams& p,
                                          DType type,
                                          cudaStream_t stream) {
  constexpr const char* kOp = "lookup_free_quantize_backward";
  const int64_t blocks = (p.outer * p.inner + kThreads - 1) / kThreads;
  if (blocks == 0)
    return;
  dispatch(kOp, type, [&]<typename T>() {
    launch(kOp, lookup_free_quantize_backward_kernel<T>,
           static_cast<unsigned>(blocks < kBlocks ? blocks : kBlocks), kThreads, 0, stream, p);
  });
}

}  // namespace genperf
