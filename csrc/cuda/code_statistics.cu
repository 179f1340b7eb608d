// SPDX-License-Identifier: Apache-2.0
//
// Counts and sums per code in O(N D), without one-hot vectors and without float atomics.
//
// The positions are sorted by code (code_order.cu), and the sorted rows are summed (code_sums.h).
// If positions are contiguous and not channels, rows of a slice of channels are first transposed
// into a buffer of about 32 MB, which stays in L2. Residuals of the levels of a group are computed
// from x and the codes of earlier levels; from the second group on, the rows are the residuals that
// the group before left.
#include "code_statistics.h"

#include "code_rows.h"
#include "code_sums.h"

namespace genperf {
namespace {

constexpr const char* kOp = "code_statistics";
constexpr int64_t kMaxChunks = 1024;        // wanted
constexpr int64_t kBufferBytes = 32 << 20;  // wanted

int64_t divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// How a launch divides its rows and channels.
struct SumsShape {
  SumsShape(int64_t rows, int64_t channels, int width) {
    lanes = 1;
    while (lanes < kWarpSize && lanes * width < channels && lanes * width < kMaxChannels)
      lanes *= 2;
    slices = divide(channels, lanes * width);
    rows_per_team = kStep;
    while (divide(rows, kTeams * rows_per_team) > kMaxChunks)
      rows_per_team *= 2;
    chunks = divide(rows, kTeams * rows_per_team);
  }

  int lanes;
  int64_t slices;
  int64_t rows_per_team;
  int64_t chunks;
};

bool channels_last_of(const CodeStatisticsParams& p) {
  return p.inner == 1 || p.channels == 1 || p.x_strides.channel <= p.x_strides.inner;
}

int64_t bytes_of(DType type) {
  return type == DType::kFloat32 ? 4 : 2;
}

struct Workspace {
  Workspace(const CodeStatisticsParams& p, DType x_type, char* base) : end(base) {
    const int64_t positions = p.outer * p.inner;
    const int64_t entries = positions * p.levels;
    const int64_t codes = p.levels * p.num_codes;
    const CodeOrderShape sort(entries, codes);
    const bool several = sort.passes > 1;
    const bool channels_last = channels_last_of(p);
    const int width = x_type == DType::kFloat32 || p.residual ? 4 : 8;
    const int64_t fit = kBufferBytes / (positions > 0 ? positions * bytes_of(x_type) : 1);
    channels = channels_last || p.residual || fit > p.channels ? p.channels
               : fit < kTile                                   ? kTile
                                                               : fit / kTile * kTile;
    channels = channels < p.channels ? channels : p.channels;
    const int64_t group = p.levels < kLevelsPerGroup ? p.levels : kLevelsPerGroup;
    // A slice of channels may have fewer lanes, but then it has no more slices.
    const SumsShape sums(positions * group, channels, p.residual ? 4 : width);
    const int64_t chunks = sums.slices * sums.chunks;
    const bool stores_rows = !channels_last || (p.residual && p.levels > kLevelsPerGroup);
    order = take<CodeEntry>(entries);
    scratch = take<CodeEntry>(several ? entries : 0);
    table = take<uint32_t>(sort.tiles * sort.digits);
    totals = take<uint32_t>(sort.digits);
    starts = take<uint32_t>(several ? sort.digits + 1 : 0);
    offsets = take<uint32_t>(codes + 1);
    ticket = take<uint32_t>(1);
    num_tickets = 2 * chunks;
    tickets = take<uint32_t>(num_tickets);
    partials = take<double>(2 * chunks * 2 * (kMaxChannels + 1));
    rows = take<char>(stores_rows ? positions * channels * (p.residual ? 4 : bytes_of(x_type)) : 0);
  }

  template <typename T>
  T* take(int64_t count) {
    T* begin = reinterpret_cast<T*>(end);
    end += divide(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return begin;
  }

  char* end;
  int64_t channels;  // of a slice that is transposed
  CodeEntry *order, *scratch;
  uint32_t *table, *totals, *starts, *offsets, *ticket, *tickets;
  int64_t num_tickets;
  double* partials;
  char* rows;
};

template <typename T>
void launch_sums(SumsParams p, Mode mode, cudaStream_t stream) {
  constexpr int kWidth = kWidthOf<T>;
  const int64_t positions = p.all.outer * p.all.inner;
  const int64_t levels = p.last_level - p.first_level;
  const SumsShape shape(positions * levels, p.last_channel - p.first_channel, kWidth);
  p.lanes = shape.lanes;
  p.rows_per_team = shape.rows_per_team;
  p.chunks = shape.chunks;
  const int64_t outer = p.inner == 1 ? positions : p.all.outer;
  p.vectorizable = channels_vectorizable(p.rows, outer, p.last_channel - p.first_channel, p.inner,
                                         p.strides, kWidth);
  const Strides code_strides{p.all.code_stride, p.all.code_channel_stride, 0};
  p.codes_vectorizable = channels_vectorizable(p.all.codebooks, p.all.num_codes, p.all.channels, 1,
                                               code_strides, kWidth) &&
                         (p.all.levels == 1 || p.all.codebook_stride % kWidth == 0);
  p.sums_vectorizable = reinterpret_cast<uintptr_t>(p.all.sums) % 16 == 0 &&
                        p.all.channels % kWidth == 0 && p.last_channel % kWidth == 0;
  const dim3 grid(
      static_cast<unsigned>(shape.chunks + divide(levels * p.all.num_codes, kCodesPerBlock)),
      static_cast<unsigned>(shape.slices));
  const auto run = [&]<Mode kMode>() {
    launch(kOp, code_sums_kernel<T, kMode>, grid, static_cast<unsigned>(kTeams * shape.lanes),
           sizeof(SumsShared<kMode>), stream, p);
  };
  switch (mode) {
    case Mode::kPlain:
      return run.template operator()<Mode::kPlain>();
    case Mode::kSubtract:
      return run.template operator()<Mode::kSubtract>();
    case Mode::kWeighted:
      return run.template operator()<Mode::kWeighted>();
    case Mode::kResidual:
      return run.template operator()<Mode::kResidual>();
  }
}

template <typename T, typename U>
void launch_rows(const RowsParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide(p.positions, kTile)),
                  static_cast<unsigned>(divide(p.last_channel - p.first_channel, kTile)));
  if (p.positions > 0)
    launch(kOp, code_rows_kernel<T, U>, grid, kTile * kTileRows, sizeof(float[kTile][kTile + 1]),
           stream, p);
}

}  // namespace

int64_t code_statistics_workspace(const CodeStatisticsParams& params, DType x_type) {
  return Workspace(params, x_type, nullptr).end - static_cast<char*>(nullptr);
}

void launch_code_statistics(const CodeStatisticsParams& params,
                            DType x_type,
                            DType code_type,
                            cudaStream_t stream) {
  const CodeStatisticsParams& p = params;
  const Workspace w(p, x_type, static_cast<char*>(p.workspace));
  const int64_t positions = p.outer * p.inner;
  if (p.levels * p.num_codes == 0)
    return;
  CodeOrderParams order{};
  order.indices = p.indices;
  order.order = w.order;
  order.scratch = w.scratch;
  order.table = w.table;
  order.totals = w.totals;
  order.starts = w.starts;
  order.offsets = w.offsets;
  order.ticket = w.ticket;
  order.zeros = w.tickets;
  order.num_zeros = w.num_tickets;
  order.entries = positions * p.levels;
  order.num_codes = p.num_codes;
  order.levels = p.levels;
  launch_code_order(order, stream);

  RowsParams rows{};
  rows.x = p.x;
  rows.rows = w.rows;
  rows.codebooks = static_cast<const float*>(p.codebooks);
  rows.indices = p.indices;
  rows.positions = positions;
  rows.inner = p.inner;
  rows.last_channel = p.channels;
  rows.num_codes = p.num_codes;
  rows.levels = p.levels;
  rows.x_strides = p.x_strides;
  rows.codebook_stride = p.codebook_stride;
  rows.code_stride = p.code_stride;
  rows.code_channel_stride = p.code_channel_stride;
  rows.channels_last = channels_last_of(p);

  SumsParams sums{};
  sums.all = p;
  sums.rows = p.x;
  sums.strides = p.x_strides;
  sums.inner = p.inner;
  sums.last_channel = p.channels;
  sums.order = w.order;
  sums.offsets = w.offsets;
  sums.partials = w.partials;
  sums.tickets = w.tickets;
  sums.last_level = p.levels;
  sums.codes_float32 = code_type == DType::kFloat32;
  sums.sums_float32 = p.grad == nullptr || code_type == DType::kFloat32;
  const auto read_rows = [&](int64_t channels) {
    sums.rows = w.rows;
    sums.strides = {channels, 1, 0};
    sums.inner = 1;
  };

  dispatch(kOp, x_type, [&]<typename T>() {
    if (!p.residual) {
      const Mode mode = p.weights != nullptr ? Mode::kWeighted
                        : p.subtract_own     ? Mode::kSubtract
                                             : Mode::kPlain;
      if (rows.channels_last)
        return launch_sums<T>(sums, mode, stream);
      for (int64_t first = 0; first < p.channels; first += w.channels) {
        rows.first_channel = sums.first_channel = first;
        rows.last_channel = sums.last_channel =
            first + w.channels < p.channels ? first + w.channels : p.channels;
        launch_rows<T, T>(rows, stream);
        read_rows(rows.last_channel - first);
        launch_sums<T>(sums, mode, stream);
      }
      return;
    }
    bool stored = false;  // whether the residuals are in w.rows
    for (int64_t first = 0; first < p.levels; first += kLevelsPerGroup) {
      if (first > 0 || !rows.channels_last) {
        rows.first_level = first > 0 ? first - kLevelsPerGroup : 0;
        rows.last_level = first;
        if (stored) {
          launch_rows<float, float>(rows, stream);
        } else {
          launch_rows<T, float>(rows, stream);
        }
        stored = true;
        read_rows(p.channels);
        rows.x = w.rows;
        rows.inner = 1;
        rows.x_strides = sums.strides;
        rows.channels_last = true;
      }
      sums.first_level = first;
      sums.last_level = first + kLevelsPerGroup < p.levels ? first + kLevelsPerGroup : p.levels;
      if (stored) {
        launch_sums<float>(sums, Mode::kResidual, stream);
      } else {
        launch_sums<T>(sums, Mode::kResidual, stream);
      }
    }
  });
}

}  // namespace genperf
