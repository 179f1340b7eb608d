// SPDX-License-Identifier: Apache-2.0
//
// The kernel of code_statistics that sums rows sorted by code.
//
// A block sums a chunk of rows in double: eight teams of up to 32 threads take an eighth each, a
// thread 16 bytes of channels. Each team sums its runs of one code; the runs that reach from team
// to team are then added in order. Of a run that crosses chunks every block leaves a piece, and the
// block that comes last adds the pieces, in order again, all teams a share of them. How rows are
// grouped depends on their number alone, so the sums are the same in every run and for every
// layout.
//
// The code of a run is subtracted once, from the sum: near a code far from the origin, float32
// values have so similar exponents that their sum in double is exact.
#pragma once

#include "code_output.h"
#include "positions.h"

#if defined(__CUDACC__) || defined(GENPERF_CUDA_ON_HOST)

namespace genperf {

constexpr int kTeams = 8;
constexpr int kStep = 32;  // rows of a team that are staged in shared memory at a time
constexpr int kCodesPerBlock = 64;

template <Mode kMode>
struct StagedRows {
  uint32_t code[kTeams * kStep];
  int64_t offset[kTeams * kStep];  // into `rows`
  float weight[kMode == Mode::kWeighted ? kTeams * kStep : 1];
  // Offsets into the codebooks of the codes to subtract, -1 for none.
  int64_t earlier[kMode == Mode::kResidual ? kLevelsPerGroup - 1 : 1]
                 [kMode == Mode::kResidual ? kTeams * kStep : 1];
};

// The first and the last run of a team's rows; a run of all of them is the first.
struct Pieces {
  double sums[kTeams][2][kMaxChannels];
  double mass[kTeams][2];
  uint32_t code[kTeams][2];
};

template <Mode kMode>
struct SumsShared {
  StagedRows<kMode> staged;
  Pieces pieces;
  bool last;
};

// Stages rows step ... step + kStep - 1 of every team.
template <Mode kMode>
__device__ void stage(const SumsParams& p,
                      StagedRows<kMode>& staged,
                      int64_t begin,
                      int64_t end,
                      int64_t step) {
  for (int i = threadIdx.x; i < kTeams * kStep; i += blockDim.x) {
    const int64_t row = begin + i / kStep * p.rows_per_team + step + i % kStep;
    const bool inside = row < end;
    const CodeEntry entry = inside ? p.order[row] : CodeEntry{0, kNoCode};
    const uint32_t levels = kMode == Mode::kResidual ? static_cast<uint32_t>(p.all.levels) : 1;
    const uint32_t position = entry.entry / levels;
    staged.code[i] = entry.code;
    staged.offset[i] = offset_of(position, p.inner, p.strides);
    if constexpr (kMode == Mode::kWeighted)
      staged.weight[i] = inside ? p.all.weights[position] : 0.0f;
    if constexpr (kMode == Mode::kResidual) {
      const int64_t level = entry.entry - position * levels;
      for (int j = 0; j < kLevelsPerGroup - 1; ++j) {
        const int64_t earlier = p.first_level + j;
        const int64_t index =
            inside && earlier < level ? p.all.indices[position * p.all.levels + earlier] : -1;
        staged.earlier[j][i] = index >= 0 && index < p.all.num_codes
                                   ? earlier * p.all.codebook_stride + index * p.all.code_stride
                                   : -1;
      }
    }
  }
}

// Codes of no rows, and the counts without weights, which are differences of offsets.
template <typename T, Mode kMode>
__device__ void write_empty_codes(const SumsParams& p, int64_t block) {
  constexpr int kWidth = kWidthOf<T>;
  const int64_t begin = p.first_level * p.all.num_codes + block * kCodesPerBlock;
  const int64_t codes = p.last_level * p.all.num_codes;
  const int64_t end = begin + kCodesPerBlock < codes ? begin + kCodesPerBlock : codes;
  const int lane = threadIdx.x % p.lanes;
  const int64_t channel = p.first_channel + (int64_t{blockIdx.y} * p.lanes + lane) * kWidth;
  const double zeros[kWidth] = {};
  const Output<T> output(p);
  for (int64_t code = begin + threadIdx.x / p.lanes; code < end; code += kTeams) {
    const uint32_t rows = p.offsets[code + 1] - p.offsets[code];
    if (p.all.counts != nullptr && channel == 0 && (rows == 0 || kMode != Mode::kWeighted))
      p.all.counts[code] = static_cast<float>(rows);
    if (rows == 0 && channel < p.last_channel)
      output.store(static_cast<uint32_t>(code), channel, p.last_channel - channel, zeros);
  }
}

// The sums of a run over the pieces that `count` chunks left, for each team's share of the chunks.
template <Mode kMode>
__device__ void add_pieces(Pieces& pieces, const double* partials, int64_t count, int channels) {
  constexpr int64_t kPiece = kMaxChannels + 1;
  const int64_t share = (count + kTeams - 1) / kTeams;
  for (int i = threadIdx.x; i < kTeams * (channels + 1); i += blockDim.x) {
    const int team = i / (channels + 1);
    const int channel = i % (channels + 1);
    if (channel == channels && kMode != Mode::kWeighted)
      continue;
    const double* column = partials + (channel < channels ? channel : kMaxChannels);
    const int64_t begin = team * share;
    const int64_t end = begin + share < count ? begin + share : count;
    double sum = 0;
#pragma unroll 8
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      // The first piece is the last run of its chunk, every other one the first run.
      sum += __ldcg(column + (2 * chunk + (chunk == 0 ? 1 : 0)) * kPiece);
    }
    if (channel < channels) {
      pieces.sums[team][0][channel] = sum;
    } else {
      pieces.mass[team][0] = sum;
    }
  }
}

template <typename T, Mode kMode>
__global__ void __launch_bounds__(kTeams* kWarpSize, 2) code_sums_kernel(SumsParams p) {
  if (blockIdx.x >= p.chunks)
    return write_empty_codes<T, kMode>(p, blockIdx.x - p.chunks);
  constexpr int kWidth = kWidthOf<T>;
  constexpr int kBatch = kMode == Mode::kPlain || kWidth < 8 ? 4 : 2;  // rows loaded at a time
  constexpr bool kWeighted = kMode == Mode::kWeighted;
  using Mass = std::conditional_t<kWeighted, double, uint32_t>;
  const bool subtract = kMode == Mode::kSubtract || (kMode != Mode::kPlain && p.all.subtract_own);
  auto& shared = shared_memory<SumsShared<kMode>>();
  StagedRows<kMode>& staged = shared.staged;
  Pieces& pieces = shared.pieces;
  const int64_t rows_begin = p.offsets[p.first_level * p.all.num_codes];
  const int64_t rows_end = p.offsets[p.last_level * p.all.num_codes];
  const int64_t chunk_rows = kTeams * p.rows_per_team;
  const int64_t begin = rows_begin + int64_t{blockIdx.x} * chunk_rows;
  const int64_t end = begin + chunk_rows < rows_end ? begin + chunk_rows : rows_end;
  if (begin >= end)
    return;

  const int team = threadIdx.x / p.lanes;
  const int lane = threadIdx.x % p.lanes;
  const int64_t slice_begin = p.first_channel + int64_t{blockIdx.y} * p.lanes * kWidth;
  const int64_t channel = slice_begin + lane * kWidth;
  const int64_t channels_left = p.last_channel - channel;
  const T* x = static_cast<const T*>(p.rows) + (channel - p.first_channel) * p.strides.channel;
  const bool vectorizable = p.vectorizable && channels_left > 0;
  const Output<T> output(p);
  if (lane == 0)
    pieces.code[team][0] = pieces.code[team][1] = kNoCode;

  uint32_t current = kNoCode;
  bool first_run = true;
  double sums[kWidth] = {};
  Mass mass = 0;
  Pack<float, kWidth> origins{};  // the current code
  const auto keep_piece = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      pieces.sums[team][slot][lane * kWidth + i] = sums[i];
    if (lane == 0) {
      pieces.mass[team][slot] = mass;
      pieces.code[team][slot] = current;
    }
  };
  const auto finish_run = [&] {
    if (current == kNoCode)
      return;
    if (first_run) {
      keep_piece(0);
      first_run = false;
      return;
    }
    if (subtract) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        sums[i] -= static_cast<double>(mass) * origins.values[i];
    }
    if (channels_left > 0)
      output.store(current, channel, channels_left, sums);
    if (kWeighted && channel == 0 && p.all.counts != nullptr)
      p.all.counts[current] = static_cast<float>(mass);
  };
  for (int64_t step = 0; step < p.rows_per_team; step += kStep) {
    __syncthreads();
    stage<kMode>(p, staged, begin, end, step);
    __syncthreads();
    for (int batch = team * kStep; batch < (team + 1) * kStep; batch += kBatch) {
      if (staged.code[batch] == kNoCode)
        break;
      const uint32_t last_of_batch = staged.code[batch + kBatch - 1];
      const bool full = last_of_batch != kNoCode;
      const bool in_run = full && last_of_batch == current;  // and so are the others
      Pack<T, kWidth> packs[kBatch];
      if (vectorizable && full) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          packs[j] = *reinterpret_cast<const Pack<T, kWidth>*>(x + staged.offset[batch + j]);
      } else {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const bool inside = staged.code[batch + j] != kNoCode;
          packs[j] = load_pack<T, kWidth>(x + staged.offset[batch + j], p.strides.channel,
                                          inside ? channels_left : 0, false);
        }
      }
      Pack<float, kWidth> starts[kBatch];  // the codes of runs that start in the batch
      if (subtract && !in_run) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const uint32_t code = staged.code[batch + j];
          if (code != kNoCode && channels_left > 0 &&
              code != (j > 0 ? staged.code[batch + j - 1] : current))
            starts[j] = output.template origin<kWidth>(code, channel, channels_left);
        }
      }
      float values[kBatch][kWidth];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          values[j][i] = to_float(packs[j].values[i]);
      }
      if constexpr (kMode == Mode::kResidual) {
        for (int level = 0; level < kLevelsPerGroup - 1; ++level) {
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int64_t offset = staged.earlier[level][batch + j];
            if (offset < 0 || channels_left <= 0)
              continue;
            const auto code = load_pack<float, kWidth>(
                static_cast<const float*>(p.all.codebooks) + offset +
                    channel * p.all.code_channel_stride,
                p.all.code_channel_stride, channels_left, p.codes_vectorizable);
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
              values[j][i] -= code.values[i];
          }
        }
      }
      const auto add = [&](int j) {
        if constexpr (kWeighted) {
          const double weight = staged.weight[batch + j];
          mass += weight;
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            sums[i] += weight * values[j][i];
        } else {
          ++mass;
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            sums[i] += values[j][i];
        }
      };
      if (in_run) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          add(j);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t code = staged.code[batch + j];
        if (code == kNoCode)
          continue;
        if (code != current) {
          finish_run();
          current = code;
          mass = 0;
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            sums[i] = 0;
          if (subtract)
            origins = starts[j];
        }
        add(j);
      }
    }
  }
  if (current != kNoCode)
    keep_piece(first_run ? 0 : 1);
  __syncthreads();

  const uint32_t before = begin > rows_begin ? p.order[begin - 1].code : kNoCode;
  const uint32_t after = end < rows_end ? p.order[end].code : kNoCode;
  const uint32_t last_code = p.order[end - 1].code;
  const bool crosses[2] = {pieces.code[0][0] == before, last_code == after && before != after};
  const int64_t slice = int64_t{blockIdx.y} * p.chunks;
  const auto partials_of = [&](int64_t chunk) {
    return p.partials + (slice + chunk) * 2 * (kMaxChannels + 1);
  };
  const int channels = static_cast<int>(p.last_channel - slice_begin < p.lanes * kWidth
                                            ? p.last_channel - slice_begin
                                            : p.lanes * kWidth);
  const auto finish_code = [&](uint32_t code, int c, double sum, double total_mass) {
    if (subtract)
      sum -= total_mass * output.template origin<1>(code, slice_begin + c, 1).values[0];
    const double result[1] = {sum};
    output.store(code, slice_begin + c, 1, result);
    if (kWeighted && slice_begin + c == 0 && p.all.counts != nullptr)
      p.all.counts[code] = static_cast<float>(total_mass);
  };
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    uint32_t open = kNoCode;
    double sum = 0;
    double total_mass = 0;
    for (int piece = 0; piece <= 2 * kTeams; ++piece) {
      const uint32_t code = piece < 2 * kTeams ? pieces.code[piece / 2][piece % 2] : kNoCode;
      if (code == kNoCode && piece < 2 * kTeams)
        continue;
      if (code != open && open != kNoCode) {
        if (open != before && open != after) {
          finish_code(open, c, sum, total_mass);
        } else {
          double* partial = partials_of(blockIdx.x) + (open == before ? 0 : kMaxChannels + 1);
          partial[c] = sum;
          if (kWeighted && c == 0)
            partial[kMaxChannels] = total_mass;
        }
        sum = total_mass = 0;
      }
      open = code;
      if (code != kNoCode) {
        sum += pieces.sums[piece / 2][piece % 2][c];
        total_mass += pieces.mass[piece / 2][piece % 2];
      }
    }
  }
  for (int side = 0; side < 2; ++side) {
    if (!crosses[side])
      continue;
    const uint32_t code = side == 0 ? before : after;
    const uint32_t rows = p.offsets[code + 1] - p.offsets[code];
    const int64_t first_chunk = (p.offsets[code] - rows_begin) / chunk_rows;
    const int64_t last_chunk = (p.offsets[code] + int64_t{rows} - 1 - rows_begin) / chunk_rows;
    const auto last = static_cast<unsigned>(last_chunk - first_chunk);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
      shared.last = atomicInc(p.tickets + slice + first_chunk, last) == last;
    __syncthreads();
    if (!shared.last)
      continue;
    __threadfence();
    add_pieces<kMode>(pieces, partials_of(first_chunk), last + 1, channels);
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      double sum = 0;
      double total_mass = kWeighted ? 0 : static_cast<double>(rows);
      for (int t = 0; t < kTeams; ++t) {
        sum += pieces.sums[t][0][c];
        if (kWeighted)
          total_mass += pieces.mass[t][0];
      }
      finish_code(code, c, sum, total_mass);
    }
  }
}

}  // namespace genperf

#endif
