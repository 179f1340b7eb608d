// SPDX-License-Identifier: Apache-2.0
//
// Channels-first data, where the same component of adjacent vectors is contiguous: one Vec holds a
// component of kLanes vectors.
#pragma once

#include "cpu/common/elements.h"
#include "cpu/common/positions.h"
#include "cpu/common/vector_rows.h"

namespace genperf {

template <class T>
inline bool in_planes(const Positions<T>& x) {
  return !std::is_same_v<T, double> && x.inner_stride == 1 && x.stride != 1;
}

// A component of `count` <= kLanes adjacent vectors; the rest is zero.
template <class T>
inline Vec get_lanes(const T* p, int count) {
  return count == kLanes ? load(p) : Pack<float>::get(p, count);
}

template <class T>
inline void set_lanes(T* p, int count, Vec v) {
  if (count == kLanes)
    store(p, v);
  else
    Pack<float>::set(p, count, v);
}

// Components d ... d + n - 1 of the codes of `count` vectors, with those of a vector in its lane.
// A null code gives zeros.
template <class C>
inline void get_components(const C* const* codes,
                           int count,
                           int64_t d,
                           int n,
                           Vec (&components)[kLanes]) {
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane)
    components[lane] = lane < count && codes[lane] ? get_lanes(codes[lane] + d, n) : Vec{};
  transpose(components);
}

}  // namespace genperf
