// The shared memory of one block of a cluster, and exchange between the blocks.
#pragma once

#include <cstddef>

#include "../common/addressing.h"
#include "../common/binning.h"
#include "../common/target.h"
#include "lane.h"

namespace ptk {
namespace cuda {

// Threads of a block, and blocks that share a multiprocessor: while one waits at a barrier or for
// memory, the other works. 65,536 registers over both leave a thread 128.
constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 2;

constexpr int kMaxBlocks = 16;    // of a cluster
constexpr int kMaxWarps = kThreads / 32;  // of a block
constexpr int kExchange = 4;      // words exchanged at once
constexpr int kList = 1024;       // tokens sorted at once, of the whole cluster
constexpr int kLevels = 32;       // trial cutoffs, one a lane

// A running count and mass.
struct Running {
  uint32_t count;
  uint64_t mass;
};

// The tokens that selection looks at: in a list, by bins, or the trial cutoffs that bound them. One of these at a time.
union Tokens {
  struct {
    uint64_t own[kList];     // this block's, in no order; read by the others
    uint64_t sorted[kList];  // the cluster's, likeliest first; the same in every block
  } list;
  struct {
    uint64_t own[kList];  // others may still read it
    float mass[kMaxWarps][kLevels];
    uint32_t count[kMaxWarps][kLevels];
  } levels;
  struct {
    uint32_t count[kBins];
    uint32_t digits[3][kBins];  // of masses, 15 bits each: a block has room for fewer than 2^16 tokens
  } bins;
};

// A block's share of a row.
struct Row {
  uint32_t place;  // of its tiles in the block's shared memory, in bytes
  uint32_t first_id;
  int count;       // tiles of this block
  int tiles;       // tiles of the row
  float max;       // of the row, as are the others below
  float least;     // lowest maximum of a tile that is not all masked
  uint32_t live;   // tokens that are not masked
  int32_t status;

  PTK_HOST_DEVICE uint32_t id_of(int t) const { return first_id + uint32_t(t) * kTile; }
};

using Target = ptk::Target<Row>;

// What a cluster of verification works on: -1 where there is no draft.
struct Place {
  int64_t row, position, draft_id;
};

struct Shared {
  uint64_t slots[2][kMaxBlocks][kExchange];  // what each block said, by turns
  uint64_t partial[kMaxWarps][kExchange];
  // what each block found above each trial cutoff
  float block_level_mass[kMaxBlocks][kLevels];
  uint32_t block_level_count[kMaxBlocks][kLevels];
  Tokens tokens;
  uint32_t own_count;
  int listed;  // of tokens.list.sorted, where it is a prefix of the order, else 0
  uint32_t best;  // order key of the best score that this block has found so far
  int found;
  Running before, through;  // of what was found
  // What is read, the row's parameters, and the rows with their kept sets; by rejection the drafter's, too.
  // They are here so that they don't take every thread's registers.
  Place place;
  Source source;
  RawParams raw;
  RowParams params;
  Target target, draft;

  // Whether the list holds a prefix's tokens: then they are its first.
  PTK_HOST_DEVICE bool lists(const Prefix& prefix) const { return prefix.count <= uint32_t(listed); }
};

// A block's tiles of a row: made where they are used, as a pointer that was stored would no longer be
// known to be one of shared memory.
struct Tiles {
  float* x;     // [count * kTile], combined: masked tokens are -inf, all others finite
  float* max;   // [count], of each tile
  float* raw;   // [count], sum of exp(x - max), approximate
  float* mass;  // [count], as a share, where row_mass was asked for it

  PTK_HOST_DEVICE Tiles(Shared& s, const Row& row)
      : x(reinterpret_cast<float*>(reinterpret_cast<std::byte*>(&s) + row.place)),
        max(x + row.count * kTile),
        raw(max + row.count),
        mass(raw + row.count) {}

  PTK_HOST_DEVICE float* tile(int t) const { return x + t * kTile; }
};

// The tiles of a row that a block works on, of `tiles` over `blocks`.
struct Share {
  int first, count;
};
PTK_HOST_DEVICE Share share_of_block(int tiles, int block, int blocks) {
  const int first = int(int64_t(block) * tiles / blocks);
  return {first, int(int64_t(block + 1) * tiles / blocks) - first};
}
PTK_HOST_DEVICE int block_of_tile(int tile, int tiles, int blocks) {
  return int((int64_t(tile + 1) * blocks - 1) / tiles);
}

// Bytes of one row in one block: x, and three summaries a tile.
PTK_HOST_DEVICE constexpr size_t row_bytes(int64_t vocab_size, int blocks) {
  const int64_t tiles = (tiles_of(vocab_size) + blocks - 1) / blocks;
  return (size_t(tiles) * (kTile + 3) * sizeof(float) + 15) & ~size_t(15);
}

// Where a block's rows start.
constexpr size_t kRowOffset = (sizeof(Shared) + 15) & ~size_t(15);

// Bytes of dynamic shared memory that a block needs; rejection holds the drafter's row too.
PTK_HOST_DEVICE constexpr size_t shared_bytes(int64_t vocab_size, int blocks, bool rejection) {
  return kRowOffset + (rejection ? 2 : 1) * row_bytes(vocab_size, blocks);
}

enum class Merge { kSum, kMax };  // 0 changes neither

template <Merge kHow>
PTK_HOST_DEVICE uint64_t merge(uint64_t a, uint64_t b) {
  if (kHow == Merge::kSum) return a + b;
  return a > b ? a : b;
}

// One thread writes, all of the block read after.
template <class Team, class T>
PTK_KERNEL void publish(const Team& team, T& shared, const T& value) {
  team.sync();  // all have read what was there
  if (team.thread() == 0) shared = value;
  team.sync();
}

// A thread's view of its cluster.
template <class Team>
struct Cluster {
  const Team& team;
  Shared& s;
  int turns = 0;  // exchanges so far

  PTK_KERNEL Cluster(const Team& team, Shared& s) : team(team), s(s) {
    static_assert(Team::kWarps <= kMaxWarps);
    team.arrive_cluster();
  }

  // No block leaves while another may read its shared memory.
  PTK_KERNEL void leave() {
    if (turns == 0) team.wait_cluster();
    team.sync_cluster();
  }

  // Merges each warp's values (lane 0's) over the cluster; every thread gets the results. What blocks
  // wrote to their shared memory before is visible to all of them after.
  //
  // Two turns are enough: a block writes into a slot again only after the next exchange's barrier,
  // which the slot's readers have passed.
  template <Merge... kHow>
  PTK_KERNEL void exchange(uint64_t (&values)[sizeof...(kHow)]) {
    constexpr int n = int(sizeof...(kHow));
    static_assert(n <= kExchange);
    const int blocks = team.blocks();
    if (team.lane() == 0) {
      for (int i = 0; i < n; ++i) s.partial[team.warp()][i] = values[i];
    }
    team.sync();
    // A block's shared memory is there once the block has started. The loads of the row did not wait for that.
    if (turns == 0) team.wait_cluster();
    const int turn = turns++ & 1;
    if (team.thread() < blocks) {
      uint64_t (&slot)[kExchange] = *team.at(&s.slots[turn][team.block()], team.thread());
      int i = 0;
      ((slot[i] = merge_warps<kHow>(i), ++i), ...);
    }
    team.sync_cluster();
    int i = 0;
    ((values[i] = merge_blocks<kHow>(turn, i, blocks), ++i), ...);
  }

 private:
  template <Merge kHow>
  PTK_KERNEL uint64_t merge_warps(int i) const {
    uint64_t value = s.partial[0][i];
    for (int w = 1; w < Team::kWarps; ++w) value = merge<kHow>(value, s.partial[w][i]);
    return value;
  }
  // Each lane takes one block's value: fewer instructions than a loop, and the loads don't wait for each other.
  template <Merge kHow>
  PTK_KERNEL uint64_t merge_blocks(int turn, int i, int blocks) const {
    static_assert(kMaxBlocks <= 32);
    uint64_t value = team.lane() < blocks ? s.slots[turn][team.lane()][i] : 0;
    for (int mask = 16; mask > 0; mask /= 2) value = merge<kHow>(value, team.shuffle_xor(value, mask));
    return value;
  }
};

// Warp-wide maximum of 64 bits, in every lane.
template <class Team>
PTK_KERNEL uint64_t warp_max(const Team& team, uint64_t value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other = team.shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Warp-wide sum of digits' totals, in every lane.
template <class Team>
PTK_KERNEL uint64_t warp_total(const Team& team, const Digits& digits) {
  return Digits{team.sum(digits.high), team.sum(digits.low)}.total();
}

}  // namespace cuda
}  // namespace ptk
