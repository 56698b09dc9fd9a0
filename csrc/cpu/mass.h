// Masses: q = round(2^44 * exp2((x - max) * log2(e) / T)), summed as integers.
#pragma once

namespace ptk {
namespace PTK_ISA {

// 2^f - 1 over f, f in [-0.5, 0.5]; Cephes exp2f, relative error 2^-24 before rounding.
constexpr float kExp2[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                           5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f};

// Below this exponent every mass rounds to 0 (2^-45 is the edge).
constexpr float kNoMass = -46.0f;

// exp2(d * (e.hi + e.lo)) for d <= 0, 1 exactly at 0. The argument is reduced before its low part
// is added, so its error is that of one rounding near 0.5, not of one near d * e.
inline F exponential(F d, Exponent e) {
  // Far below kNoMass the value only has to stay tiny and free of NaN (d may be -inf): n is
  // clamped, and max gives -1 for a NaN or -inf in f.
  const F n = round(max(mul(d, set(e.hi)), set(-100.0f)));
  F f = fma(d, set(e.hi), sub(set(0.0f), n));
  f = max(fma(d, set(e.lo), f), set(-1.0f));
  F p = set(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, f, set(kExp2[i]));
  p = fma(p, f, set(1.0f));
  return from_bits(add_u(bits(p), shift_left<23>(to_int(n))));
}

inline bool massless(float tile_max, float max, Exponent e) {
  return (tile_max - max) * e.hi < kNoMass;
}

inline uint64_t tile_mass(const float* x, float max, Exponent e) {
  Mass sum;
  for (int i = 0; i < kTile; i += kWidth) sum.add(exponential(sub(load(x + i), set(max)), e));
  return sum.total(kTile / kWidth);
}

inline uint64_t row_mass(const Row& row, Exponent e) {
  uint64_t sum = 0;
  for (int t = 0; t < row.tiles; ++t) {
    if (!massless(row.tile_max[t], row.max, e)) sum += tile_mass(row.tile(t), row.max, e);
  }
  return sum;
}

// Masses of n values, a multiple of kWidth, one by one.
inline void masses(const float* x, int n, float max, Exponent e, uint64_t* out) {
  for (int i = 0; i < n; i += kWidth) store_mass(out + i, exponential(sub(load(x + i), set(max)), e));
}

}  // namespace PTK_ISA
}  // namespace ptk
