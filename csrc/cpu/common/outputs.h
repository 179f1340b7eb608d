// SPDX-License-Identifier: Apache-2.0
//
// Memory of large results. The allocator returns it to the system when a result is freed, and takes
// it anew in the next call: a page fault for every page, which can take longer than the kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace genperf {

// Asks for huge pages for memory that is about to be written, from the size on from which NumPy
// does so too. Where the system has none, nothing changes.
inline void use_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t(1) << 22;
  if (bytes < kLarge)
    return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));  // on aarch64 up to 64 KiB
  const size_t skipped = -reinterpret_cast<uintptr_t>(data) % page;
  madvise(static_cast<char*>(data) + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// The same for the memory that a tensor spans.
inline void use_huge_pages(const torch::stable::Tensor& t) {
  size_t span = t.numel() ? 1 : 0;
  for (int64_t d = 0; d < t.dim() && span; ++d)
    span += size_t(t.size(d) - 1) * size_t(t.stride(d));
  use_huge_pages(t.data_ptr(), span * size_t(t.element_size()));
}

inline torch::stable::Tensor output_like(const torch::stable::Tensor& x) {
  torch::stable::Tensor out = torch::stable::empty_like(x);
  use_huge_pages(out);
  return out;
}

}  // namespace genperf
