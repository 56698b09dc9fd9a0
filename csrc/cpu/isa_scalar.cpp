// The kernels for any processor.
#include "shard_types.h"
#include "types.h"

#define PTK_ISA scalar
#include "../common/vec_scalar.h"
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

namespace ptk {
const Kernels kScalarKernels = {"scalar", &scalar::kShardKernels,          scalar::combine_row,  scalar::sample_row,
                                scalar::score_row, scalar::coupled_step, scalar::reject_step,
                              scalar::head_logits};
}  // namespace ptk
