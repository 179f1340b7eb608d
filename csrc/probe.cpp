// SPDX-License-Identifier: Apache-2.0
//
// The features of this processor. It is loaded before an instruction set is chosen, so it is
// compiled for the baseline and depends on nothing.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Linux grants the 8 KB of tile state only on request, once for all threads.
static bool tile_state_granted() {
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Bits: x86-64, x86-64-v3, x86-64-v4, avx512-bf16, amx-bf16, avx512-vnni.
extern "C" __attribute__((visibility("default"))) int genperf_cpu_features() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool leaf7 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool vnni = leaf7 && (ecx >> 11 & 1);
  const bool amx = leaf7 && (edx >> 22 & 1) && (edx >> 24 & 1);
  unsigned eax1 = 0;
  const bool bf16 = __get_cpuid_count(7, 1, &eax1, &ebx, &ecx, &edx) && (eax1 >> 5 & 1);
  return 1 | avx2 << 1 | avx512 << 2 | (avx512 && bf16) << 3 |
         (avx512 && amx && tile_state_granted()) << 4 | (avx512 && vnni) << 5;
}

#else

extern "C" __attribute__((visibility("default"))) int genperf_cpu_features() {
  return 0;
}

#endif
