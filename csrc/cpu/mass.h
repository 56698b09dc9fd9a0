// Masses: q = round(2^44 * exp2((x - max) * log2(e) / T)), summed as integers.
#pragma once

namespace ptk {
namespace PTK_ISA {

// The sum of round(2^44 p), p in [0, 1 + 2^-22], over the kTile values of a tile. Each value has two digits
// of 22 bits, rounded by adding kRounder and summed as integers. What the first digit leaves is exact, and
// the second is rounded as the whole value is, since 2^22 times the first is even.
struct Digits {
  F high = set(kRounder), low = set(kRounder);  // of 0
};
inline Digits digits(F p) {
  const F rounder = set(kRounder), digit = set(0x1p22f);
  const F high = fma(p, digit, rounder);
  return {high, fma(fma(p, digit, sub(rounder, high)), digit, rounder)};
}
struct Mass {
  U high, low;
  Mass() : high(set_u(0)), low(set_u(0)) {}  // written out: an implicit one would miss the target attribute
  void add(F p) { add(digits(p)); }
  void add(const Digits& d) {
    high = add_u(high, bits(d.high));
    low = add_u(low, bits(d.low));
  }
  // Both sums are below 2^30 when the bits of the rounders are subtracted, modulo 2^32.
  uint64_t total() const {
    constexpr uint32_t kRounders = uint32_t(kTile) * std::bit_cast<uint32_t>(kRounder);
    const auto sum = [&](const U& digits) { return int64_t(int32_t(reduce_add(digits) - kRounders)); };
    return uint64_t(sum(high) << 22) + uint64_t(sum(low));
  }
};

inline bool massless(float tile_max, float max, Exponent e) {
  return (tile_max - max) * e.hi < kNoMass;
}

inline uint64_t tile_mass(const float* x, float max, Exponent e) {
  Mass sum;
  for (int i = 0; i < kTile; i += kWidth) sum.add(exponential(sub(load(x + i), set(max)), e));
  return sum.total();
}

// The same, and adds the tokens with x >= low to `upper`.
inline uint64_t tile_mass(const float* x, float max, Exponent e, float low, Prefix& upper) {
  Mass sum, above;
  for (int i = 0; i < kTile; i += kWidth) {
    const F v = load(x + i);
    const Digits d = digits(exponential(sub(v, set(max)), e));
    const uint32_t inside = ge(v, set(low));
    upper.count += uint32_t(std::popcount(inside));
    sum.add(d);
    above.add(Digits{select(inside, d.high, set(kRounder)), select(inside, d.low, set(kRounder))});
  }
  upper.mass += above.total();
  return sum.total();
}

// Where the raw masses leave, for each tile, the sum of 2^-44 q (x - base - centre) in fp32.
struct Divergence {
  const Source& in;
  float centre;
  float* sums;  // [tiles]
};

template <typename T>
uint64_t diverging_mass(const float* x, const T* base, float max, Exponent e, float centre, float& divergence) {
  Mass sum;
  F diverging = set(0.0f);
  const F floor = set(max + kNoMass * 0.69314718f);  // an x far below may be far from its base
  for (int i = 0; i < kTile; i += kWidth) {
    const F v = load(x + i), p = exponential(sub(v, set(max)), e);
    sum.add(p);
    const F steered = sub(sub(v, load(base + i)), set(centre));  // masked: -inf or NaN
    diverging = fma(p, select(gt(v, floor), steered, set(0.0f)), diverging);
  }
  divergence = reduce_halves(diverging);
  return sum.total();
}

inline uint64_t diverging_mass(const Row& row, int t, Exponent e, const Divergence& d) {
  const int64_t start = int64_t(t) * kTile;
  const int n = int(std::min<int64_t>(kTile, row.vocab_size - start));
  const auto mass = [&](const auto* base) {
    return diverging_mass(row.tile(t), base, row.max, e, d.centre, d.sums[t]);
  };
  if (n == kTile && d.in.base_dtype == kDtypeBf16) return mass(static_cast<const Bf16*>(d.in.base) + start);
  if (n == kTile && d.in.base_dtype == kDtypeF32) return mass(static_cast<const float*>(d.in.base) + start);
  float base[kTile];
  widen_tile(d.in.base, d.in.base_dtype, start, n, 0.0f, base);
  return mass(base);
}

// Masses of the whole row at its temperature and at temperature 1, as far as they are wanted; with the former
// goes `upper`, the tokens from its x on, +inf for none, with the latter a divergence.
struct RowMass {
  uint64_t scaled = 0, raw = 0;
  Prefix upper{};
};

inline RowMass row_mass(const Row& row, Exponent e, bool scaled, bool raw, float split = INFINITY,
                        const Divergence* divergence = nullptr) {
  const Exponent one = make_exponent(1.0);
  const bool same = scaled && raw && e.hi == one.hi && e.lo == one.lo;
  const bool by_raw = same && divergence && split == INFINITY;
  RowMass parts[kMaxChunks];
  const int chunks = over_tiles(row.parallel, row.tiles, [&](int chunk, int begin, int end) {
    RowMass sum{0, 0, {split, UINT32_MAX, 0, 0}};
    for (int t = begin; t < end; ++t) {
      const float* x = row.tile(t);
      const float top = row.tile_max[t];
      if (scaled && top >= split) {
        sum.scaled += tile_mass(x, row.max, e, split, sum.upper);
      } else if (scaled && !by_raw && !massless(top, row.max, e)) {
        sum.scaled += tile_mass(x, row.max, e);
      }
      if (divergence) divergence->sums[t] = 0.0f;
      if (!raw || massless(top, row.max, one)) continue;
      if (divergence) {
        sum.raw += diverging_mass(row, t, one, *divergence);
      } else if (!same) {
        sum.raw += tile_mass(x, row.max, one);
      }
    }
    parts[chunk] = sum;
  });
  RowMass total{0, 0, {split, UINT32_MAX, 0, 0}};
  for (int c = 0; c < chunks; ++c) {
    total.scaled += parts[c].scaled;
    total.raw += parts[c].raw;
    total.upper.count += parts[c].upper.count;
    total.upper.mass += parts[c].upper.mass;
  }
  if (by_raw) total.scaled = total.raw;
  if (same && !divergence) total.raw = total.scaled;
  return total;
}

// Masses of n values, a multiple of kWidth, one by one.
inline void masses(const float* x, int n, float max, Exponent e, uint64_t* out) {
  for (int i = 0; i < n; i += kWidth) store_mass(out + i, exponential(sub(load(x + i), set(max)), e));
}

}  // namespace PTK_ISA
}  // namespace ptk
