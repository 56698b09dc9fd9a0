// The functions of the contract (docs/contracts.md), in one place: over the vector type of the instruction
// set that includes this file, or over one lane of a GPU.
#pragma once

#include "params.h"

namespace ptk {
namespace PTK_ISA {

// Below this exponent every mass rounds to 0 (2^-45 is the edge).
constexpr float kNoMass = -46.0f;

// 1.5 * 2^23: a sum with it is rounded to an integer, which is in the low bits.
constexpr float kRounder = 12582912.0f;

// exp2(d * (e.hi + e.lo)) for d <= 0, 1 exactly at 0. The argument is reduced before its low part
// is added, so its error is that of one rounding near 0.5, not of one near d * e.
PTK_HOST_DEVICE F exponential(F d, Exponent e) {
  // 2^f - 1 over f, f in [-0.5, 0.5]; Cephes exp2f, relative error 2^-24 before rounding.
  constexpr float kExp2[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                             5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f};
  const F rounder = set(kRounder);
  // e.floor keeps the exponent above -101: far below kNoMass, and -inf becomes finite.
  const F clamped = max(d, set(e.floor));
  const F n = fma(clamped, set(e.hi), rounder);
  const F f = fma(clamped, set(e.lo), fma(clamped, set(e.hi), sub(rounder, n)));
  F p = set(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, f, set(kExp2[i]));
  p = fma(p, f, set(1.0f));
  return from_bits(add_u(bits(p), shift_left<23>(bits(n))));
}

// log(y) for a positive normal y; Cephes logf, within 2 units in the last place.
PTK_HOST_DEVICE F log_positive(F y) {
  constexpr float kLog[] = {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                            -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                            2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  // y = m * 2^n with m in [sqrt(1/2), sqrt(2)).
  const U shifted = sub_u(bits(y), set_u(0x3F3504F3u));
  const U n = shift_right_signed<23>(shifted);
  const F f = sub(from_bits(sub_u(bits(y), shift_left<23>(n))), set(1.0f));
  const F exponent = int_to_float(n), square = mul(f, f);
  F p = set(kLog[0]);
  for (int i = 1; i < 9; ++i) p = fma(p, f, set(kLog[i]));
  p = mul(mul(p, f), square);
  p = fma(exponent, set(-2.12194440e-4f), p);
  p = fma(square, set(-0.5f), p);
  return fma(exponent, set(0.693359375f), add(f, p));
}

// u = (word + 0.5) * scale, at most 1 - 2^-24.
PTK_HOST_DEVICE F uniform(U word, float scale) {
  return min(fma(uint_to_float(word), set(scale), set(0.5f * scale)), set(1.0f - 0x1p-24f));
}

// -log(-log1p(-u)); u in [2^-97, 1 - 2^-24], so both logs stay finite.
PTK_HOST_DEVICE F gumbel(F u) {
  const F y = sub(set(1.0f), u);
  const F lost = sub(sub(set(1.0f), y), u);  // what rounding y lost, exactly
  const F e = sub(set(0.0f), add(log_positive(y), div(lost, y)));
  return sub(set(0.0f), log_positive(e));
}

}  // namespace PTK_ISA
}  // namespace ptk
