// The kernels for any processor.
#include "shard.h"

#define PTK_ISA scalar
#include "../common/vec_scalar.h"
#include "isa.h"

namespace ptk {
const Kernels kScalarKernels = scalar::kernels("scalar");
}  // namespace ptk
