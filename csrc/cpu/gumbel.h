// The draw by keyed Gumbel noise: the argmax of score + noise over the kept tokens.
#pragma once

namespace ptk {
namespace PTK_ISA {

// Philox of kWidth counters c0; four words each.
inline void philox(const NoiseKey& key, U c0, U words[4]) {
  U c1 = set_u(key.position_lo), c2 = set_u(key.position_hi), c3 = set_u(key.last(0));
  uint32_t k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U high0, low0, high1, low1;
    multiply(c0, kPhiloxMultiplier0, high0, low0);
    multiply(c2, kPhiloxMultiplier1, high1, low1);
    c0 = xor_u(xor_u(high1, c1), set_u(k0));
    c1 = low1;
    c2 = xor_u(xor_u(high0, c3), set_u(k1));
    c3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Words of the kTile consecutive tokens from `first`, a multiple of kTile.
inline void tile_words(const NoiseKey& key, uint32_t first, uint32_t* out) {
  for (int i = 0; i < kTile; i += 4 * kWidth) {
    U words[4], ordered[4];
    philox(key, add_u(set_u((first + uint32_t(i)) >> 2), iota()), words);
    interleave4(words, ordered);
    for (int w = 0; w < 4; ++w) store_u(out + i + w * kWidth, ordered[w]);
  }
}

// The best token so far: highest score, lowest id on ties.
struct Best {
  float score = -INFINITY;
  uint32_t id = UINT32_MAX;
  void offer(float s, uint32_t i) {
    if (s > score || (s == score && i < id)) score = s, id = i;
  }
};

// Offers kWidth tokens: score + noise of their words, where the mask says so.
inline void offer(const NoiseKey& key, F score, U word, U id, uint32_t mask, Best& best) {
  const uint32_t zero = le_u(word, set_u(0)) & mask;
  F u = uniform(word, 0x1p-32f);
  alignas(64) float us[kWidth];
  alignas(64) uint32_t ids[kWidth];
  store_u(ids, id);
  if (zero) {  // once in 2^32 tokens
    store(us, u);
    for (uint32_t m = zero; m; m &= m - 1) {
      const int lane = std::countr_zero(m);
      us[lane] = uniform_of(key, ids[lane]);
    }
    u = load(us);
  }
  const F total = add(score, gumbel(u));
  uint32_t wins = ge(total, set(best.score)) & mask;
  if (!wins) return;
  store(us, total);
  for (; wins; wins &= wins - 1) {
    const int lane = std::countr_zero(wins);
    best.offer(us[lane], ids[lane]);
  }
}

constexpr uint32_t kParallelDraw = 8192;  // fewer kept tokens are not worth waking other threads for
constexpr int kSparse = 24;  // for fewer kept tokens of a tile, only their words are made

// Offers the tokens of one tile: kept(i) is the mask of kWidth tokens from token i of the tile, scores(i)
// has their scores, which are at most `top`.
template <typename Scores, typename Kept>
void gumbel_max_tile(const NoiseKey& key, uint32_t first, float top, Scores scores, Kept kept, Best& best) {
  uint32_t masks[kTile / kWidth];
  int count = 0;
  for (int i = 0; i < kTile; i += kWidth) count += std::popcount(masks[i / kWidth] = kept(i));
  if (count == 0) return;
  alignas(64) uint32_t words[kTile] = {};
  if (count >= kSparse) {
    tile_words(key, first, words);
  } else {
    for (int i = 0; i < kTile; i += kWidth) {
      for (uint32_t m = masks[i / kWidth]; m; m &= m - 1) {
        const int lane = i + std::countr_zero(m);
        words[lane] = philox_word(key, first + uint32_t(lane), 0);
      }
    }
  }
  for (int i = 0; i < kTile; i += kWidth) {
    if (!masks[i / kWidth]) continue;
    const U word = load_u(words + i);
    const uint32_t able = le_u(word, set_u(winning_word(top, best.score))) & masks[i / kWidth];
    if (!able) continue;
    offer(key, scores(i), word, add_u(set_u(first + uint32_t(i)), iota()), able, best);
  }
}

// Which of kWidth tokens, the first of which has this id, are kept.
inline uint32_t kept_mask(F x, uint32_t id, const Prefix& kept) {
  const uint32_t above = gt(x, set(kept.x)), tied = eq(x, set(kept.x));
  if (!tied) return above;
  return above | (tied & le_u(add_u(set_u(id), iota()), set_u(kept.id)));
}

// The draw: argmax of (x - max) / T + g over the kept set, lowest id on ties.
inline uint32_t gumbel_max(const Row& row, const Prefix& kept, const RowParams& p, const NoiseKey& key) {
  const F inverse = set(p.inv_temperature), top = set(row.max);
  const auto run = [&](int t, Best& best) {
    const float* x = row.tile(t);
    const uint32_t first = uint32_t(t) * kTile;
    gumbel_max_tile(
        key, first, (row.tile_max[t] - row.max) * p.inv_temperature,
        [&](int i) { return mul(sub(load(x + i), top), inverse); },
        [&](int i) { return kept_mask(load(x + i), first + uint32_t(i), kept); }, best);
  };
  // The likeliest tile goes first: its best score spares the others most of their logarithms.
  const int likeliest = row.likeliest_tile();
  Best start;
  run(likeliest, start);
  Best winners[kMaxChunks];
  const proxytune_parallel* parallel = kept.count < kParallelDraw ? nullptr : row.parallel;
  const int chunks = over_tiles(parallel, row.tiles, [&](int chunk, int begin, int end) {
    Best best = start;
    for (int t = begin; t < end; ++t) {
      if (t != likeliest && row.tile_max[t] >= kept.x) run(t, best);
    }
    winners[chunk] = best;
  });
  for (int c = 0; c < chunks; ++c) start.offer(winners[c].score, winners[c].id);
  return start.id;
}

}  // namespace PTK_ISA
}  // namespace ptk
