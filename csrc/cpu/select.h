// Selection: finds the prefixes of the order (x descending, then id ascending) that filters keep. Tile
// maxima bound x from below; only tokens above the bound are looked at. They are sorted, or counted by bins
// of x where they are too many.
#pragma once

namespace ptk {
namespace PTK_ISA {

// All tokens with x >= low.
inline Prefix whole(const Row& row, float low, Exponent e) {
  Prefix all{low, UINT32_MAX, 0, 0};
  for (int t = 0; t < row.tiles; ++t) {
    if (!(row.tile_max[t] >= low)) continue;
    const float* x = row.tile(t);
    Mass sum;
    for (int i = 0; i < kTile; i += kWidth) {
      const F v = load(x + i);
      const uint32_t inside = ge(v, set(low));
      all.count += uint32_t(std::popcount(inside));
      sum.add(exponential(sub(select(inside, v, set(-INFINITY)), set(row.max)), e));
    }
    all.mass += sum.total();
  }
  return all;
}

// Collects the tokens whose key is in [low, high], in order of id; returns -1 where there are too many.
inline int collect(const Row& row, uint32_t low, uint32_t high, Scratch& s) {
  const F from = set(value_of(low)), to = set(value_of(high));
  int n = 0;
  for (int t = 0; t < row.tiles; ++t) {
    if (!(row.tile_max[t] >= value_of(low))) continue;
    const float* x = row.tile(t);
    for (int i = 0; i < kTile; i += kWidth) {
      const F v = load(x + i);
      const uint32_t inside = ge(v, from) & ge(to, v);
      if (!inside) continue;
      if (n + kWidth > kCandidates) return -1;
      const U id = add_u(set_u(uint32_t(t) * kTile + uint32_t(i)), iota());
      n += compress(v, id, inside, s.x + n, s.ids + n);
    }
  }
  return n;
}

// Sorts n collected tokens by x descending, then id ascending, into s.order.
inline void sort_collected(int n, Scratch& s) {
  for (int i = 0; i < n; ++i) s.order[i] = pack(s.x[i], s.ids[i]);
  std::sort(s.order, s.order + n, std::greater<uint64_t>());
}
inline float sorted_x(const Scratch& s, int i) { return packed_value(s.order[i]); }
inline uint32_t sorted_id(const Scratch& s, int i) { return packed_id(s.order[i]); }

// Adds n collected tokens to `taken`, in order, until the need is met; returns whether it is.
inline bool walk(const Row& row, int n, const Need& need, Exponent e, Scratch& s, Prefix& taken) {
  sort_collected(n, s);
  alignas(64) float x[kTile];
  alignas(64) uint64_t q[kTile];
  for (int start = 0; start < n; start += kTile) {
    const int m = std::min(kTile, n - start);
    for (int i = 0; i < kTile; ++i) x[i] = i < m ? sorted_x(s, start + i) : -INFINITY;
    masses(x, kTile, row.max, e, q);
    for (int i = 0; i < m; ++i) {
      taken = {x[i], sorted_id(s, start + i), taken.count + 1, taken.mass + q[i]};
      if (need.met(taken.count, taken.mass)) return true;
    }
  }
  return false;
}

// Adds the tokens with just this key to `taken`, in order of id, until the need is met.
inline void take_ties(const Row& row, uint32_t key, const Need& need, Exponent e, Prefix& taken) {
  const float value = value_of(key);
  alignas(64) float x[kWidth];
  alignas(64) uint64_t q[kWidth];
  store(x, set(value));
  masses(x, kWidth, row.max, e, q);
  for (int64_t id = 0; id < row.vocab_size; ++id) {
    if (row.x[id] != value) continue;
    taken = {value, uint32_t(id), taken.count + 1, taken.mass + q[0]};
    if (need.met(taken.count, taken.mass)) return;
  }
}

// A value of x that the shortest prefix meeting `need` does not go below. The tiles' maxima are tokens, too:
// above any value, they alone count at least so many tokens and at least so much mass.
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

// The bins of a tile's tokens.
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

// Guesses from the likeliest tile where the tokens lie: over its spread, but no further down than any mass.
inline Binning first_binning(const Row& row, uint32_t low, uint32_t high, Exponent e) {
  const float* x = row.tile(row.likeliest_tile());
  float least = row.max;
  for (int i = 0; i < kTile; ++i) {
    if (x[i] > -INFINITY) least = std::min(least, x[i]);
  }
  const float span = std::min({row.max - least, value_of(high) - value_of(low), 46.0f / e.hi});
  return linear_binning(low, high, span);
}

// Counts and masses by bin. Neighbouring tokens add to different tables: in flat rows they fall into one
// bin, and each addition would wait for the one before.
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

// The shortest prefix of the tokens with x >= low that meets the need; all of them where none does.
inline Prefix find_prefix(const Row& row, float low, const Need& need, Exponent e, Scratch& s) {
  const uint32_t bound = key_of(tile_bound(row, low, need, e, s));
  Binning binning = first_binning(row, bound, key_of(row.max), e);
  Prefix taken{row.max, UINT32_MAX, 0, 0};
  while (true) {
    const int n = collect(row, binning.low, binning.high, s);
    if (n >= 0) {
      if (walk(row, n, need, e, s, taken)) return taken;
      return {low, UINT32_MAX, taken.count, taken.mass};
    }
    if (binning.low == binning.high) {
      take_ties(row, binning.low, need, e, taken);
      return taken;
    }
    histogram(row, binning, e, s);
    uint32_t b = 0;
    for (; b < kBins && !need.met(taken.count + s.counts[0][b], taken.mass + s.mass[0][b]); ++b) {
      taken.count += s.counts[0][b];
      taken.mass += s.mass[0][b];
    }
    if (b == kBins) return {low, UINT32_MAX, taken.count, taken.mass};
    binning.zoom_into(b);
    binning = key_binning(binning.low, binning.high);
  }
}

// The prefixes of one row, for ptk::select_kept.
struct Search {
  const Row& row;
  Exponent e;
  Scratch& s;
  Prefix find(float low, const Need& need) { return find_prefix(row, low, need, e, s); }
  Prefix whole(float low) { return PTK_ISA::whole(row, low, e); }
};

}  // namespace PTK_ISA
}  // namespace ptk
