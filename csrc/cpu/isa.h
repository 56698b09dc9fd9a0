// All kernels of one instruction set: included once for each, after PTK_ISA and its vector type.
#include "../common/arithmetic.h"
#include "heads.h"
#include "row.h"
#include "mass.h"
#include "select.h"
#include "gumbel.h"
#include "attribution.h"
#include "sample.h"
#include "verify.h"
#include "shard_kernels.h"

namespace ptk {
namespace PTK_ISA {
constexpr Kernels kernels(const char* name) {
  return {name, combine_row, sample_row, score_row, verify_row, head_logits, int8_linear, &kShardKernels};
}
}  // namespace PTK_ISA
}  // namespace ptk
