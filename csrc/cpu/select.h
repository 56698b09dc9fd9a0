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
  for (int i = 0; i < n; ++i) s.order[i] = pack(s.x[i], s.ids[i]);
  std::sort(s.order, s.order + n, std::greater<uint64_t>());
}
inline float sorted_x(const Scratch& s, int i) { return packed_value(s.order[i]); }
inline uint32_t sorted_id(const Scratch& s, int i) { return packed_id(s.order[i]); }

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

// One row's prefixes, for ptk::select_kept.
struct Search {
  const Row& row;
  Exponent e;
  Scratch& s;
  Prefix find(float low, const Need& need) { return find_prefix(row, low, need, e, s); }
  Prefix whole(float low) { return PTK_ISA::whole(row, low, e); }
};

}  // namespace PTK_ISA
}  // namespace ptk
