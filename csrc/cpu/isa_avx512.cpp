// The kernels for processors with AVX512 (F, BW, DQ, VL).
#include "shard.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers start from an undefined register, on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

// Set after the standard headers: their inline functions are shared with the code for processors
// without these instructions, and must be compiled for all.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt")
#endif

#define PTK_ISA avx512
#include "vec_avx512.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ptk {
const Kernels kAvx512Kernels = avx512::kernels("avx512");
}  // namespace ptk
#endif  // __x86_64__
