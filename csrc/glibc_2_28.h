// SPDX-License-Identifier: Apache-2.0
//
// Comes first in every source of a wheel for manylinux_2_28 (-include), where the compiler's own
// libraries are newer: names the versions of symbols that the oldest system has.
#pragma once

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define GENPERF_OLDEST "GLIBC_2.2.5"
#else
#define GENPERF_OLDEST "GLIBC_2.17"
#endif
__asm__(".symver exp2,exp2@" GENPERF_OLDEST);
__asm__(".symver log,log@" GENPERF_OLDEST);
__asm__(".symver log2,log2@" GENPERF_OLDEST);
#undef GENPERF_OLDEST
#endif

// Of glibc 2.32. std::shared_ptr reads it, to count without atomics in programs of one thread.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

#include <new>
// Of GCC 11's libstdc++, called for arrays that are too large.
namespace std {
__attribute__((weak, visibility("hidden"))) void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
// Of GCC 13's. <iostream> only names it, to ask for a library that initializes the streams itself:
// in older ones the first library loaded that uses streams does, and that is torch's.
__attribute__((weak, visibility("hidden"))) void ios_base_library_init() {}
}  // namespace std

// Templates of the library, of which some members are of GCC 9 to 11, are compiled here instead of
// taken from the system's libstdc++.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
