// SPDX-License-Identifier: Apache-2.0
//
// Shared by the ops over samples. Their tensors are [B, rows, columns] with any strides, and
// element (r, c) of a sample has number r * columns + c.
//
// A thread processes units of 4 or 8 consecutive elements, a team of threads processes a part of a
// sample, and each part gives one partial sum in double. The partition depends only on the shape
// and the strides, so sums are the same on every device and in every run.
#pragma once

#include "last_block.h"

namespace genperf {

struct SampleShape {
  int64_t batch;
  int64_t rows;
  int64_t columns;
};

// Strides are in elements.
template <typename Data>
struct SampleTensor {
  Data* data;  // [B, rows, columns], or null if absent
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;
  bool float32;       // even if T is narrower
  bool vectorizable;  // units are contiguous and aligned; set by plan_samples()
};
using SampleInput = SampleTensor<const void>;
using SampleOutput = SampleTensor<void>;

}  // namespace genperf

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

#include "noise.h"

namespace genperf {

constexpr int kSampleThreads = 256;

// Elements per access, for units of kWidth elements.
template <typename T, int kWidth>
constexpr int kVectorOf = kWidth * sizeof(T) < 16 ? kWidth : 16 / sizeof(T);

struct SamplePlan {
  SampleShape shape;
  int64_t elements;  // per sample
  uint32_t units;    // per sample; the range of the threads' counter, with some numbers unused if
                     // rows_fast
  uint32_t parts;    // per sample
  uint32_t per_thread;  // units
  int team;             // threads per part, a power of two
  bool rows_fast;       // adjacent threads process adjacent rows
  bool plain;           // every unit is full and contiguous, and all tensors are of type T
  unsigned blocks;
};

// Plans the kernel for the given tensors, and merges dimensions that are one in memory.
template <typename T, int kWidth, typename... Tensors>
SamplePlan plan_samples(const char* op, SampleShape shape, Tensors&... tensors) {
  const bool one_row = ((tensors.data == nullptr || shape.rows <= 1 ||
                         tensors.row_stride == shape.columns * tensors.column_stride) &&
                        ...);
  if (!one_row && shape.columns == 1)
    ((tensors.column_stride = tensors.row_stride), ...);
  if (one_row || shape.columns == 1)
    shape = {shape.batch, 1, shape.rows * shape.columns};

  SamplePlan plan{};
  plan.shape = shape;
  plan.elements = shape.rows * shape.columns;
  const auto is_vectorizable = [&](const auto& tensor) {
    const int64_t vector = tensor.float32 ? kVectorOf<float, kWidth> : kVectorOf<T, kWidth>;
    const size_t bytes = vector * (tensor.float32 ? sizeof(float) : sizeof(T));
    return tensor.column_stride == 1 && reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0 &&
           (shape.rows == 1 || (tensor.row_stride % vector == 0 && shape.columns % kWidth == 0)) &&
           (shape.batch == 1 || tensor.batch_stride % vector == 0);
  };
  ((tensors.vectorizable = is_vectorizable(tensors)), ...);
  plan.rows_fast = shape.rows > 1 && ((tensors.data != nullptr && !tensors.vectorizable &&
                                       tensors.row_stride < tensors.column_stride) ||
                                      ...);

  plan.plain = shape.rows == 1 && plan.elements % kWidth == 0 &&
               ((tensors.data == nullptr ||
                 (tensors.vectorizable && (tensors.float32 == std::is_same_v<T, float>))) &&
                ...);

  const int64_t units = plan.rows_fast ? shape.rows * ((shape.columns + kWidth - 1) / kWidth)
                                       : (plan.elements + kWidth - 1) / kWidth;
  if (units > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": a sample is too large");
  plan.units = static_cast<uint32_t>(units);
  // First enough blocks to fill a GPU, then more units per thread to amortize the fixed costs.
  const int64_t spare = units * shape.batch / (int64_t{1024} * kSampleThreads);
  plan.per_thread = static_cast<uint32_t>(spare < 1 ? 1 : spare > 8 ? 8 : spare);
  plan.team = 1;
  while (plan.team < kSampleThreads && int64_t{plan.team} * plan.per_thread < units)
    plan.team *= 2;
  const int64_t part = int64_t{plan.team} * plan.per_thread;
  plan.parts = static_cast<uint32_t>(units > part ? (units + part - 1) / part : 1);
  const int64_t teams = kSampleThreads / plan.team;
  const int64_t blocks = (shape.batch * plan.parts + teams - 1) / teams;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": too many samples");
  plan.blocks = static_cast<unsigned>(blocks);
  return plan;
}

inline int64_t partials_of(const SamplePlan& plan) {
  return plan.parts > 1 ? plan.shape.batch * plan.parts : 0;
}

// `count` consecutive elements starting at number `first`, which is element (row, column).
struct SampleUnit {
  int64_t sample;
  int64_t first;
  int64_t row;
  int64_t column;
  int count;
};

// The part of a sample that this thread processes.
struct SampleThreadTile {
  int64_t sample;
  uint32_t part;
  uint32_t lane;  // in the team

  __device__ explicit SampleThreadTile(const SamplePlan& plan) {
    const uint32_t team = plan.team;
    lane = threadIdx.x % team;
    if (plan.parts > 1) {
      sample = blockIdx.x / plan.parts;
      part = blockIdx.x % plan.parts;
    } else {
      sample = int64_t{blockIdx.x} * (kSampleThreads / team) + threadIdx.x / team;
      part = 0;
    }
  }
};

// Calls body(unit) for each unit of this thread. kPlain says that the plan is plain.
template <int kWidth, bool kPlain = false, typename Body>
__device__ void for_units(const SamplePlan& plan, const SampleThreadTile& thread_tile, Body body) {
  if (thread_tile.sample >= plan.shape.batch)
    return;
  uint32_t number = thread_tile.part * (plan.team * plan.per_thread) + thread_tile.lane;
  for (uint32_t i = 0; i < plan.per_thread && number < plan.units; ++i, number += plan.team) {
    SampleUnit unit{};
    unit.sample = thread_tile.sample;
    if constexpr (kPlain) {
      unit.first = unit.column = int64_t{number} * kWidth;
      unit.count = kWidth;
      body(unit);
      continue;
    }
    if (plan.rows_fast) {
      // A unit belongs to the row in which it starts, even if it ends in a later row.
      const auto rows = static_cast<uint32_t>(plan.shape.rows);
      unit.row = number % rows;
      const int64_t begin = unit.row * plan.shape.columns;
      unit.first = (begin + kWidth - 1) / kWidth * kWidth + int64_t{number / rows} * kWidth;
      unit.column = unit.first - begin;
      if (unit.column >= plan.shape.columns)
        continue;
    } else {
      unit.first = int64_t{number} * kWidth;
      if (plan.shape.rows > 1) {
        unit.row = unit.first / plan.shape.columns;
        unit.column = unit.first - unit.row * plan.shape.columns;
      } else {
        unit.column = unit.first;
      }
    }
    const int64_t left = plan.elements - unit.first;
    unit.count = left < kWidth ? static_cast<int>(left) : kWidth;
    body(unit);
  }
}

// The memory offsets of the elements of a unit, one after another.
class SampleCursor {
 public:
  template <typename Data>
  __device__ SampleCursor(const SampleTensor<Data>& tensor,
                          const SamplePlan& plan,
                          const SampleUnit& unit)
      : offset_(unit.sample * tensor.batch_stride + unit.row * tensor.row_stride +
                unit.column * tensor.column_stride),
        left_(plan.shape.columns - unit.column),
        columns_(plan.shape.columns),
        step_(tensor.column_stride),
        wrap_(tensor.row_stride - plan.shape.columns * tensor.column_stride) {}

  __device__ int64_t offset() const { return offset_; }
  __device__ void advance() {
    offset_ += step_;
    if (--left_ == 0) {
      offset_ += wrap_;
      left_ = columns_;
    }
  }

 private:
  int64_t offset_;
  int64_t left_;  // columns left in this row
  int64_t columns_;
  int64_t step_;
  int64_t wrap_;
};

template <typename T, int kWidth>
__device__ void load_vectors(const T* data, float (&values)[kWidth]) {
  constexpr int kVector = kVectorOf<T, kWidth>;
#pragma unroll
  for (int first = 0; first < kWidth; first += kVector) {
    const auto vector = *reinterpret_cast<const Pack<T, kVector>*>(data + first);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      values[first + j] = to_float(vector.values[j]);
  }
}

template <typename T, int kWidth>
__device__ void store_vectors(T* data, const float (&values)[kWidth]) {
  constexpr int kVector = kVectorOf<T, kWidth>;
#pragma unroll
  for (int first = 0; first < kWidth; first += kVector) {
    Pack<T, kVector> vector;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      vector.values[j] = convert<T>(values[first + j]);
    *reinterpret_cast<Pack<T, kVector>*>(data + first) = vector;
  }
}

template <typename T, int kWidth>
__device__ void load_as(const SampleInput& tensor,
                        const SamplePlan& plan,
                        const SampleUnit& unit,
                        float (&values)[kWidth]) {
  const T* data = static_cast<const T*>(tensor.data);
  SampleCursor cursor(tensor, plan, unit);
  if (tensor.vectorizable && unit.count == kWidth) {
    load_vectors(data + cursor.offset(), values);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    values[j] = j < unit.count ? to_float(data[cursor.offset()]) : 0.0f;
    cursor.advance();
  }
}

template <typename T, int kWidth>
__device__ void store_as(const SampleOutput& tensor,
                         const SamplePlan& plan,
                         const SampleUnit& unit,
                         const float (&values)[kWidth]) {
  T* data = static_cast<T*>(tensor.data);
  SampleCursor cursor(tensor, plan, unit);
  if (tensor.vectorizable && unit.count == kWidth) {
    store_vectors(data + cursor.offset(), values);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < unit.count)
      data[cursor.offset()] = convert<T>(values[j]);
    cursor.advance();
  }
}

// Where a unit starts in a tensor of a plain plan.
template <typename T, typename Data>
__device__ auto plain_address(const SampleTensor<Data>& tensor, const SampleUnit& unit) {
  using Element = std::conditional_t<std::is_const_v<Data>, const T, T>;
  return static_cast<Element*>(tensor.data) + unit.sample * tensor.batch_stride + unit.first;
}

// The elements of a unit in float32, with zeros past the end.
template <typename T, bool kPlain = false, int kWidth>
__device__ void load(const SampleInput& tensor,
                     const SamplePlan& plan,
                     const SampleUnit& unit,
                     float (&values)[kWidth]) {
  if constexpr (kPlain) {
    load_vectors(plain_address<T>(tensor, unit), values);
  } else if (std::is_same_v<T, float> || tensor.float32) {
    load_as<float>(tensor, plan, unit, values);
  } else {
    load_as<T>(tensor, plan, unit, values);
  }
}

template <typename T, bool kPlain = false, int kWidth>
__device__ void store(const SampleOutput& tensor,
                      const SamplePlan& plan,
                      const SampleUnit& unit,
                      const float (&values)[kWidth]) {
  if constexpr (kPlain) {
    store_vectors(plain_address<T>(tensor, unit), values);
  } else if (std::is_same_v<T, float> || tensor.float32) {
    store_as<float>(tensor, plan, unit, values);
  } else {
    store_as<T>(tensor, plan, unit, values);
  }
}

// Four random words of a row.
__device__ inline Words<Scalar> draw(const Keys& keys, int64_t row, int64_t quad) {
  return random_words<Scalar>(static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32),
                              static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), keys);
}

// The sum over each team in a fixed order, held by its lane 0. Every thread of the block takes
// part.
__device__ inline double team_sum(double value, int team) {
  for (int step = (team < kWarpSize ? team : kWarpSize) / 2; step > 0; step /= 2)
    value += __shfl_down_sync(kFullWarp, value, step);
  if (team <= kWarpSize)
    return value;
  auto& warp_sums = shared_memory<double[kSampleThreads / kWarpSize]>();
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0)
    warp_sums[warp] = value;
  __syncthreads();
  if (threadIdx.x % team == 0) {
    value = 0;
    for (int i = 0; i < team / kWarpSize; ++i)
      value += warp_sums[warp + i];
  }
  return value;
}
constexpr size_t kTeamSumBytes = sizeof(double[kSampleThreads / kWarpSize]);

// Calls finish(sample, sum) with the sum over each sample, of which every thread has a part. If
// samples have several parts, the last block adds up the partial sums [B, parts] in a fixed order.
// Every thread of the block takes part. Returns whether this block may have finished samples.
template <typename Finish>
__device__ bool finish_samples(const SamplePlan& plan,
                               const SampleThreadTile& thread_tile,
                               double sum,
                               double* partials,
                               unsigned* ticket,
                               const Finish& finish) {
  sum = team_sum(sum, plan.team);
  const bool holds_sum = thread_tile.lane == 0 && thread_tile.sample < plan.shape.batch;
  if (plan.parts == 1) {
    if (holds_sum)
      finish(thread_tile.sample, sum);
    return true;
  }
  if (holds_sum)
    partials[blockIdx.x] = sum;
  if (!is_last_block(ticket))
    return false;
  // A warp per sample, or the block if there are few samples.
  const int team = plan.shape.batch < kSampleThreads / kWarpSize ? kSampleThreads : kWarpSize;
  const uint32_t lane = threadIdx.x % team;
  for (int64_t sample = threadIdx.x / team; sample < plan.shape.batch;
       sample += kSampleThreads / team) {
    sum = 0;
#pragma unroll 8
    for (uint32_t i = lane; i < plan.parts; i += team)
      sum += __ldcg(partials + sample * plan.parts + i);
    sum = team_sum(sum, team);
    if (lane == 0)
      finish(sample, sum);
    if (team > kWarpSize)
      __syncthreads();  // the shared memory is used again
  }
  return true;
}

// For finish_samples().
struct StoreSum {
  float* sums;  // [B]

  __device__ void operator()(int64_t sample, double sum) const {
    sums[sample] = static_cast<float>(sum);
  }
};

}  // namespace genperf

#endif
