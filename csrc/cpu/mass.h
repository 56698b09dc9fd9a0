// Masses: q = round(2^44 * exp2((x - max) * log2(e) / T)), summed as integers.
#pragma once

namespace ptk {
namespace PTK_ISA {

// 2^f - 1 over f, f in [-0.5, 0.5]; Cephes exp2f, relative error 2^-24 before rounding.
constexpr float kExp2[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                           5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f};

// Below this exponent every mass rounds to 0 (2^-45 is the edge).
constexpr float kNoMass = -46.0f;

// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
constexpr float kRounder = 12582912.0f;

// Sum of round(2^44 p), p in [0, 1 + 2^-22], over the kTile values of a tile. Two digits of 22 bits,
// each rounded by adding kRounder and summed as integers: what the first digit leaves is exact, and
// the second's rounding is that of the whole, since 2^22 times the first is even.
struct Mass {
  U high, low;
  Mass() : high(set_u(0)), low(set_u(0)) {}  // written out: an implicit one would miss the target attribute
  void add(F p) {
    const F rounder = set(kRounder), digit = set(0x1p22f);
    const F first = fma(p, digit, rounder);
    const F rest = fma(p, digit, sub(rounder, first));
    high = add_u(high, bits(first));
    low = add_u(low, bits(fma(rest, digit, rounder)));
  }
  // Both sums are below 2^30 once the rounders' bits are taken off, modulo 2^32.
  uint64_t total() const {
    constexpr uint32_t kRounders = uint32_t(kTile) * std::bit_cast<uint32_t>(kRounder);
    const auto sum = [&](const U& digits) { return int64_t(int32_t(reduce_add(digits) - kRounders)); };
    return uint64_t(sum(high) << 22) + uint64_t(sum(low));
  }
};

// exp2(d * (e.hi + e.lo)) for d <= 0, 1 exactly at 0. The argument is reduced before its low part
// is added, so its error is that of one rounding near 0.5, not of one near d * e.
inline F exponential(F d, Exponent e) {
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

inline bool massless(float tile_max, float max, Exponent e) {
  return (tile_max - max) * e.hi < kNoMass;
}

inline uint64_t tile_mass(const float* x, float max, Exponent e) {
  Mass sum;
  for (int i = 0; i < kTile; i += kWidth) sum.add(exponential(sub(load(x + i), set(max)), e));
  return sum.total();
}

// Masses of the whole row at its temperature and at temperature 1, as far as they are wanted.
struct RowMass {
  uint64_t scaled = 0, raw = 0;
};

inline RowMass row_mass(const Row& row, Exponent e, bool scaled, bool raw) {
  const Exponent one = make_exponent(1.0);
  const bool same = scaled && raw && e.hi == one.hi && e.lo == one.lo;
  RowMass parts[kMaxChunks];
  const int chunks = over_tiles(row.parallel, row.tiles, [&](int chunk, int begin, int end) {
    RowMass sum;
    for (int t = begin; t < end; ++t) {
      const float* x = row.tile(t);
      const float top = row.tile_max[t];
      if (scaled && !massless(top, row.max, e)) sum.scaled += tile_mass(x, row.max, e);
      if (raw && !same && !massless(top, row.max, one)) sum.raw += tile_mass(x, row.max, one);
    }
    parts[chunk] = sum;
  });
  RowMass total;
  for (int c = 0; c < chunks; ++c) {
    total.scaled += parts[c].scaled;
    total.raw += parts[c].raw;
  }
  if (same) total.raw = total.scaled;
  return total;
}

// Masses of n values, a multiple of kWidth, one by one.
inline void masses(const float* x, int n, float max, Exponent e, uint64_t* out) {
  for (int i = 0; i < n; i += kWidth) store_mass(out + i, exponential(sub(load(x + i), set(max)), e));
}

}  // namespace PTK_ISA
}  // namespace ptk
