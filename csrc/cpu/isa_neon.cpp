// The kernels for aarch64.
#include "shard.h"

#if defined(__aarch64__)
#define PTK_ISA neon
#include "vec_neon.h"
#include "isa.h"

namespace ptk {
const Kernels kNeonKernels = neon::kernels("neon");
}  // namespace ptk
#endif  // __aarch64__
