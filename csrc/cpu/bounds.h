// What the tiles' maxima say of a prefix's cutoff without a look at the tokens.
#pragma once

namespace ptk {
namespace PTK_ISA {

// A value that the last token of the shortest prefix meeting `need` is not below. The tiles' maxima
// are tokens themselves: those above a value bound the count and the mass above it from below.
inline float tile_bound(const Row& row, float low, const Need& need, Exponent e, Scratch& s) {
  uint32_t counts[kBoundBins] = {};
  uint64_t mass[kBoundBins] = {};
  alignas(64) uint64_t q[kTile];
  const float scale = 8.0f * e.hi;  // bins of an eighth of a factor 2 in mass
  for (int t0 = 0; t0 < row.tiles; t0 += kTile) {
    const int n = std::min(kTile, row.tiles - t0);
    masses(row.tile_max + t0, (n + kWidth - 1) / kWidth * kWidth, row.max, e, q);
    for (int i = 0; i < n; ++i) {
      if (!(row.tile_max[t0 + i] >= low)) continue;
      const float steps = (row.max - row.tile_max[t0 + i]) * scale;
      const int bin = steps < float(kBoundBins - 1) ? int(steps) : kBoundBins - 1;
      s.bins[t0 + i] = uint8_t(bin);
      ++counts[bin];
      mass[bin] += q[i];
    }
  }
  uint32_t count = 0;
  uint64_t sum = 0;
  for (int b = 0; b < kBoundBins; ++b) {
    if (!need.met(count += counts[b], sum += mass[b])) continue;
    float bound = row.max;
    for (int t = 0; t < row.tiles; ++t) {
      const float m = row.tile_max[t];
      if (m >= low && s.bins[t] <= b && m < bound) bound = m;
    }
    return bound;
  }
  return low;
}

}  // namespace PTK_ISA
}  // namespace ptk
