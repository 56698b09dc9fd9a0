// Selection: the kept set is a prefix of the order by (x descending, id ascending).
// Tile maxima bound the cutoff from below; only tokens above the bound are looked at.
#pragma once

namespace ptk {
namespace PTK_ISA {

constexpr float kLowest = -FLT_MAX;  // masked tokens are below it

// A prefix of the order: x > this x, or x equal and id <= this id.
struct Prefix {
  float x;
  uint32_t id;
  uint32_t count;
  uint64_t mass;
};

// A prefix is long enough when it has this many tokens or this much mass.
struct Need {
  uint32_t count;
  uint64_t mass;
  bool met(uint32_t c, uint64_t m) const { return c >= count || m >= mass; }
};

inline uint32_t key_of(float x) { return order_key(std::bit_cast<uint32_t>(x)); }
inline float value_of(uint32_t key) {
  return std::bit_cast<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

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

// Collects the tokens with key in [low, high], in order of id; -1 where they are too many.
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

// Walks n collected tokens in order, after `taken`; true where they meet the need.
inline bool walk(const Row& row, int n, const Need& need, Exponent e, Scratch& s, Prefix& taken) {
  for (int i = 0; i < n; ++i) s.order[i] = uint64_t(key_of(s.x[i])) << 32 | uint32_t(~s.ids[i]);
  std::sort(s.order, s.order + n, std::greater<uint64_t>());
  alignas(64) float x[kTile];
  alignas(64) uint64_t q[kTile];
  for (int start = 0; start < n; start += kTile) {
    const int m = std::min(kTile, n - start);
    for (int i = 0; i < kTile; ++i) x[i] = i < m ? value_of(uint32_t(s.order[start + i] >> 32)) : -INFINITY;
    masses(x, kTile, row.max, e, q);
    for (int i = 0; i < m; ++i) {
      taken = {x[i], uint32_t(~s.order[start + i]), taken.count + 1, taken.mass + q[i]};
      if (need.met(taken.count, taken.mass)) return true;
    }
  }
  return false;
}

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
  int t = 0;
  while (row.tile_max[t] != row.max) ++t;
  float least = row.max;
  for (int i = 0; i < kTile; ++i) {
    if (row.tile(t)[i] > -INFINITY) least = std::min(least, row.tile(t)[i]);
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

// The first tokens, in order of id, with just this key, after `taken`: as many as the need wants.
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
    binning.narrow(b);
    binning = key_binning(binning.low, binning.high);
  }
}

// The lowest x with fl(x - max) >= shift: min_p's threshold as a logit. Rounding is monotone, so
// bisection over the ordered keys finds it.
inline float min_p_cutoff(const Row& row, float shift) {
  uint32_t low = key_of(kLowest), high = key_of(row.max);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (value_of(middle) - row.max >= shift) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return value_of(low);
}

// The kept set of a row that has a token left; see docs/contracts.md, Selection.
inline Prefix select_kept(const Row& row, const RowParams& p, uint64_t total_mass, Scratch& s) {
  const Exponent e = p.exponent;
  const float cutoff = p.min_p_shift > -INFINITY ? min_p_cutoff(row, p.min_p_shift) : kLowest;
  const float low = p.filter_order == kOrderVllm ? cutoff : kLowest;
  const bool top_k = p.top_k < row.count, top_p = p.top_p < kTopPOff;
  const Prefix all{kLowest, UINT32_MAX, row.count, total_mass};
  Prefix kept = all;
  if (p.filter_order == kOrderJoint) {
    const uint64_t mass = top_p ? mass_target(p.top_p, total_mass) : UINT64_MAX;
    if (top_k || top_p) kept = find_prefix(row, low, {p.top_k, mass}, e, s);
  } else {
    if (top_k) {
      kept = find_prefix(row, low, {p.top_k, UINT64_MAX}, e, s);
    } else if (low > kLowest) {
      kept = whole(row, low, e);
    }
    if (top_p) {
      const uint64_t mass = mass_target(p.top_p, kept.mass);
      kept = find_prefix(row, std::max(low, kept.x), {UINT32_MAX, mass}, e, s);
    }
  }
  return kept.x < cutoff ? whole(row, cutoff, e) : kept;
}

// Whether select_kept reads the mass of the whole row.
inline bool needs_total_mass(const RowParams& p, uint32_t count) {
  const bool filtered = p.top_k < count || p.min_p_shift > -INFINITY;
  if (p.filter_order == kOrderJoint) return true;
  return p.filter_order == kOrderVllm ? !filtered : p.top_k >= count;
}

}  // namespace PTK_ISA
}  // namespace ptk
