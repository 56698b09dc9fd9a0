// The kept set of a row that lies in a cluster's shared memory (docs/cuda.md, Selection). Tile maxima bound
// x from below; tokens above the bound are listed and sorted, or counted by bins of x where they are too
// many.
#pragma once

#include "row.h"
#include "sorted.h"

namespace ptk {
namespace cuda {

// Trial cutoff number `level`: kLevels of them lie evenly from below the row's maximum down to `lowest`.
PTK_HOST_DEVICE float level_at(float max, float lowest, int level) {
  return max - (max - lowest) * (float(level + 1) * (1.0f / kLevels));
}

// Digits of a mass, at most 2^44, for the histogram's 32-bit sums.
PTK_HOST_DEVICE uint32_t mass_digit(uint64_t mass, int digit) {
  return uint32_t(mass >> (15 * digit)) & 0x7FFFu;
}

// The prefixes of one row, for ptk::select_kept. All threads of the cluster call, and get the same result.
template <class Team>
class Search {
 public:
  // `tile_mass`: whether Tiles::mass is there.
  PTK_KERNEL Search(Cluster<Team>& cluster, const Row& row, Exponent e, bool tile_mass)
      : cluster_(cluster),
        team_(cluster.team),
        s_(cluster.s),
        row_(row),
        tiles_(cluster.s, row),
        e_(e),
        tile_mass_(tile_mass) {
    publish(team_, s_.listed, 0);
  }

  // The shortest prefix of the tokens with x >= low that meets the need; all of them where none does.
  PTK_KERNEL Prefix find(float low, Need need) {
    bool listed = s_.listed > 0;  // a prefix that ends within the list is found there
    uint32_t bottom = 0, top = key_of(row_.max), n = uint32_t(s_.listed);
    Running taken{0, 0};
    for (int zooms = 0;;) {
      if (!listed) {
        if (zooms == 0) bottom = key_of(tile_bound(low, need));
        n = collect(bottom, top, UINT32_MAX);
      }
      if (n > uint32_t(kList)) {
        if (bottom == top) return take_ties(bottom, need, taken);
        Binning binning = key_binning(bottom, top);
        if (zooms++ == 0) binning = linear_binning(bottom, top, row_.max - sampled_low());
        const Found found = histogram(binning, taken, need);
        taken = found.before;
        if (found.index < 0) return {low, UINT32_MAX, taken.count, taken.mass};
        binning.zoom_into(uint32_t(found.index));
        bottom = binning.low;
        top = binning.high;
        continue;
      }
      if (!listed) gather(int(n), taken.count == 0);
      const Found found = walk(taken, need, int(n));
      if (found.index >= 0 && packed_value(sorted(found.index)) >= low) return prefix_of(found);
      if (!listed) return {low, UINT32_MAX, found.before.count, found.before.mass};
      listed = false;
    }
  }

  // All tokens with x >= low.
  PTK_KERNEL Prefix whole(float low) {
    uint64_t sums[] = {0, 0};
    for (int t = team_.warp(); t < row_.count; t += Team::kWarps) {
      if (!(tiles_.max[t] >= low)) continue;
      const Four x = four_of(team_, tiles_, t);
      Digits digits;
      uint32_t count = 0;
      for (int j = 0; j < 4; ++j) {
        if (!(x.v[j] >= low)) continue;
        ++count;
        digits.add(exponential(x.v[j] - row_.max, e_));
      }
      sums[0] += team_.sum(count);
      sums[1] += warp_total(team_, digits);
    }
    cluster_.template exchange<Merge::kSum, Merge::kSum>(sums);
    return {low, UINT32_MAX, uint32_t(sums[0]), sums[1]};
  }

  // The tokens of a prefix of at most kList, sorted in every block's list.
  PTK_KERNEL void list_prefix(const Prefix& prefix) {
    if (s_.lists(prefix)) return;
    team_.sync();  // all have asked for what is listed
    const uint32_t n = collect(key_of(prefix.x), key_of(row_.max), prefix.id);
    gather(int(n), true);
  }

 private:
  PTK_KERNEL uint64_t sorted(int i) const { return s_.tokens.list.sorted[i]; }

  PTK_KERNEL Prefix prefix_of(const Found& found) const {
    const uint64_t token = sorted(found.index);
    return {packed_value(token), packed_id(token), found.through.count, found.through.mass};
  }

  PTK_KERNEL Found walk(Running taken, Need need, int n) {
    return first_met(team_, s_, n, taken, need, [&](int i) {
      return Running{1, mass_of(packed_value(sorted(i)) - row_.max, e_)};
    });
  }

  // A value of x that the shortest prefix meeting the need does not go below: the highest of kLevels trial
  // cutoffs above which the tiles must hold enough. A tile whose maximum is above a cutoff has at least that
  // token there, and all of its mass but what 127 tokens below the cutoff can have.
  PTK_KERNEL float tile_bound(float low, Need need) {
    const bool by_mass = need.mass != UINT64_MAX;
    // Masses below the last are 0; counts may have to go down to the lowest tile.
    const float massless = row_.max + kNoMass / e_.hi;
    const float lowest = need.count == UINT32_MAX && massless > row_.least ? massless : row_.least;
    const int lane = team_.lane();
    const float cutoff = level_at(row_.max, lowest, lane);
    const float below = 127.0f * 1.0001f * exponential(cutoff - row_.max, e_);
    float mass = 0.0f;
    uint32_t count = 0;
    for (int t = team_.warp(); t < row_.count; t += Team::kWarps) {
      const float top = tiles_.max[t];
      if (!(top >= cutoff)) continue;
      ++count;
      if (!by_mass) continue;
      const float own = exponential(top - row_.max, e_);
      const float most = tile_mass_ ? tiles_.mass[t] - below : 0.0f;
      mass += own > most ? own : most;
    }
    team_.sync();  // all have read the list, whose place is written to
    s_.tokens.levels.mass[team_.warp()][lane] = mass;
    s_.tokens.levels.count[team_.warp()][lane] = count;
    cluster_.announce(kLevels * sizeof(uint64_t));
    for (int i = team_.thread(); i < kLevels * team_.blocks(); i += Team::kThreads) {
      const int level = i % kLevels, to = i / kLevels;
      float level_mass = 0.0f;
      uint32_t level_count = 0;
      for (int w = 0; w < Team::kWarps; ++w) {
        level_mass += s_.tokens.levels.mass[w][level];
        level_count += s_.tokens.levels.count[w][level];
      }
      const uint64_t both = uint64_t(bits_of_float(level_mass)) << 32 | level_count;
      cluster_.send(&s_.block_levels[team_.block()][level], both, to);
    }
    cluster_.receive();
    mass = 0.0f, count = 0;
    PTK_UNROLL(1)
    for (int b = 0; b < team_.blocks(); ++b) {
      mass += float_of_bits(uint32_t(s_.block_levels[b][lane] >> 32));
      count += uint32_t(s_.block_levels[b][lane]);
    }
    // fp32 sums over at most 4,096 tiles, each tile's off by 2e-5 of itself: within 1e-3 of the need.
    const bool enough = count >= need.count || (by_mass && mass >= share_of(need.mass) * 1.001f);
    const uint32_t met = team_.ballot(enough && cutoff >= low);
    if (!met) return low;
    return team_.shuffle(cutoff, lowest_bit(met));
  }

  // The lowest x of a sample of tokens: about how far down a flat row goes.
  PTK_KERNEL float sampled_low() {
    uint32_t bottom = ~key_of(row_.max);
    if (team_.warp() < row_.count) {
      const Four x = four_of(team_, tiles_, team_.warp());
      for (int j = 0; j < 4; ++j) {
        if (x.v[j] > -INFINITY && ~key_of(x.v[j]) > bottom) bottom = ~key_of(x.v[j]);
      }
    }
    uint64_t all[] = {team_.max(bottom)};
    cluster_.template exchange<Merge::kMax>(all);
    return value_of(~uint32_t(all[0]));
  }

  // Appends to each block's list its tokens with keys in [bottom, top], of those with the bottom's key only ids
  // up to last_id; returns how many the cluster has. A list takes no more than kList.
  PTK_KERNEL uint32_t collect(uint32_t bottom, uint32_t top, uint32_t last_id) {
    const Prefix inside{value_of(bottom), last_id, 0, 0};
    const float high = value_of(top);
    if (team_.thread() == 0) s_.own_count = s_.listed = 0;
    team_.sync();
    uint64_t found[] = {0};
    for (int t = team_.warp(); t < row_.count; t += Team::kWarps) {
      if (!(tiles_.max[t] >= inside.x)) continue;
      const Four x = four_of(team_, tiles_, t);
      const uint32_t id = row_.id_of(t) + 4 * uint32_t(team_.lane());
      for (int j = 0; j < 4; ++j) {
        const bool in = x.v[j] <= high && inside.has(x.v[j], id + uint32_t(j));
        const uint32_t lanes = team_.ballot(in);
        if (!lanes) continue;
        const uint32_t count = popcount(lanes);
        found[0] += count;
        uint32_t at = team_.lane() == 0 ? team_.add_shared(&s_.own_count, count) : 0;
        at = team_.shuffle(at, 0) + popcount(lanes & ((1u << team_.lane()) - 1));
        if (in && at < uint32_t(kList)) s_.tokens.list.own[at] = pack(x.v[j], id + uint32_t(j));
      }
    }
    cluster_.template exchange<Merge::kSum>(found);
    return uint32_t(found[0]);
  }

  // Sends this block's list to all, behind those of the blocks before it, and sorts what all sent: n tokens.
  // Right after collect(), which said how many each has.
  PTK_KERNEL void gather(int n, bool prefix) {
    const int count = int(s_.own_count);
    uint64_t* const to = s_.tokens.list.sorted + cluster_.said_before(0);
    cluster_.announce(uint32_t(count) * sizeof(uint64_t));
    if (prefix && team_.thread() == 0) s_.listed = n;
    PTK_UNROLL(1)
    for (int b = team_.warp(); b < team_.blocks(); b += Team::kWarps) {
      PTK_UNROLL(1)
      for (int i = team_.lane(); i < count; i += 32) cluster_.send(to + i, s_.tokens.list.own[i], b);
    }
    cluster_.receive();
    if (n <= Team::kThreads) return sort_by_rank(team_, s_.tokens.list.sorted, n);
    sort_by_network(team_, s_.tokens.list.sorted, n);
  }

  // Counts and masses by bin, over the cluster; returns the first bin with which the need is met, and what is
  // taken before it. Each block adds up its share of the bins.
  PTK_KERNEL Found histogram(const Binning& binning, Running taken, Need need) {
    auto& bins = s_.tokens.bins;
    for (int i = team_.thread(); i < int(kBins); i += Team::kThreads) {
      bins.count[i] = bins.digits[0][i] = bins.digits[1][i] = bins.digits[2][i] = 0;
    }
    team_.sync();
    for (int t = team_.warp(); t < row_.count; t += Team::kWarps) {
      if (!(tiles_.max[t] >= value_of(binning.low))) continue;
      const Four x = four_of(team_, tiles_, t);
      for (int j = 0; j < 4; ++j) {
        const uint32_t bin = binning.bin(x.v[j]);
        if (bin >= kBins) continue;
        const uint64_t mass = mass_of(x.v[j] - row_.max, e_);
        team_.add_shared(&bins.count[bin], 1);
        for (int d = 0; d < 3; ++d) team_.add_shared(&bins.digits[d][bin], mass_digit(mass, d));
      }
    }
    team_.sync();
    constexpr int kEach = int(kBins) / Team::kThreads;  // bins of a thread
    static_assert(kEach * Team::kThreads == int(kBins));
    Running mine[kEach];
    for (int k = 0; k < kEach; ++k) {
      const int i = team_.thread() + k * Team::kThreads;
      mine[k] = {bins.count[i], 0};
      for (int d = 0; d < 3; ++d) mine[k].mass += uint64_t(bins.digits[d][i]) << (15 * d);
    }
    cluster_.announce(0);
    cluster_.receive();  // all blocks have read their bins: the parts take their place
    auto& parts = s_.tokens.parts;
    const int blocks = team_.blocks(), share = int(kBins) / blocks;  // powers of 2
    const int bits = int(popcount(uint32_t(share) - 1));
    cluster_.announce(uint32_t(share) * 2 * sizeof(uint64_t));
    for (int k = 0; k < kEach; ++k) {
      const int i = team_.thread() + k * Team::kThreads, at = team_.block() * share + (i & (share - 1));
      cluster_.send(&parts.count[at], mine[k].count, i >> bits);
      cluster_.send(&parts.mass[at], mine[k].mass, i >> bits);
    }
    cluster_.receive();
    uint64_t sums[] = {0, 0};
    for (int i = team_.thread(); i < int(kBins); i += Team::kThreads) {
      sums[0] += parts.count[i];
      sums[1] += parts.mass[i];
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      for (uint64_t& sum : sums) sum += team_.shuffle_xor(sum, mask);
    }
    cluster_.template exchange<Merge::kSum, Merge::kSum>(sums);
    const Running start{taken.count + uint32_t(cluster_.said_before(0)), taken.mass + cluster_.said_before(1)};
    const Found found = first_met(team_, s_, share, start, need, [&](int i) {
      Running sum{0, 0};
      PTK_UNROLL(1)
      for (int b = 0; b < blocks; ++b) {
        sum = {sum.count + uint32_t(parts.count[b * share + i]), sum.mass + parts.mass[b * share + i]};
      }
      return sum;
    });
    // In one block: those after it start with more than is needed.
    const bool here = found.index >= 0 && !need.met(start.count, start.mass);
    uint64_t all[] = {0, 0, 0};
    if (here) {
      all[0] = uint64_t(team_.block() * share + found.index + 1);
      all[1] = found.before.count;
      all[2] = found.before.mass;
    }
    cluster_.template exchange<Merge::kMax, Merge::kMax, Merge::kMax>(all);
    if (all[0] == 0) return {-1, {taken.count + uint32_t(sums[0]), taken.mass + sums[1]}, {0, 0}};
    return {int(all[0]) - 1, {uint32_t(all[1]), all[2]}, {0, 0}};
  }

  // Adds the tokens with just this key to `taken`, in order of id, until the need is met. There are enough of
  // them: by the histogram before, the need is met among them.
  PTK_KERNEL Prefix take_ties(uint32_t key, Need need, Running taken) {
    const float value = value_of(key);
    const uint64_t mass = mass_of(value - row_.max, e_);
    uint64_t wanted = need.count - taken.count;
    if (mass > 0 && need.mass != UINT64_MAX) {
      const uint64_t by_mass = (need.mass - taken.mass + mass - 1) / mass;
      wanted = by_mass < wanted ? by_mass : wanted;
    }
    uint32_t own = 0;
    for (int t = team_.warp(); t < row_.count; t += Team::kWarps) own += ties_of(t, value);
    uint64_t ties[] = {team_.sum(own)};
    cluster_.template exchange<Merge::kSum>(ties);
    const uint64_t before = cluster_.said_before(0);
    uint64_t last[] = {0};  // id + 1
    if (team_.warp() == 0 && before < wanted && wanted <= before + cluster_.said(team_.block(), 0)) {
      last[0] = tie_at(value, uint32_t(wanted - before));
    }
    cluster_.template exchange<Merge::kMax>(last);
    return {value, uint32_t(last[0]) - 1, taken.count + uint32_t(wanted), taken.mass + wanted * mass};
  }

  // How many of this lane's tokens of a tile have just this value.
  PTK_KERNEL uint32_t ties_of(int t, float value) const {
    const Four x = four_of(team_, tiles_, t);
    uint32_t count = 0;
    for (int j = 0; j < 4; ++j) count += x.v[j] == value;
    return count;
  }

  // Of this block's tokens with just this value, the id + 1 of number `wanted`, counted from 1. One warp calls.
  PTK_KERNEL uint32_t tie_at(float value, uint32_t wanted) const {
    uint32_t result = 0;
    for (int t = 0; t < row_.count && result == 0; ++t) {
      const uint32_t mine = ties_of(t, value), all = team_.sum(mine);
      if (all < wanted) {
        wanted -= all;
        continue;
      }
      uint32_t through = mine;
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = team_.shuffle_up(through, step);
        if (team_.lane() >= step) through += below;
      }
      uint32_t nth = through - mine;
      const Four x = four_of(team_, tiles_, t);
      const uint32_t first = row_.id_of(t) + 4 * uint32_t(team_.lane());
      uint32_t found = 0;
      for (int j = 0; j < 4; ++j) {
        if (x.v[j] == value && ++nth == wanted) found = first + uint32_t(j) + 1;
      }
      result = team_.max(found);
    }
    return result;
  }

  Cluster<Team>& cluster_;
  const Team& team_;
  Shared& s_;
  const Row row_;
  const Tiles tiles_;
  Exponent e_;
  bool tile_mass_ = false;
};

}  // namespace cuda
}  // namespace ptk
