// The draw from a kept set: the argmax of score + noise over its tokens. Logarithms are taken only where the
// noise can win.
#pragma once

#include "search.h"

namespace ptk {
namespace cuda {

PTK_HOST_DEVICE float gumbel_of(const NoiseKey& key, uint32_t id, uint32_t word) {
  return gumbel(word != 0 ? lane::uniform(word, 0x1p-32f) : uniform_of(key, id));
}

PTK_HOST_DEVICE uint64_t better(uint64_t a, uint64_t b) { return a > b ? a : b; }

// v[i] of values that are in registers, which have no index.
template <typename T>
PTK_HOST_DEVICE T pick(const T (&v)[4], int i) {
  return i & 2 ? (i & 1 ? v[3] : v[2]) : (i & 1 ? v[1] : v[0]);
}

// The best packed score of the cluster.
template <class Team>
PTK_KERNEL uint64_t best_of_cluster(Cluster<Team>& cluster, uint64_t best) {
  uint64_t all[] = {warp_max(cluster.team, best)};
  cluster.template exchange<Merge::kMax>(all);
  return all[0];
}

// The best of score(x, id) + noise over the tokens of this block's tiles of which kept(x, id) is true: this
// lane's, packed. top(t) bounds the scores of a tile, and is -inf where none of its tokens is kept.
template <class Team, class Kept, class Score, class Top>
PTK_KERNEL uint64_t gumbel_max_tiles(const Team& team, Shared& s, const Row row, const NoiseKey& key,
                               Kept kept, Score score, Top top) {
  const Tiles tiles(s, row);
  if (team.thread() == 0) s.best = 0;
  team.sync();
  uint64_t best = 0;
  for (int t = team.warp(); t < row.count; t += Team::kWarps) {
    const float most = top(t);
    if (!(most > -INFINITY)) continue;
    // The best score of other warps spares this one most of its logarithms; it may read an old one.
    uint32_t record = team.lane() == 0 ? team.max_shared(&s.best, 0) : 0;
    record = team.shuffle(record, 0);
    const uint32_t limit = record ? winning_word(most, value_of(record)) : UINT32_MAX;
    const Four x = four_of(team, tiles, t);
    const uint32_t id = row.id_of(t) + 4 * uint32_t(team.lane());
    uint32_t words[4];
    philox_words(key, id >> 2, 0, words);
    uint32_t able = 0;
    for (int j = 0; j < 4; ++j) {
      able |= uint32_t(words[j] <= limit && kept(x.v[j], id + uint32_t(j))) << j;
    }
    uint64_t won = 0;
    for (; able; able &= able - 1) {  // few: one copy of the logarithms' code will do
      const int j = lowest_bit(able);
      const float noise = gumbel_of(key, id + uint32_t(j), pick(words, j));
      won = better(won, pack(score(pick(x.v, j), id + uint32_t(j)) + noise, id + uint32_t(j)));
    }
    if (!team.ballot(won > best)) continue;
    best = better(best, won);
    const uint32_t reached = team.max(uint32_t(won >> 32));
    if (team.lane() == 0) team.max_shared(&s.best, reached);
  }
  return best;
}

// Draws from the kept set of a row: by the list where the row's search left one that holds it.
template <class Team>
PTK_KERNEL uint32_t draw(Cluster<Team>& cluster, const Target& target, const RowParams& p,
                         const NoiseKey& key) {
  const Team& team = cluster.team;
  const Row& row = target.row;
  const Prefix& kept = target.kept;
  if (p.greedy) return kept.id;
  const auto score = [&](float x, uint32_t) { return (x - row.max) * p.inv_temperature; };
  uint64_t best = 0;
  if (cluster.s.lists(kept)) {
    const int stride = Team::kThreads * team.blocks();
    for (int i = team.block() * Team::kThreads + team.thread(); i < int(kept.count); i += stride) {
      const uint64_t token = cluster.s.tokens.list.sorted[i];
      const float x = packed_value(token);
      const uint32_t id = packed_id(token);
      const float noise = gumbel_of(key, id, philox_word(key, id, 0));
      best = better(best, pack(score(x, id) + noise, id));
    }
  } else {
    const Tiles tiles(cluster.s, row);
    best = gumbel_max_tiles(
        team, cluster.s, row, key, [&](float x, uint32_t id) { return kept.has(x, id); }, score,
        [&](int t) { return tiles.max[t] >= kept.x ? score(tiles.max[t], 0) : -INFINITY; });
  }
  return packed_id(best_of_cluster(cluster, best));
}

// The first of the likeliest tokens.
template <class Team>
PTK_KERNEL Prefix likeliest(Cluster<Team>& cluster, const Row& row) {
  const Team& team = cluster.team;
  const Tiles tiles(cluster.s, row);
  uint64_t first = 0;  // its complement
  for (int t = team.warp(); t < row.count; t += Team::kWarps) {
    if (tiles.max[t] != row.max) continue;
    const Four x = four_of(team, tiles, t);
    const uint32_t id = row.id_of(t) + 4 * uint32_t(team.lane());
    for (int j = 0; j < 4; ++j) {
      if (x.v[j] == row.max) first = better(first, ~(id + uint32_t(j)));
    }
  }
  const uint64_t id = best_of_cluster(cluster, first);
  return {row.max, ~uint32_t(id), 1, uint64_t(kMassOne)};
}

}  // namespace cuda
}  // namespace ptk
