// SPDX-License-Identifier: Apache-2.0
//
// What the tests ask of the emulation, and tell it, by ctypes.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "machine.h"

extern "C" {

inline __attribute__((used)) void cuda_on_host_seed(uint64_t seed) {
  cuda_on_host::machine.random = seed;
}

// Whether races are reported, or only show in the results.
inline __attribute__((used)) void cuda_on_host_detect_races(bool enabled) {
  cuda_on_host::trace.enabled = enabled;
}

// The number of launches since the library was loaded.
inline __attribute__((used)) int cuda_on_host_launches() {
  return cuda_on_host::machine.launches;
}

// The barriers that were reached, each as "file:line:needed\n".
inline __attribute__((used)) const char* cuda_on_host_barriers() {
  using namespace cuda_on_host;
  machine.listed.clear();
  for (unsigned i = 1; i < machine.barrier_count; ++i) {
    const Place& place = machine.barriers[i];
    machine.listed += place.file + std::string(":") + std::to_string(place.line) +
                      (trace.needed[i] ? ":1\n" : ":0\n");
  }
  return machine.listed.c_str();
}

// The kernels that ran, each as the hexadecimal address in this library and "\n".
inline __attribute__((used)) const char* cuda_on_host_kernels() {
  using namespace cuda_on_host;
  machine.listed.clear();
  for (const void* kernel : machine.kernels) {
    Dl_info info;
    dladdr(kernel, &info);
    char text[20];
    std::snprintf(text, sizeof(text), "%zx\n",
                  static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase));
    machine.listed += text;
  }
  return machine.listed.c_str();
}

// Passes over the barrier at this place, to see that a check notices.
inline __attribute__((used)) void cuda_on_host_omit(const char* file, unsigned line) {
  using namespace cuda_on_host;
  machine.omitted_file = file;
  machine.omitted = {machine.omitted_file.c_str(), line};
  trace.quiet = true;
}

}  // extern "C"
