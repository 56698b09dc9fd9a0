// A row's likeliest tokens, in order, with their raw logprobs: whatever the filters keep.
#pragma once

namespace ptk {
namespace PTK_ISA {

// log of the row's probability of a token with logit x, at temperature 1 and with no filter.
inline float raw_logprob(const Row& row, float x, double log_raw_mass) {
  return float(double(x - row.max) - log_raw_mass);
}

// Collects the tokens of a prefix of at most kMaxTop, in order of id; returns their number.
inline int collect_prefix(const Row& row, const Prefix& prefix, Scratch& s) {
  static_assert(kMaxTop + kWidth <= kCandidates, "compress writes whole vectors");
  int n = 0;
  for (int t = 0; t < row.tiles && n < int(prefix.count); ++t) {
    if (!(row.tile_max[t] >= prefix.x)) continue;
    const float* x = row.tile(t);
    for (int i = 0; i < kTile; i += kWidth) {
      const F v = load(x + i);
      const uint32_t id = uint32_t(t) * kTile + uint32_t(i);
      const uint32_t inside = kept_mask(v, id, prefix);
      if (inside) n += compress(v, add_u(set_u(id), iota()), inside, s.x + n, s.ids + n);
    }
  }
  return n;
}

// Writes the first top.count tokens of the order of a row that has a token left; -1 and NaN where
// it has fewer.
inline void write_top(const Row& row, double log_raw_mass, const TopTokens& top, Scratch& s) {
  const Need need{uint32_t(top.count), UINT64_MAX};
  const Prefix prefix = find_prefix(row, kLowest, need, make_exponent(1.0), s);
  const int n = collect_prefix(row, prefix, s);
  sort_collected(n, s);
  for (int i = 0; i < n; ++i) {
    top.put(i, sorted_id(s, i), raw_logprob(row, sorted_x(s, i), log_raw_mass));
  }
  for (int i = n; i < top.count; ++i) top.put(i, -1, NAN);
}

}  // namespace PTK_ISA
}  // namespace ptk
