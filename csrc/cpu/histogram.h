// Counts and masses of ranges of x, where the tokens in question are too many to sort.
#pragma once

namespace ptk {
namespace PTK_ISA {

// Bins of a tile's tokens.
inline void tile_bins(const Binning& binning, const float* x, uint32_t* out) {
  if (!binning.linear) {
    for (int i = 0; i < kTile; ++i) out[i] = binning.bin(x[i]);
    return;
  }
  const F top = set(value_of(binning.high)), bottom = set(value_of(binning.low));
  for (int i = 0; i < kTile; i += kWidth) {
    const F v = load(x + i);
    const U index = to_int_down(min(mul(sub(top, v), set(binning.scale)), set(float(kBins - 1))));
    store_u(out + i, select_u(ge(v, bottom) & ge(top, v), index, set_u(kBins)));
  }
}

// Where tokens lie, guessed from the likeliest tile: its spread, but no more than has any mass.
inline Binning first_binning(const Row& row, uint32_t low, uint32_t high, Exponent e) {
  const float* x = row.tile(row.likeliest_tile());
  float least = row.max;
  for (int i = 0; i < kTile; ++i) {
    if (x[i] > -INFINITY) least = std::min(least, x[i]);
  }
  const float span = std::min({row.max - least, value_of(high) - value_of(low), 46.0f / e.hi});
  return linear_binning(low, high, span);
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
    tile_bins(binning, row.tile(t), bins);
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
