// SPDX-License-Identifier: Apache-2.0
//
// A cache of packed codebooks, so that an unchanged codebook is not packed again, as in evaluation
// or in the stages of a residual quantizer that share one. Entries are compared by content: every
// search reads the codebook once, so that no modification is missed.
#pragma once

#include <memory>

#include "cpu/search/code_panel.h"

namespace genperf {

constexpr int64_t kPanelBytes = 28 << 20;  // packed codes of one search
constexpr int64_t kCacheBytes = 32 << 20;  // packed codes of all entries

// Largest absolute value of the finite components.
template <class C>
double largest_component(const Codes<C>& codebook);

// The whole codebook as one panel.
template <class C>
std::shared_ptr<const CodePanel> packed_codebook(const Codes<C>& codebook,
                                                 bool cosine,
                                                 Packing packing);

}  // namespace genperf
