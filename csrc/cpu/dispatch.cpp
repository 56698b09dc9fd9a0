// Chooses the kernels for this processor, once.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../include/proxytune.h"
#include "types.h"

namespace ptk {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Null where the processor has no such instruction set or the name is unknown.
const Kernels* by_name(const char* name) {
  if (std::strcmp(name, "scalar") == 0) return &kScalarKernels;
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0) return has_avx2() ? &kAvx2Kernels : nullptr;
  if (std::strcmp(name, "avx512") == 0) return has_avx512() ? &kAvx512Kernels : nullptr;
#elif defined(__aarch64__)
  if (std::strcmp(name, "neon") == 0) return &kNeonKernels;
#endif
  return nullptr;
}

const Kernels* widest() {
  for (const char* name : {"avx512", "avx2", "neon"}) {
    if (const Kernels* kernels = by_name(name)) return kernels;
  }
  return &kScalarKernels;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels* current_kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_acquire);
  if (kernels) return kernels;
  const char* forced = std::getenv("PROXYTUNE_FORCE_ISA");
  // Null for a name that can't run here: the caller reports it, no other one is put in its place.
  kernels = forced && *forced ? by_name(forced) : widest();
  if (kernels) chosen.store(kernels, std::memory_order_release);
  return kernels;
}

}  // namespace ptk

extern "C" int proxytune_cpu_set_isa(const char* name) {
  const ptk::Kernels* kernels = name ? ptk::by_name(name) : ptk::widest();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  ptk::chosen.store(kernels, std::memory_order_release);
  return PROXYTUNE_OK;
}

extern "C" const char* proxytune_cpu_isa(void) {
  const ptk::Kernels* kernels = ptk::current_kernels();
  return kernels ? kernels->name : nullptr;
}
