// SPDX-License-Identifier: Apache-2.0
//
// The codebooks that were searched last, packed. A codebook that has not changed since, as in
// evaluation or in the levels of a residual quantizer, is not packed again. What decides is the
// content: every search reads the codebook once, so that no way to change it is overlooked.
#pragma once

#include <memory>

#include "cpu/search/code_panel.h"

namespace genperf {

constexpr int64_t kPanelBytes = 28 << 20;  // packed codes of one search
constexpr int64_t kCacheBytes = 32 << 20;  // ... of all searches

// Largest absolute value of the finite components, whose last dimension is contiguous.
template <class C>
double largest_component(const Codes<C>& codebook);

// The codebook, whose components are contiguous, as one panel.
template <class C>
std::shared_ptr<const CodePanel> packed_codebook(const Codes<C>& codebook, bool cosine, bool bf16);

}  // namespace genperf
