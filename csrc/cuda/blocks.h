// How many blocks take a row: the size of its cluster.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <climits>

#include "shared.h"

namespace ptk {
namespace cuda {

constexpr std::array kSizes = {1, 2, 4, 8, 16};  // blocks of a cluster
constexpr int kPortable = 8;  // every device has clusters of so many blocks; of more, some
static_assert(kSizes.back() == kMaxBlocks);

constexpr int64_t kMaxClusters = INT_MAX / kMaxBlocks;  // a grid's blocks are at most INT_MAX
constexpr int64_t kTokensOfBlock = 16384;               // 64 KiB of x; unmeasured

constexpr size_t kReserved = 1024;                      // bytes of each block's that the driver takes

// Bytes of dynamic shared memory that a block may have, by cluster size; 0: no such cluster runs. A cluster of
// one block may have all of a multiprocessor's but what is reserved.
using SharedLimits = std::array<size_t, kSizes.size()>;

inline bool fits(int64_t vocab_size, int blocks, bool rejection, const SharedLimits& limits) {
  const size_t limit = limits[size_t(std::countr_zero(unsigned(blocks)))];
  return limit >= shared_bytes(vocab_size, blocks, rejection);
}

// Whether blocks of one row each share a multiprocessor, kBlocksPerProcessor of them.
inline bool share(int64_t vocab_size, int blocks, const SharedLimits& limits) {
  return fits(vocab_size, blocks, false, limits) &&
         kBlocksPerProcessor * (shared_bytes(vocab_size, blocks, false) + kReserved) <= limits[0] + kReserved;
}

// Blocks of a cluster for rows of this width, 0 where none holds one: 8 for a large vocabulary, and
// 16 where the device has so many multiprocessors for each row, or where blocks of 8 are too large to share
// a multiprocessor and those of 16 are not. Rejection's blocks never share one.
inline int choose_blocks(int64_t vocab_size, int64_t clusters, bool rejection, int processors,
                         const SharedLimits& limits) {
  const auto shares = uint64_t(vocab_size + kTokensOfBlock - 1) / kTokensOfBlock;
  int wanted = std::min(int(std::bit_ceil(shares)), kPortable);
  const bool halves = !rejection && !share(vocab_size, kPortable, limits) && share(vocab_size, kMaxBlocks, limits);
  if (wanted == kPortable && (halves || clusters * kMaxBlocks <= processors)) wanted = kMaxBlocks;
  for (int blocks = wanted; blocks <= kMaxBlocks; blocks *= 2) {
    if (fits(vocab_size, blocks, rejection, limits)) return blocks;
  }
  for (int blocks = wanted / 2; blocks >= 1; blocks /= 2) {
    if (fits(vocab_size, blocks, rejection, limits)) return blocks;
  }
  return 0;
}

// The widest rows that some cluster holds.
inline int64_t widest_row(bool rejection, const SharedLimits& limits) {
  int64_t held = 0, beyond = kMaxVocabSize + 1;
  while (beyond - held > 1) {
    const int64_t middle = (held + beyond) / 2;
    (choose_blocks(middle, kMaxClusters, rejection, 0, limits) > 0 ? held : beyond) = middle;
  }
  return held;
}

}  // namespace cuda
}  // namespace ptk
