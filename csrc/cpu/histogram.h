// Counts and masses of ranges of x, where the tokens in question are too many to sort.
#pragma once

namespace ptk {
namespace PTK_ISA {

// How the range [low, high] of keys is cut into bins, highest first; monotone in x. The first cut is
// linear in x, which spreads even noise evenly; later ones are of the key's bits, which always end.
struct Binning {
  uint32_t low, high;
  bool linear;
  float scale;  // linear: bins per unit of x
  int shift;    // else: bits of the key that a bin spans

  // Not past the last bin; kBins for what is outside the range.
  uint32_t bin(float x) const {
    const uint32_t key = key_of(x);
    if (key < low || key > high) return kBins;
    if (!linear) return (high - key) >> shift;
    const float steps = (value_of(high) - x) * scale;
    return steps < float(kBins - 1) ? uint32_t(steps) : kBins - 1;
  }
  void bins(const float* x, uint32_t* out) const {
    if (!linear) {
      for (int i = 0; i < kTile; ++i) out[i] = bin(x[i]);
      return;
    }
    const F top = set(value_of(high)), bottom = set(value_of(low));
    for (int i = 0; i < kTile; i += kWidth) {
      const F v = load(x + i);
      const U index = to_int_down(min(mul(sub(top, v), set(scale)), set(float(kBins - 1))));
      store_u(out + i, select_u(ge(v, bottom) & ge(top, v), index, set_u(kBins)));
    }
  }
  // The keys of one bin: lowest with bin <= b, highest with bin >= b.
  void narrow(uint32_t b) {
    uint32_t from = low, to = high;
    for (uint32_t below = high; from < below;) {
      const uint32_t middle = from + (below - from) / 2;
      if (bin(value_of(middle)) <= b) below = middle; else from = middle + 1;
    }
    for (uint32_t above = low; above < to;) {
      const uint32_t middle = to - (to - above) / 2;
      if (bin(value_of(middle)) >= b) above = middle; else to = middle - 1;
    }
    low = from;
    high = to;
  }
};

// Where tokens lie, guessed from the likeliest tile: its spread, but no more than has any mass.
inline Binning first_binning(const Row& row, uint32_t low, uint32_t high, Exponent e) {
  const float* x = row.tile(row.likeliest_tile());
  float least = row.max;
  for (int i = 0; i < kTile; ++i) {
    if (x[i] > -INFINITY) least = std::min(least, x[i]);
  }
  const float span = std::min({row.max - least, value_of(high) - value_of(low), 46.0f / e.hi});
  const float scale = float(kBins) / span;  // inf where the spread is 0
  return {low, high, scale < FLT_MAX, scale, 0};
}

inline Binning key_binning(uint32_t low, uint32_t high) {
  return {low, high, false, 0.0f, std::max(0, int(std::bit_width(high - low)) - kBinBits)};
}

// Counts and masses by bin. Neighbours count in tables of their own: flat rows put them into one bin,
// and each addition would wait for the one before.
inline void histogram(const Row& row, const Binning& binning, Exponent e, Scratch& s) {
  std::memset(s.counts, 0, sizeof(s.counts));
  std::memset(s.mass, 0, sizeof(s.mass));
  alignas(64) uint64_t q[kTile];
  alignas(64) uint32_t bins[kTile];
  for (int t = 0; t < row.tiles; ++t) {
    if (!(row.tile_max[t] >= value_of(binning.low))) continue;
    masses(row.tile(t), kTile, row.max, e, q);
    binning.bins(row.tile(t), bins);
    for (int i = 0; i < kTile; i += kTables) {
      for (int j = 0; j < kTables; ++j) {
        ++s.counts[j][bins[i + j]];
        s.mass[j][bins[i + j]] += q[i + j];
      }
    }
  }
  for (int j = 1; j < kTables; ++j) {
    for (uint32_t b = 0; b < kBins; ++b) {
      s.counts[0][b] += s.counts[j][b];
      s.mass[0][b] += s.mass[j][b];
    }
  }
}

}  // namespace PTK_ISA
}  // namespace ptk
