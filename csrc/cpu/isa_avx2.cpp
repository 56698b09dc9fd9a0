// The kernels for processors with AVX2, FMA and F16C.
#include "shard_types.h"
#include "types.h"

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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,popcnt")
#endif

#define PTK_ISA avx2
#include "vec_avx2.h"
#include "../common/arithmetic.h"
#include "heads.h"
#include "row.h"
#include "mass.h"
#include "bounds.h"
#include "histogram.h"
#include "select.h"
#include "noise.h"
#include "top.h"
#include "sample.h"
#include "shard.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ptk {
const Kernels kAvx2Kernels = {"avx2", &avx2::kShardKernels,          avx2::combine_row,  avx2::sample_row,
                              avx2::score_row, avx2::coupled_step, avx2::reject_step,
                              avx2::head_logits};
}  // namespace ptk
#endif  // __x86_64__
