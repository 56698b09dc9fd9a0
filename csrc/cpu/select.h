// Selection: finds the prefixes of the order (x descending, then id ascending) that filters keep. Tile
// maxima bound x from below; tokens above the bound are collected, put into bins of keys, and sorted. Where they
// are too many, a sample of the row says between which keys the prefix is likely to end: the tokens above are only
// counted, and those between are collected. A wrong guess costs time, nothing else.
#pragma once

namespace ptk {
namespace PTK_ISA {

// The key of the next lower number. That of -0 is passed over: no token has it, and it equals +0.
inline uint32_t below(uint32_t key) { return key == key_of(0.0f) ? key - 2 : key - 1; }

// The tokens with low <= x <= high: a prefix where high is the row's maximum.
inline Prefix between(const Row& row, float low, float high, Exponent e) {
  Prefix all{low, UINT32_MAX, 0, 0};
  for (int t = 0; t < row.tiles; ++t) {
    if (!(row.tile_max[t] >= low)) continue;
    const float* x = row.tile(t);
    Mass sum;
    for (int i = 0; i < kTile; i += kWidth) {
      const F v = load(x + i);
      const uint32_t inside = ge(v, set(low)) & ge(set(high), v);
      if (!inside) {
        sum.add(Digits{});
        continue;
      }
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
  const auto end = s.order + n;
  if (!std::is_sorted(s.order, end, std::greater<uint64_t>())) std::sort(s.order, end, std::greater<uint64_t>());
}
inline float sorted_x(const Scratch& s, int i) { return packed_value(s.order[i]); }
inline uint32_t sorted_id(const Scratch& s, int i) { return packed_id(s.order[i]); }

// Adds n collected tokens to `taken`, in order, until the need is met; returns whether it is. Where they are
// many, they go into bins of keys first, since the prefix ends in one bin.
inline bool walk(const Row& row, int n, const Need& need, Exponent e, Scratch& s, Prefix& taken) {
  while (n > kSorted) {
    std::fill(s.x + n, s.x + n + kWidth, s.x[0]);  // whole vectors
    F least = set(INFINITY), most = set(-INFINITY);
    for (int i = 0; i < n; i += kWidth) least = min(load(s.x + i), least), most = max(load(s.x + i), most);
    const uint32_t high = key_of(reduce_max(most)), low = key_of(-reduce_max(sub(set(0.0f), least)) + 0.0f);
    if (low == high) break;
    const int shift = std::max(0, int(std::bit_width(high - low)) - kBinBits);
    uint32_t counts[kBins] = {};
    uint64_t mass[kBins] = {};
    for (int start = 0; start < n; start += kTile) {
      alignas(64) uint64_t q[kTile];
      const int m = std::min(kTile, n - start);
      masses(s.x + start, (m + kWidth - 1) / kWidth * kWidth, row.max, e, q);
      for (int i = start; i < start + m; ++i) s.bins[i] = (high - key_of(s.x[i])) >> shift;
      for (int i = 0; i < m; ++i) {
        ++counts[s.bins[start + i]];
        mass[s.bins[start + i]] += q[i];
      }
    }
    uint32_t b = 0;
    for (; b < kBins && !need.met(taken.count + counts[b], taken.mass + mass[b]); ++b) {
      taken.count += counts[b];
      taken.mass += mass[b];
    }
    if (b == kBins) return false;
    int kept = 0;
    std::fill(s.bins + n, s.bins + n + kWidth, kBins);
    for (int i = 0; i < n; i += kWidth) {
      const U bins = load_u(s.bins + i);
      const uint32_t inside = le_u(bins, set_u(b)) & le_u(set_u(b), bins);
      if (inside) kept += compress(load(s.x + i), load_u(s.ids + i), inside, s.x + kept, s.ids + kept);
    }
    n = kept;
  }
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

// Adds the tokens with just this x to `taken`, in order of id, until the need is met; returns whether it is.
inline bool take_ties(const Row& row, float value, const Need& need, Exponent e, Prefix& taken) {
  alignas(64) float x[kWidth];
  alignas(64) uint64_t q[kWidth];
  store(x, set(value));
  masses(x, kWidth, row.max, e, q);
  uint64_t wanted = need.count - taken.count;  // all have one mass
  if (q[0] > 0) wanted = std::min(wanted, (need.mass - taken.mass - 1) / q[0] + 1);
  uint64_t found = 0;
  taken.id = UINT32_MAX;
  for (int t = 0; t < row.tiles && found < wanted; ++t) {
    if (!(row.tile_max[t] >= value)) continue;
    for (int i = 0; i < kTile && found < wanted; i += kWidth) {
      uint32_t tied = eq(load(row.tile(t) + i), set(value));
      const uint64_t more = std::min(wanted - found, uint64_t(std::popcount(tied)));
      if ((found += more) < wanted) continue;
      for (uint64_t skipped = 1; skipped < more; ++skipped) tied &= tied - 1;
      taken.id = uint32_t(t) * kTile + uint32_t(i + std::countr_zero(tied));
    }
  }
  taken = {value, taken.id, taken.count + uint32_t(found), taken.mass + found * q[0]};
  return found == wanted;
}

// A value of x that the shortest prefix meeting `need` does not go below. The tiles' maxima are tokens, too:
// above any value, they alone count at least so many tokens and at least so much mass.
inline float tile_bound(const Row& row, float low, const Need& need, Exponent e, Scratch& s) {
  uint32_t counts[kBins] = {};
  uint64_t mass[kBins] = {};
  alignas(64) uint64_t q[kTile];
  const float scale = 8.0f * e.hi;  // bins of an eighth of a factor 2 in mass
  for (int t0 = 0; t0 < row.tiles; t0 += kTile) {
    const int n = std::min(kTile, row.tiles - t0);
    masses(row.tile_max + t0, (n + kWidth - 1) / kWidth * kWidth, row.max, e, q);
    for (int i = 0; i < n; ++i) {
      if (!(row.tile_max[t0 + i] >= low)) continue;
      const float steps = (row.max - row.tile_max[t0 + i]) * scale;
      const int bin = steps < float(kBins - 1) ? int(steps) : kBins - 1;
      s.bins[t0 + i] = uint32_t(bin);
      ++counts[bin];
      mass[bin] += q[i];
    }
  }
  uint32_t count = 0;
  uint64_t sum = 0;
  for (int b = 0; b < kBins; ++b) {
    if (!need.met(count += counts[b], sum += mass[b])) continue;
    float bound = row.max;
    for (int t = 0; t < row.tiles; ++t) {
      const float m = row.tile_max[t];
      if (m >= low && s.bins[t] <= uint32_t(b) && m < bound) bound = m;
    }
    return bound;
  }
  return low;
}

// A sample of a row in the scratch: a vector of every step-th tile, from another place each time.
struct Sample {
  int n = 0;
  float each;   // tokens that a sampled one stands for
  float total;  // estimate of the mass of the tokens with x >= low, in masses of the likeliest
  Sample(const Row& row, float low, Exponent e, Scratch& s) {
    const int step = (row.tiles * kSampled + kCandidates - 1) / kCandidates;
    F all = set(0.0f);
    for (int t = 0; t < row.tiles; t += step, n += kSampled) {
      const float* x = row.tile(t) + (t / step * 5 * kSampled) % kTile;
      for (int i = 0; i < kSampled; i += kWidth) {
        const F v = load(x + i), p = exponential(sub(v, set(row.max)), e);
        // So squares are normal numbers, too.
        const F part = select(ge(v, set(low)) & ge(p, set(0x1p-60f)), p, set(0.0f));
        all = add(all, part);
        store(s.x + n + i, v);
        store(s.p + n + i, part);
      }
    }
    each = float(row.tiles) * float(kTile) / float(n);
    total = reduce_halves(all) * each;
  }
};

// Keys between which a prefix is expected to end.
struct Guess {
  uint32_t low, high;
};

// Guesses from a sample where in [low, high] the prefix ends that meets the need. `total` is the mass of what was
// sampled: the tail's mass is what is estimated, since its many tokens are alike, where the head's few are not.
inline Guess guess_end(const Sample& sample, float total, uint32_t low, uint32_t high, const Need& need,
                       const Scratch& s) {
  const int n = sample.n;
  const float each = sample.each;
  const float wanted_count = float(need.count), wanted_mass = float(need.mass) * 0x1p-44f;
  struct Estimate {
    uint32_t key;
    float count, mass;  // of the tokens from this key on
  } estimates[32];
  int steps = 0;
  float count_slack = 0.0f, mass_slack = 0.0f;  // two standard deviations of the last estimate
  int least = 0, most = n;                      // sampled tokens above `to`, and from `from` on
  for (uint32_t from = low, to = high; from < to && most - least > kSampled;) {
    const uint32_t key = from + (to - from) / 2 + 1;
    F mass = set(0.0f), square = mass;
    int count = 0;
    for (int i = 0; i < n; i += kWidth) {
      const uint32_t above = ge(load(s.x + i), set(value_of(key)));
      const F p = select(above, set(0.0f), load(s.p + i));
      count += std::popcount(above);
      mass = add(mass, p);
      square = fma(p, p, square);
    }
    const Estimate& at = estimates[steps++] = {key, each * float(count), total - each * reduce_halves(mass)};
    count_slack = 2.0f * each * std::sqrt(float(std::min(count, n - count) + 1));
    mass_slack = 2.0f * each * std::sqrt(reduce_halves(square));
    if (at.count >= wanted_count || at.mass >= wanted_mass) {
      from = key, most = count;
    } else {
      to = below(key), least = count;
    }
  }
  Guess guess{low, high};
  for (const Estimate& at : std::span(estimates, steps)) {
    const bool met = at.count - count_slack >= wanted_count || at.mass - mass_slack >= wanted_mass;
    const bool missed = at.count + count_slack < wanted_count && at.mass + mass_slack < wanted_mass;
    if (met) guess.low = std::max(guess.low, at.key);
    if (missed) guess.high = std::min(guess.high, below(at.key));
  }
  return guess;
}

// A key of (bottom, to] near the middle of the tokens that were collected from [bottom, to], too many.
inline uint32_t middle_key(const Scratch& s, uint32_t bottom, uint32_t to) {
  constexpr int kSome = 64;
  float some[kSome];
  for (int i = 0; i < kSome; ++i) some[i] = s.x[i * ((kCandidates - kSampled) / kSome)];
  std::nth_element(some, some + kSome / 2, some + kSome);
  return std::clamp(key_of(some[kSome / 2]), bottom + 1, to);
}

// Whether the masses of the tiles' likeliest tokens are much alike.
inline bool is_flat(const Row& row, Exponent e) {
  F sum = set(0.0f);
  for (int t = 0; t < row.tiles; t += kWidth) {
    sum = add(sum, exponential(sub(load(row.tile_max + t), set(row.max)), e));
  }
  return 8.0f * reduce_halves(sum) > float(row.tiles);
}

// Guesses before the row's mass is known where top_p cuts.
inline Guess guess_cut(const Row& row, const RowParams& p, Scratch& s) {
  const Sample sample(row, kLowest, p.exponent, s);
  const Need need{UINT32_MAX, mass_target(p.top_p, uint64_t(sample.total * 0x1p44f))};
  return guess_end(sample, sample.total, key_of(kLowest), key_of(row.max), need, s);
}

// What is known of a row before a prefix is looked for.
struct Known {
  Prefix all;    // it lies in this one, whose mass is 0 where it is not known
  bool guessed;  // whether there is a guess where it ends, and `upper` are the tokens above
  Guess guess;
  Prefix upper;
};

// The shortest prefix of the tokens with x >= low that meets the need; all of them where none does.
inline Prefix find_prefix(const Row& row, float low, const Need& need, Exponent e, const Known& known,
                          Scratch& s) {
  // The prefix ends in [from, to], and `taken` are the tokens above. It is looked for in [bottom, to].
  uint32_t from = key_of(tile_bound(row, low, need, e, s)), to = key_of(row.max), bottom = from;
  Prefix taken{row.max, UINT32_MAX, 0, 0};
  Guess guess{from, to};
  for (bool first = true;; first = false) {
    const int n = collect(row, bottom, to, s);
    if (n < 0 && bottom < to) {
      const bool split = first && known.guessed;
      if (first) {
        guess = known.guess;
        if (!split) {
          const Sample sample(row, known.all.x, e, s);
          const float total = known.all.mass > 0 ? float(known.all.mass) * 0x1p-44f : sample.total;
          guess = guess_end(sample, total, from, to, need, s);
        }
        bottom = std::max(from, guess.low);
      }
      const uint32_t pivot = first ? guess.high + 1 : middle_key(s, bottom, to);
      if (pivot <= from || pivot > to) continue;
      const Prefix upper = split ? known.upper : between(row, value_of(pivot), value_of(to), e);
      if (need.met(taken.count + upper.count, taken.mass + upper.mass)) {
        bottom = from = pivot;
      } else {
        taken.count += upper.count;
        taken.mass += upper.mass;
        to = below(pivot);
      }
      continue;
    }
    if (n < 0 ? take_ties(row, value_of(to), need, e, taken) : walk(row, n, need, e, s, taken)) return taken;
    if (bottom == from) return {low, UINT32_MAX, taken.count, taken.mass};
    to = below(bottom);
    bottom = from < guess.low && guess.low <= to ? guess.low : from;
  }
}

// The prefixes of one row, for ptk::select_kept: each lies in the one before.
struct Search {
  const Row& row;
  Exponent e;
  Scratch& s;
  Known known;
  Prefix find(float low, const Need& need) { return found(find_prefix(row, low, need, e, known, s)); }
  Prefix whole(float low) { return found(between(row, low, row.max, e)); }

 private:
  Prefix found(const Prefix& prefix) {
    known = {prefix, false, {}, {}};
    return prefix;
  }
};

}  // namespace PTK_ISA
}  // namespace ptk
