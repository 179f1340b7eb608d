// SPDX-License-Identifier: Apache-2.0
//
// Finite scalar and lookup-free quantisation. A tile is as many positions as a vector has lanes,
// and so as many vectors as there are channels. Where positions lie back to back, channels
// innermost, a tile is read as it lies, and every vector has the constants of its own mixture of
// channels; else lanes are positions.
#include "implicit_levels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "elements.h"
#include "positions.h"

namespace genperf {
namespace {

constexpr int64_t kGrain = 16384;  // elements to a task

// Positions in rows of one distance; a tile never spans two rows.
template <class T>
struct Lines {
  T* data;
  int64_t rows, columns, dim;
  int64_t row_stride, column_stride, stride;

  explicit Lines(const Tensor& t) {
    const Positions<T> x(t);
    const bool one_row = x.count() == 0 || x.inner == 1 || x.outer == 1 ||
                         x.outer_stride == x.inner * x.inner_stride;
    data = x.data;
    dim = x.dim;
    stride = x.stride;
    rows = one_row ? 1 : x.outer;
    columns = one_row ? x.count() : x.inner;
    row_stride = x.outer_stride;
    column_stride = x.inner == 1 ? x.outer_stride : x.inner_stride;
  }

  bool back_to_back() const {
    return rows == 1 && (dim == 1 || stride == 1) && (columns == 1 || column_stride == dim);
  }

  // The same positions in at least as many rows.
  Lines split(int64_t into) const {
    Lines lines = *this;
    if (rows != into) {
      lines.rows = into;
      lines.columns = columns / into;
      lines.row_stride = lines.columns * column_stride;
    }
    return lines;
  }
};

// One vector of a tile, read from and written to each of its tensors.
struct Place {
  bool flat;
  int64_t row, column;
  int vector, count;

  template <class T>
  T* at(const Lines<T>& x) const {
    return flat ? x.data + column * x.dim + vector * kLanes
                : x.data + row * x.row_stride + column * x.column_stride + vector * x.stride;
  }

  template <class T>
  Vec get(const Lines<T>& x) const {
    const int64_t step = flat ? 1 : x.column_stride;
    return count == kLanes && step == 1 ? load(at(x)) : read(at(x), step, count);
  }

  template <class T>
  void set(const Lines<T>& x, Vec v) const {
    const int64_t step = flat ? 1 : x.column_stride;
    if (count == kLanes && step == 1)
      store(at(x), v);
    else
      write(at(x), step, count, v);
  }
};

// Calls vector(Place) for every vector of a tile, and tile(first position, count) after each.
template <class F, class G>
void for_each_tile(bool flat,
                   int64_t rows,
                   int64_t columns,
                   int64_t dim,
                   const F& vector,
                   const G& tile) {
  if (rows * columns == 0)
    return;
  const int64_t tiles = (columns + kLanes - 1) / kLanes;
  const int64_t grain = std::max<int64_t>(1, kGrain / (dim * kLanes));
  torch::stable::parallel_for(0, rows * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> digits(dim * kLanes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / tiles, column = t % tiles * kLanes;
      const int count = int(std::min<int64_t>(kLanes, columns - column));
      for (int j = 0; j < int(dim); ++j) {
        const int64_t elements = flat ? count * dim - j * kLanes : count;
        if (elements > 0)
          vector(Place{flat, row, column, j, int(std::min<int64_t>(elements, kLanes))},
                 digits.data() + j * kLanes);
      }
      tile(row * columns + column, count, digits.data());
    }
  });
}

// A constant of each channel, as the vectors of a tile need it.
class Table {
 public:
  template <class F>
  Table(bool flat, int64_t dim, const F& constant) : values_(dim * kLanes) {
    for (int64_t i = 0; i < dim * kLanes; ++i)
      values_[i] = constant(flat ? i % dim : i / kLanes);
  }
  Vec operator[](int vector) const { return load(values_.get() + vector * kLanes); }

 private:
  Buffer<float> values_;
};

// Runs code(vector, x), which gives a Coded, over all elements.
template <class T, class F>
void quantize(const Lines<T>& x,
              const Lines<T>& out,
              bool flat,
              const std::vector<int64_t>& basis,
              int64_t* indices,
              const F& code) {
  const int64_t dim = x.dim;
  for_each_tile(
      flat, x.rows, x.columns, dim,
      [&](const Place& place, int32_t* digits) {
        const Coded<Simd> coded = code(place.vector, place.get(x));
        place.set(out, coded.value);
        const IVec whole = __builtin_convertvector(coded.digit, IVec);
        std::memcpy(digits, &whole, sizeof(whole));
      },
      [&](int64_t first, int count, const int32_t* digits) {
        if (!indices)
          return;
        const int64_t across = flat ? dim : 1, along = flat ? 1 : kLanes;
        for (int lane = 0; lane < count; ++lane) {
          int64_t index = 0;
          for (int64_t d = 0; d < dim; ++d)
            index += digits[lane * across + d * along] * basis[d];
          indices[first + lane] = index;
        }
      });
}

void check_channels(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1 && x.size(1) <= kMaxChannels,
                  "x must be [outer, D, inner] with 1 to 64 channels");
}

// Both with as many rows as the one that needs more.
template <class T>
std::pair<Lines<T>, Lines<T>> lines_of(const Tensor& a, const Tensor& b) {
  const Lines<T> x(a), y(b);
  const int64_t rows = std::max(x.rows, y.rows);
  return {x.split(rows), y.split(rows)};
}

std::vector<Level> levels_of(const std::vector<int64_t>& levels,
                             const Tensor& x,
                             bool symmetric,
                             bool hard) {
  STD_TORCH_CHECK(int64_t(levels.size()) == x.size(1), "levels must name every channel");
  std::vector<Level> grid;
  uint64_t basis = 1;  // wraps where no index is asked for
  for (const int64_t count : levels) {
    STD_TORCH_CHECK(count >= 2 && count <= 1 << 20, "a channel must have 2 to 2^20 levels");
    grid.push_back(level_of(count, symmetric, hard, int64_t(basis)));
    basis *= uint64_t(count);
  }
  return grid;
}

std::vector<int64_t> basis_of(const std::vector<Level>& grid) {
  std::vector<int64_t> basis;
  for (const Level& level : grid)
    basis.push_back(level.basis);
  return basis;
}

std::tuple<Tensor, Tensor> finite_scalar_quantize(const Tensor& x,
                                                  std::vector<int64_t> levels,
                                                  bool symmetric,
                                                  bool hard,
                                                  bool indexed) {
  check_channels(x);
  const std::vector<Level> grid = levels_of(levels, x, symmetric, hard);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor indices = indexed ? torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long)
                           : torch::stable::new_empty(x, {0}, ScalarType::Long);
  with_type(x, [&]<class T>(T*) {
    const auto [in, out] = lines_of<T>(x, quantized);
    const bool flat = in.back_to_back() && out.back_to_back();
    const auto table = [&](float Level::* constant) {
      return Table(flat, in.dim, [&](int64_t d) { return grid[d].*constant; });
    };
    const Table shift = table(&Level::shift), half = table(&Level::half),
                offset = table(&Level::offset), middle = table(&Level::middle),
                divisor = table(&Level::divisor), top = table(&Level::top);
    const auto run = [&](auto is_symmetric, auto is_hard) {
      quantize(in, out, flat, basis_of(grid),
               indexed ? static_cast<int64_t*>(indices.data_ptr()) : nullptr, [&](int j, Vec v) {
                 const Grid<Simd> at{shift[j], half[j], offset[j], middle[j], divisor[j], top[j]};
                 return quantize_level<Simd>(v, at, is_symmetric, is_hard);
               });
    };
    using Yes = std::true_type;
    using No = std::false_type;
    symmetric ? hard ? run(Yes{}, Yes{}) : run(Yes{}, No{})
    : hard    ? run(No{}, Yes{})
              : run(No{}, No{});
  });
  return {quantized, indices};
}

void check_gradient(const Tensor& gradient, const Tensor& x) {
  STD_TORCH_CHECK(gradient.scalar_type() == x.scalar_type() && gradient.dim() == 3 &&
                      gradient.size(0) == x.size(0) && gradient.size(1) == x.size(1) &&
                      gradient.size(2) == x.size(2),
                  "grad_quantized must have the shape and dtype of x");
}

Tensor finite_scalar_quantize_backward(const Tensor& grad_quantized,
                                       const Tensor& x,
                                       std::vector<int64_t> levels,
                                       bool symmetric,
                                       bool hard) {
  check_channels(x);
  check_gradient(grad_quantized, x);
  const std::vector<Level> grid = levels_of(levels, x, symmetric, hard);
  Tensor grad_x = torch::stable::empty_like(x);
  with_type(x, [&]<class T>(T*) {
    const int64_t rows =
        std::max({Lines<T>(x).rows, Lines<T>(grad_quantized).rows, Lines<T>(grad_x).rows});
    const Lines<T> in = Lines<T>(x).split(rows), from = Lines<T>(grad_quantized).split(rows),
                   to = Lines<T>(grad_x).split(rows);
    const bool flat = in.back_to_back() && from.back_to_back() && to.back_to_back();
    const Table shift(flat, in.dim, [&](int64_t d) { return grid[d].shift; });
    const Table slope(flat, in.dim, [&](int64_t d) { return grid[d].slope; });
    for_each_tile(
        flat, in.rows, in.columns, in.dim,
        [&](const Place& place, int32_t*) {
          const int j = place.vector;
          place.set(to,
                    place.get(from) * level_slope<Simd>(place.get(in), shift[j], slope[j], hard));
        },
        [](int64_t, int, const int32_t*) {});
  });
  return grad_x;
}

float code_scale(double scale, bool spherical, const Tensor& x) {
  return float(spherical ? scale / std::sqrt(double(x.size(1))) : scale);
}

std::tuple<Tensor, Tensor> lookup_free_quantize(const Tensor& x, double scale, bool spherical) {
  check_channels(x);
  STD_TORCH_CHECK(x.size(1) < kMaxChannels, "x must have at most 63 channels");
  const float step = code_scale(scale, spherical, x);
  std::vector<int64_t> basis;
  for (int64_t d = x.size(1) - 1; d >= 0; --d)
    basis.push_back(int64_t{1} << d);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), x.size(2)}, ScalarType::Long);
  with_type(x, [&]<class T>(T*) {
    const auto [in, out] = lines_of<T>(x, quantized);
    quantize(in, out, in.back_to_back() && out.back_to_back(), basis,
             static_cast<int64_t*>(indices.data_ptr()),
             [&](int, Vec v) { return quantize_sign<Simd>(v, step); });
  });
  return {quantized, indices};
}

// The gradient through x / |x|, which loses its part along x.
template <class T>
void normalize_backward(const Positions<T>& gradient,
                        const Positions<T>& x,
                        double scale,
                        const Positions<T>& out) {
  constexpr double kLeast = 1e-12;  // as torch.nn.functional.normalize
  const auto one = [&](int64_t position) {
    const T* const a = x.data + x.offset(position);
    const T* const g = gradient.data + gradient.offset(position);
    T* const to = out.data + out.offset(position);
    double square = 0, product = 0;
    for (int64_t d = 0; d < x.dim; ++d) {
      const double value = double(float(a[d * x.stride]));
      square += value * value;
      product += value * double(float(g[d * gradient.stride]));
    }
    const double norm = std::sqrt(square);
    const float factor = float(scale / (norm < kLeast ? kLeast : norm));
    const float along = norm < kLeast ? 0.0f : float(product / square);
    for (int64_t d = 0; d < x.dim; ++d)
      to[d * out.stride] =
          T(factor * (float(g[d * gradient.stride]) - along * float(a[d * x.stride])));
  };
  torch::stable::parallel_for(0, x.count(), std::max<int64_t>(1, kGrain / x.dim),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t position = begin; position < end; ++position)
                                  one(position);
                              });
}

Tensor lookup_free_quantize_backward(const Tensor& grad_quantized, const Tensor& x, double scale) {
  check_channels(x);
  check_gradient(grad_quantized, x);
  Tensor grad_x = torch::stable::empty_like(x);
  with_type(x, [&]<class T>(T*) {
    normalize_backward(Positions<T>(grad_quantized), Positions<T>(x), scale, Positions<T>(grad_x));
  });
  return grad_x;
}

}  // namespace
}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CPU, m) {
  m.impl("finite_scalar_quantize", TORCH_BOX(&genperf::finite_scalar_quantize));
  m.impl("finite_scalar_quantize_backward", TORCH_BOX(&genperf::finite_scalar_quantize_backward));
  m.impl("lookup_free_quantize", TORCH_BOX(&genperf::lookup_free_quantize));
  m.impl("lookup_free_quantize_backward", TORCH_BOX(&genperf::lookup_free_quantize_backward));
}
