// A rank's part of a row whose vocabulary is spread over several ranks (docs/sharded.md). Tiles begin at
// multiples of kTile in the whole vocabulary, wherever the part starts: noise is keyed by those ids.
#pragma once

namespace ptk {
namespace PTK_ISA {

// Calls body(x, first id) for each tile that the part touches, x aligned, -inf outside the part.
template <typename Body>
void over_shard(const ShardRow& row, Body body) {
  if (row.size == 0) return;
  alignas(64) float tile[kTile];
  const int64_t end = row.start + row.size;
  for (int64_t first = row.start / kTile * kTile; first < end; first += kTile) {
    const int64_t from = std::max(first, row.start), to = std::min(first + kTile, end);
    if (to - from < kTile) std::fill(tile, tile + kTile, -INFINITY);
    std::memcpy(tile + (from - first), row.x + (from - row.start), size_t(to - from) * sizeof(float));
    body(tile, uint32_t(first));
  }
}

// Masks NaN; where the row has a +inf, leaves its tokens as 0 and masks the others. Returns the
// tile's maximum.
inline float clean_tile(float* tile, bool infinite) {
  const F masked = set(-INFINITY);
  F top = masked;
  for (int i = 0; i < kTile; i += kWidth) {
    F x = load(tile + i);
    x = infinite ? select(eq(x, set(INFINITY)), set(0.0f), masked) : select(gt(x, masked), x, masked);
    store(tile + i, x);
    top = max(top, x);
  }
  return reduce_max(top);
}

inline int64_t scan_shard(const ShardRow& row) {
  uint32_t live = 0, infinite = 0, nan = 0;
  float top = -INFINITY;
  over_shard(row, [&](float* tile, uint32_t) {
    for (int i = 0; i < kTile; i += kWidth) {
      const F x = load(tile + i);
      live += uint32_t(std::popcount(gt(x, set(-INFINITY))));
      infinite += uint32_t(std::popcount(eq(x, set(INFINITY))));
      nan |= is_nan(x);
    }
    top = std::max(top, clean_tile(tile, false));
  });
  const int64_t key = key_of(top + 0.0f);
  const uint32_t count = infinite ? infinite : live;
  return key << (kSummaryCountBits + 1) | int64_t(nan != 0) << kSummaryCountBits | count;
}

// The mass of a tile's tokens in the masks.
inline uint64_t masked_mass(const float* x, const uint32_t* masks, float max, Exponent e) {
  Mass sum;
  for (int i = 0; i < kTile; i += kWidth) {
    const F inside = select(masks[i / kWidth], load(x + i), set(-INFINITY));
    sum.add(exponential(sub(inside, set(max)), e));
  }
  return sum.total();
}

inline Prefix prefix_of(int64_t lowest_kept, uint64_t mass = 0) {
  return {key_value(lowest_kept), key_id(lowest_kept), 0, mass};
}

inline int64_t best_key(const Best& best, int64_t bit = 0) {
  return best.id == UINT32_MAX ? 0 : token_key(best.score, best.id) | bit;
}

// The x that the best token counts with.
inline float best_x(const Best& best, const ShardRow& row, const RowHead& head) {
  if (best.id == UINT32_MAX) return -INFINITY;
  return head.infinite ? 0.0f : row.x[best.id - row.start];
}

// Offers the tile's first maximum.
inline void take_highest(Best& best, const float* tile, uint32_t first, float tile_max) {
  if (!(tile_max > best.score)) return;
  uint32_t i = 0;
  while (tile[i] != tile_max) ++i;
  best.offer(tile_max, first + i);
}

inline int64_t packed_count(uint32_t count, float x) {
  return int64_t(uint64_t(count) << 32 | std::bit_cast<uint32_t>(x));
}

// Counts, masses and draw of the tokens whose key is at least `lowest_kept` and that min_p keeps; greedy rows
// go by x alone. Writes kWords words; `drawn`: whether there is a draw.
inline void draw_shard(const ShardRow& row, const RowHead& head, const RowParams& p,
                       const NoiseKey& key, int64_t lowest_kept, bool drawn, int64_t* words) {
  const Exponent one = make_exponent(1.0);
  const bool same = p.exponent.hi == one.hi && p.exponent.lo == one.lo;
  const Prefix kept = prefix_of(lowest_kept);
  const bool all = lowest_kept == kLowestKey && !(p.min_p_shift > -INFINITY);
  uint32_t count = 0;
  uint64_t kept_mass = 0, mass = 0, raw = 0;
  Draw winner(key);
  over_shard(row, [&](float* tile, uint32_t first) {
    const float tile_max = clean_tile(tile, head.infinite);
    if (!massless(tile_max, head.max, p.exponent)) mass += tile_mass(tile, head.max, p.exponent);
    if (!same && !massless(tile_max, head.max, one)) raw += tile_mass(tile, head.max, one);
    if (p.greedy) return take_highest(winner.best, tile, first, tile_max);
    if (!(tile_max >= kept.x)) return;
    uint32_t masks[kTile / kWidth];
    for (int i = 0; i < kTile; i += kWidth) {
      const F x = load(tile + i);
      const uint32_t likely = ge(sub(x, set(head.max)), set(p.min_p_shift));
      masks[i / kWidth] = kept_mask(x, first + uint32_t(i), kept) & likely;
      count += uint32_t(std::popcount(masks[i / kWidth]));
    }
    if (!all) kept_mass += masked_mass(tile, masks, head.max, p.exponent);
    if (!drawn) return;
    winner.take_tile(
        first, (tile_max - head.max) * p.inv_temperature,
        [&](int i) { return mul(sub(load(tile + i), set(head.max)), set(p.inv_temperature)); },
        [&](int i) { return masks[i / kWidth]; });
  });
  winner.flush();
  words[kWordBest] = best_key(winner.best);
  words[kWordCount] = packed_count(count, best_x(winner.best, row, head));
  words[kWordKeptMass] = int64_t(all ? mass : kept_mass);
  words[kWordMass] = int64_t(mass);
  words[kWordRawMass] = int64_t(same ? mass : raw);
}

// Draws from max(0, target - draft), or from the target where this part has nothing of that: then another
// rank's draw from the residual goes first. Writes kResidualWords words.
inline void residual_shard(const ShardSide& target, const ShardSide& draft, const RowParams& p,
                           const NoiseKey& key, int64_t* words) {
  const bool drawable = draft.head.count > 0;
  const Side ours{target.head.max, prefix_of(target.lowest_kept, target.kept_mass)};
  const Side theirs{draft.head.max, prefix_of(draft.lowest_kept, draft.kept_mass)};
  Draw residual(key), plain(key);
  alignas(64) float draft_tile[kTile];
  over_shard(target.row, [&](float* tile, uint32_t first) {
    const float tile_max = clean_tile(tile, target.head.infinite);
    if (!(tile_max >= ours.kept.x)) return;
    if (drawable) {
      const int64_t from = std::max<int64_t>(first, draft.row.start);
      const int64_t to = std::min<int64_t>(first + kTile, draft.row.start + draft.row.size);
      std::fill(draft_tile, draft_tile + kTile, -INFINITY);
      std::memcpy(draft_tile + (from - first), draft.row.x + (from - draft.row.start),
                  size_t(to - from) * sizeof(float));
      clean_tile(draft_tile, draft.head.infinite);
    }
    const ResidualTile rest(tile, ours, draft_tile, drawable ? &theirs : nullptr, p.exponent, first);
    residual.take_tile(first, 0.0f, [&](int i) { return rest.score(i); }, [&](int i) { return rest.mask(i); });
    if (residual.best.id != UINT32_MAX) return;
    if (p.greedy) return take_highest(plain.best, tile, first, tile_max);
    plain.take_tile(
        first, (tile_max - target.head.max) * p.inv_temperature,
        [&](int i) { return mul(sub(load(tile + i), set(target.head.max)), set(p.inv_temperature)); },
        [&](int i) { return kept_mask(load(tile + i), first + uint32_t(i), ours.kept); });
  });
  residual.flush();
  plain.flush();
  const bool found = residual.best.id != UINT32_MAX;
  const Best& best = found ? residual.best : plain.best;
  words[kWordBest] = best_key(best, found ? kResidualBit : 0);
  words[kWordCount] = packed_count(0, best_x(best, target.row, target.head));
}

inline void key_masses(const int64_t* keys, int64_t n, float max, Exponent e, uint64_t* out) {
  alignas(64) float x[kTile];
  alignas(64) uint64_t q[kTile];
  for (int64_t start = 0; start < n; start += kTile) {
    const int m = int(std::min<int64_t>(kTile, n - start));
    // No key of the row lies above its maximum; one that did would have a mass past 64 bits.
    for (int i = 0; i < kTile; ++i) x[i] = i < m ? std::min(key_value(keys[start + i]), max) : -INFINITY;
    masses(x, kTile, max, e, q);
    std::copy(q, q + m, out + start);
  }
}

// The key of the listed token with the best score.
inline int64_t gumbel_max_keys(const int64_t* keys, int64_t n, float max, const RowParams& p,
                         const NoiseKey& noise) {
  Best best;
  int64_t winner = 0;
  alignas(64) float x[kWidth], u[kWidth], score[kWidth];
  for (int64_t start = 0; start < n; start += kWidth) {
    const int m = int(std::min<int64_t>(kWidth, n - start));
    for (int i = 0; i < kWidth; ++i) {
      const int64_t key = keys[start + std::min(i, m - 1)];
      x[i] = key_value(key);
      u[i] = uniform_of(noise, key_id(key));
    }
    const F scaled = mul(sub(load(x), set(max)), set(p.inv_temperature));
    store(score, add(scaled, gumbel(load(u))));
    for (int i = 0; i < m; ++i) {
      best.offer(score[i], key_id(keys[start + i]));
      if (best.id == key_id(keys[start + i])) winner = keys[start + i];
    }
  }
  return winner;
}

constexpr ShardKernels kShardKernels = {scan_shard, draw_shard, residual_shard, key_masses, gumbel_max_keys};

}  // namespace PTK_ISA
}  // namespace ptk
