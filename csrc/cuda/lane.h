// One lane's arithmetic: the contract's functions at width 1, and what the kernels add to them.
#pragma once

#define PTK_ISA lane
#include "../common/vec_scalar.h"
#include "../common/arithmetic.h"
#undef PTK_ISA

#include "../common/order.h"

namespace ptk {
namespace cuda {

using lane::exponential;
using lane::gumbel;
using lane::kNoMass;
using lane::kRounder;
using lane::log_positive;

// The two digits of round(2^44 p), p in [0, 1 + 2^-22], or their sums over at most 1,024 tokens
// (docs/contracts.md, Sums).
struct Digits {
  uint32_t high = 0, low = 0;  // low is signed, modulo 2^32

  PTK_HOST_DEVICE void add(float p) {
    const float first = std::fma(p, 0x1p22f, kRounder);
    const float rest = std::fma(p, 0x1p22f, kRounder - first);
    high += bits_of_float(first) - bits_of_float(kRounder);
    low += bits_of_float(std::fma(rest, 0x1p22f, kRounder)) - bits_of_float(kRounder);
  }
  PTK_HOST_DEVICE uint64_t total() const {
    return (uint64_t(high) << 22) + uint64_t(int64_t(int32_t(low)));
  }
};

PTK_HOST_DEVICE uint64_t mass_of(float d, Exponent e) {
  Digits digits;
  digits.add(exponential(d, e));
  return digits.total();
}

// A mass as a share of the likeliest token's, rounded to fp32.
PTK_HOST_DEVICE float share_of(uint64_t mass) { return float(mass) * 0x1p-44f; }

PTK_HOST_DEVICE uint32_t popcount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return uint32_t(__popc(int(bits)));
#else
  return uint32_t(__builtin_popcount(bits));
#endif
}

// Position of the lowest bit that is set; there must be one.
PTK_HOST_DEVICE int lowest_bit(uint32_t bits) { return int(popcount((bits & (0u - bits)) - 1)); }

// One combined logit (docs/contracts.md, Combination, 1 to 5 but for base = -inf): NaN where it is.
PTK_HOST_DEVICE float combined(float base, float expert, float anti, float alpha) {
  return std::fma(alpha, expert - anti, base);
}

}  // namespace cuda
}  // namespace ptk
