// The shared memory of one block of a cluster, and exchange between the blocks.
#pragma once

#include <cstddef>

#include "../common/addressing.h"
#include "binning.h"
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
    uint64_t own[kList];     // this block's, in no order
    uint64_t sorted[kList];  // the cluster's, likeliest first; the same in every block
  } list;
  struct {
    uint64_t own[kList];
    float mass[kMaxWarps][kLevels];
    uint32_t count[kMaxWarps][kLevels];
  } levels;
  struct {
    uint32_t count[kBins];
    uint32_t digits[3][kBins];  // of masses, 15 bits each: a block has room for fewer than 2^16 tokens
  } bins;
  struct {
    uint64_t count[kBins], mass[kBins];  // of the bins that this block adds up, from each block
  } parts;
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
  uint64_t boxes[2];                         // of messages, by turns
  uint64_t slots[2][kMaxBlocks][kExchange];  // what each block said, by turns
  uint64_t partial[2][kMaxWarps][kExchange];  // what each warp said, likewise
  uint64_t block_levels[kMaxBlocks][kLevels];  // each block's mass (upper half) and count above each trial cutoff
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
  int turns = 0;  // of messages so far
  bool met = false;

  PTK_KERNEL Cluster(const Team& team, Shared& s) : team(team), s(s) {
    static_assert(Team::kWarps <= kMaxWarps);
    if (team.thread() == 0) {
      for (uint64_t& box : s.boxes) team.open(&box);
    }
    team.arrive_cluster();
  }

  // A block's shared memory is there once the block has started. Before messages, and before the end.
  PTK_KERNEL void meet() {
    if (!met) team.wait_cluster();
    met = true;
  }

  // A turn: announce() how many bytes this block sends to each, send() them, receive() what the others sent.
  // Every block takes part in every turn. What its threads read before a turn may be replaced by messages of
  // the next one, not by this one's: so the two boxes, and all else that is sent by turns, are enough in twos.
  PTK_KERNEL void announce(uint32_t bytes) {
    team.sync();
    if (team.thread() < team.blocks() && team.blocks() > 1) {
      team.release();
      team.announce(box(), bytes, team.thread());
    }
  }
  PTK_KERNEL void send(uint64_t* place, uint64_t value, int block) {
    if (team.blocks() > 1) return team.send(place, value, box(), block);
    *place = value;
  }
  PTK_KERNEL void receive() {
    if (team.blocks() > 1) {
      team.await(box(), uint32_t(turns) >> 1 & 1);
      team.acquire();
    } else {
      team.sync();
    }
    ++turns;
  }

  // Merges each warp's values (lane 0's) over the cluster; every thread gets the results.
  template <Merge... kHow>
  PTK_KERNEL void exchange(uint64_t (&values)[sizeof...(kHow)]) {
    constexpr int n = int(sizeof...(kHow));
    static_assert(n <= kExchange);
    if (team.lane() == 0) {
      for (int i = 0; i < n; ++i) s.partial[turns & 1][team.warp()][i] = values[i];
    }
    announce(n * sizeof(uint64_t));
    if (team.thread() < team.blocks()) {
      uint64_t (&slot)[kExchange] = s.slots[turns & 1][team.block()];
      int i = 0;
      ((send(&slot[i], merge_warps<kHow>(i), team.thread()), ++i), ...);
    }
    receive();
    int i = 0;
    ((values[i] = merge_blocks<kHow>(i), ++i), ...);
  }

  // Of the last exchange, before the next turn: what a block said, and the sum of what those before this one said.
  PTK_KERNEL uint64_t said(int block, int i) const { return s.slots[(turns - 1) & 1][block][i]; }
  PTK_KERNEL uint64_t said_before(int i) const {
    uint64_t sum = 0;
    PTK_UNROLL(1)
    for (int b = 0; b < team.block(); ++b) sum += said(b, i);
    return sum;
  }

 private:
  PTK_KERNEL uint64_t* box() { return &s.boxes[turns & 1]; }

  template <Merge kHow>
  PTK_KERNEL uint64_t merge_warps(int i) const {
    const auto& partial = s.partial[turns & 1];
    uint64_t value = partial[0][i];
    for (int w = 1; w < Team::kWarps; ++w) value = merge<kHow>(value, partial[w][i]);
    return value;
  }
  // Each lane takes one block's value: fewer instructions than a loop, and the loads don't wait for each other.
  template <Merge kHow>
  PTK_KERNEL uint64_t merge_blocks(int i) const {
    static_assert(kMaxBlocks <= 32);
    uint64_t value = team.lane() < team.blocks() ? said(team.lane(), i) : 0;
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
