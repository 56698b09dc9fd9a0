// The draw by keyed Gumbel noise: the argmax of score + noise over the kept tokens.
#pragma once

namespace ptk {
namespace PTK_ISA {

// A noise key with the keys of Philox's rounds in memory: broadcast from there, they take no port of the vectors.
struct RoundKeys {
  NoiseKey key;
  uint32_t keys[kPhiloxRounds][2];
  explicit RoundKeys(const NoiseKey& key) : key(key) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys[round][0] = key.key0 + round * kPhiloxWeyl0;
      keys[round][1] = key.key1 + round * kPhiloxWeyl1;
    }
  }
};

// The words of the tokens 4 * c to 4 * c + 3, for each of kWidth counters c: in groups, since a group waits for
// each product.
inline void philox(const RoundKeys& rounds, const uint32_t* counters, uint32_t* words) {
  using Wide = decltype(set_wide(0));
  constexpr int kGroups = kWidth / kWide;
  Wide c[kGroups][4];
  for (int g = 0; g < kGroups; ++g) {
    c[g][0] = load_wide(counters + g * kWide);
    c[g][1] = set_wide(rounds.key.position_lo);
    c[g][2] = set_wide(rounds.key.position_hi);
    c[g][3] = set_wide(rounds.key.last(0));
  }
  for (const auto& k : rounds.keys) {
    for (int g = 0; g < kGroups; ++g) {
      const Wide p0 = mul_wide(c[g][0], set_wide(kPhiloxMultiplier0));
      const Wide p1 = mul_wide(c[g][2], set_wide(kPhiloxMultiplier1));
      c[g][0] = xor3(upper_half(p1), c[g][1], set_wide(k[0]));
      c[g][1] = p1;
      c[g][2] = xor3(upper_half(p0), c[g][3], set_wide(k[1]));
      c[g][3] = p0;
    }
  }
  for (int g = 0; g < kGroups; ++g) store_interleaved(words + 4 * g * kWide, c[g]);
}

// Words of the kTile consecutive tokens from `first`, a multiple of kTile.
inline void tile_words(const RoundKeys& key, uint32_t first, uint32_t* out) {
  uint32_t counters[kTile / 4];
  for (uint32_t i = 0; i < kTile / 4; ++i) counters[i] = first / 4 + i;
  for (int i = 0; i < kTile / 4; i += kWidth) philox(key, counters + i, out + 4 * i);
}

// The best token so far: highest score, lowest id on ties.
struct Best {
  float score = -INFINITY;
  uint32_t id = UINT32_MAX;
  void offer(float s, uint32_t i) {
    if (s > score || (s == score && i < id)) score = s, id = i;
  }
};

constexpr uint32_t kParallelDraw = 8192;  // fewer kept tokens are not worth waking other threads for
constexpr int kSparse = 24;  // fewer kept tokens of a tile wait for those of other tiles

// The argmax of score + noise over the tokens that it is given; `best` is right after flush().
class Draw {
 public:
  Best best;
  explicit Draw(const NoiseKey& key) : key_(key) {}
  Draw(const NoiseKey& key, Best start) : best(start), key_(key) {}

  // Takes the tokens of one tile: kept(i) is the mask of kWidth tokens from token i of the tile, scores(i)
  // has their scores, which are at most `top`.
  template <typename Scores, typename Kept>
  void take_tile(uint32_t first, float top, Scores scores, Kept kept) {
    uint32_t masks[kTile / kWidth];
    int count = 0;
    for (int i = 0; i < kTile; i += kWidth) count += std::popcount(masks[i / kWidth] = kept(i));
    if (count == 0) return;
    const auto ids = [&](int i) { return add_u(set_u(first + uint32_t(i)), iota()); };
    if (count < kSparse) {
      for (int i = 0; i < kTile; i += kWidth) {
        if (!masks[i / kWidth]) continue;
        num_waiting_ += compress(scores(i), ids(i), masks[i / kWidth], scores_ + num_waiting_, ids_ + num_waiting_);
      }
      top_ = std::max(top_, top);
      if (num_waiting_ > kWaiting) flush();
      return;
    }
    alignas(64) uint32_t words[kTile];
    tile_words(key_, first, words);
    U limit = set_u(winning_word(top, best.score));
    for (int i = 0; i < kTile; i += kWidth) {
      const U word = load_u(words + i);
      const uint32_t able = le_u(word, limit) & masks[i / kWidth];
      if (able && offer(scores(i), word, ids(i), able)) limit = set_u(winning_word(top, best.score));
    }
  }

  // Draws from the tokens that wait.
  void flush() {
    alignas(64) uint32_t counters[kWidth], four[4 * kWidth], words[kWidth];
    for (int start = 0; start < num_waiting_; start += kWidth) {
      const int n = std::min(kWidth, num_waiting_ - start);
      for (int i = 0; i < kWidth; ++i) counters[i] = ids_[start + i] >> 2;
      philox(key_, counters, four);
      for (int i = 0; i < kWidth; ++i) words[i] = four[4 * i + (ids_[start + i] & 3)];
      const U word = load_u(words);
      const U limit = set_u(winning_word(top_, best.score));
      const uint32_t able = le_u(word, limit) & ((1u << n) - 1);
      if (able) offer(load(scores_ + start), word, load_u(ids_ + start), able);
    }
    num_waiting_ = 0;
    top_ = -INFINITY;
  }

 private:
  // Offers kWidth tokens where the mask says so: score + noise of their words. Returns whether one is best.
  bool offer(F score, U word, U id, uint32_t mask) {
    const uint32_t zero = le_u(word, set_u(0)) & mask;
    F u = uniform(word, 0x1p-32f);
    alignas(64) float us[kWidth];
    alignas(64) uint32_t ids[kWidth];
    store_u(ids, id);
    if (zero) {  // once in 2^32 tokens
      store(us, u);
      for (uint32_t m = zero; m; m &= m - 1) {
        const int lane = std::countr_zero(m);
        us[lane] = uniform_of(key_.key, ids[lane]);
      }
      u = load(us);
    }
    const F total = add(score, gumbel(u));
    uint32_t wins = ge(total, set(best.score)) & mask;
    if (!wins) return false;
    store(us, total);
    for (; wins; wins &= wins - 1) {
      const int lane = std::countr_zero(wins);
      best.offer(us[lane], ids[lane]);
    }
    return true;
  }

  static constexpr int kWaiting = 128;
  const RoundKeys key_;
  float top_ = -INFINITY;  // no waiting score is above it
  int num_waiting_ = 0;
  // Room for a sparse tile more, and for what compress writes past its tokens.
  alignas(64) float scores_[kWaiting + kSparse + kWidth] = {};
  alignas(64) uint32_t ids_[kWaiting + kSparse + kWidth] = {};
};

// Which of kWidth tokens, the first of which has this id, are kept.
inline uint32_t kept_mask(F x, uint32_t id, const Prefix& kept) {
  const uint32_t above = gt(x, set(kept.x)), tied = eq(x, set(kept.x));
  if (!tied) return above;
  return above | (tied & le_u(add_u(set_u(id), iota()), set_u(kept.id)));
}

// The draw: argmax of (x - max) / T + g over the kept set, lowest id on ties.
inline uint32_t gumbel_max(const Row& row, const Prefix& kept, const RowParams& p, const NoiseKey& key) {
  const F inverse = set(p.inv_temperature), top = set(row.max);
  const auto run = [&](int t, Draw& draw) {
    const float* x = row.tile(t);
    const uint32_t first = uint32_t(t) * kTile;
    draw.take_tile(
        first, (row.tile_max[t] - row.max) * p.inv_temperature,
        [&](int i) { return mul(sub(load(x + i), top), inverse); },
        [&](int i) { return kept_mask(load(x + i), first + uint32_t(i), kept); });
  };
  // The likeliest tile goes first: its best score spares the others most of their logarithms.
  const int likeliest = row.likeliest_tile();
  Draw start(key);
  run(likeliest, start);
  start.flush();
  Best winners[kMaxChunks];
  const proxytune_parallel* parallel = kept.count < kParallelDraw ? nullptr : row.parallel;
  const int chunks = over_tiles(parallel, row.tiles, [&](int chunk, int begin, int end) {
    Draw draw(key, start.best);
    for (int t = begin; t < end; ++t) {
      if (t != likeliest && row.tile_max[t] >= kept.x) run(t, draw);
    }
    draw.flush();
    winners[chunk] = draw.best;
  });
  for (int c = 0; c < chunks; ++c) start.best.offer(winners[c].score, winners[c].id);
  return start.best.id;
}

}  // namespace PTK_ISA
}  // namespace ptk
