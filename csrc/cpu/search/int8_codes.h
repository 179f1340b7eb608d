// SPDX-License-Identifier: Apache-2.0
//
// Packs codes in 8 bits, with the bounds on the errors of their scores.
#pragma once

#include "cpu/search/code_panel.h"

namespace genperf {

// Buffers for a panel's codes.
Int8Codes int8_codes(const CodePanel& panel);

// Packs a group from rows [16, row_length] of f, which are padded with zeros, their lengths, and
// the panel's biases b, which are raised by their bounds.
void pack_int8(CodePanel& panel,
               int64_t group,
               const float* rows,
               int64_t row_length,
               const double* lengths);

// Sets the largest bounds of every block.
void set_block_errors(CodePanel& panel);

}  // namespace genperf
