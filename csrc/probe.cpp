// SPDX-License-Identifier: Apache-2.0
//
// genperf._probe: the features of this processor and the contents of this build. It is imported
// before an instruction set is chosen, so it is compiled for the baseline and does not depend on
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__) && defined(__linux__)

// Linux grants the 8 KB of tile state only on request, once for all threads.
bool tile_state_granted() {
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::map<std::string, bool> cpu_features() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool leaf7 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool amx = leaf7 && (edx >> 22 & 1) && (edx >> 24 & 1);
  unsigned eax1 = 0;
  const bool bf16 = __get_cpuid_count(7, 1, &eax1, &ebx, &ecx, &edx) && (eax1 >> 5 & 1);
  return {{"x86-64", true},
          {"x86-64-v3", avx2},
          {"x86-64-v4", avx2 && avx512},
          {"avx512-bf16", avx512 && bf16},
          {"amx-bf16", avx512 && amx && tile_state_granted()}};
}

#else

std::map<std::string, bool> cpu_features() {
  return {{"x86-64", false},
          {"x86-64-v3", false},
          {"x86-64-v4", false},
          {"avx512-bf16", false},
          {"amx-bf16", false}};
}

#endif

std::map<std::string, std::string> build_info() {
  return {{"isas", GENPERF_ISAS},
          {"cuda_archs", GENPERF_CUDA_ARCHS},
          {"cuda_omission", GENPERF_CUDA_OMISSION},
          {"torch", GENPERF_TORCH},
          {"compiler", __VERSION__}};
}

}  // namespace

PYBIND11_MODULE(_probe, m) {
  m.def("cpu_features", &cpu_features, "Instruction-set levels this processor and kernel allow.");
  m.def("build_info", &build_info,
        "Instruction sets, CUDA architectures or why there are none, torch and compiler.");
}
