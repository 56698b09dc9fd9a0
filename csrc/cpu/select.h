// Selection: the kept set is a prefix of the order by (x descending, id ascending).
// Tile maxima bound the cutoff from below; only tokens above the bound are looked at.
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

// Sorts n collected tokens by x descending, then id ascending, into s.order.
inline void sort_collected(int n, Scratch& s) {
  for (int i = 0; i < n; ++i) s.order[i] = uint64_t(key_of(s.x[i])) << 32 | uint32_t(~s.ids[i]);
  std::sort(s.order, s.order + n, std::greater<uint64_t>());
}
inline float sorted_x(const Scratch& s, int i) { return value_of(uint32_t(s.order[i] >> 32)); }
inline uint32_t sorted_id(const Scratch& s, int i) { return uint32_t(~s.order[i]); }

// Walks n collected tokens in order, after `taken`; true where they meet the need.
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

// The kept set of a row that has a token left; see docs/contracts.md, Selection. `total_mass` is the
// whole row's, where needs_total_mass says so.
inline Prefix select_kept(const Row& row, const RowParams& p, uint64_t total_mass, Scratch& s) {
  const Exponent e = p.exponent;
  const float cutoff = p.min_p_shift > -INFINITY ? min_p_cutoff(row, p.min_p_shift) : kLowest;
  const float low = p.filter_order == kOrderVllm ? cutoff : kLowest;
  const bool top_k = p.top_k < row.count, top_p = p.top_p < kTopPOff;
  Prefix kept{kLowest, UINT32_MAX, row.count, total_mass};
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
      const Need need{UINT32_MAX, mass_target(p.top_p, kept.mass)};
      kept = find_prefix(row, std::max(low, kept.x), need, e, s);
    }
  }
  return kept.x < cutoff ? whole(row, cutoff, e) : kept;
}

// Whether select_kept reads the mass of the whole row.
inline bool needs_total_mass(const RowParams& p, uint32_t count) {
  const bool min_p = p.min_p_shift > -INFINITY;
  if (p.filter_order == kOrderJoint) return true;
  return p.top_k >= count && !(p.filter_order == kOrderVllm && min_p);
}

}  // namespace PTK_ISA
}  // namespace ptk
