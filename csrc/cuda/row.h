// One row in a cluster's shared memory: each block combines its share of the tiles, with three
// summaries a tile. Reads 3 logits a token from device memory, once; writes none.
#pragma once

#include "../include/proxytune.h"
#include "shared.h"

namespace ptk {
namespace cuda {

constexpr int kAhead = 2;  // vectors of each role that a thread waits for at once

// What this thread has seen among its tokens.
struct Seen {
  uint32_t live = 0, nan = 0;
};

// Stands for a token whose base is -inf: masked, whatever the others hold. No operation gives this NaN.
constexpr uint32_t kMaskedBits = 0x7FC0DEADu;

// The rest of the combination, of a token's x or kMaskedBits (contract, 2 to 7; there are no edits).
PTK_HOST_DEVICE float constrained(const Source& in, float x, int64_t id, Seen& seen) {
  if (bits_of_float(x) == kMaskedBits) return -INFINITY;
  if (in.bias) x += in.bias[id];
  if (in.allowed && !(in.allowed[id >> 5] >> (id & 31) & 1)) return -INFINITY;
  if (x != x) {
    seen.nan = 1;
    return -INFINITY;
  }
  seen.live += x > -INFINITY;
  return x + 0.0f;  // -0 becomes +0: equal logits must have equal bits for the order by id
}

PTK_HOST_DEVICE float combined_at(const Source& in, int64_t id, Seen& seen) {
  const float base = logit_at(in.base, in.base_dtype, id);
  float x = base;
  if (in.expert) {
    x = combined(base, logit_at(in.expert, in.expert_dtype, id), logit_at(in.anti, in.anti_dtype, id),
                 in.alpha);
  }
  if (base == -INFINITY) x = float_of_bits(kMaskedBits);
  return constrained(in, x, id, seen);
}

PTK_HOST_DEVICE constexpr int element_size(int32_t dtype) { return dtype == kDtypeF32 ? 4 : 2; }

// 16 bytes of logits as fp32.
template <int32_t kDtype>
struct Vector {
  static constexpr int kSize = 16 / element_size(kDtype);
  float v[kSize];

  PTK_HOST_DEVICE explicit Vector(const Words& raw) {
    for (int j = 0; j < 4; ++j) {
      if constexpr (kDtype == kDtypeF32) {
        v[j] = float_of_bits(raw.w[j]);
      } else if constexpr (kDtype == kDtypeBf16) {
        v[2 * j] = float_of_bits(raw.w[j] << 16);
        v[2 * j + 1] = float_of_bits(raw.w[j] & 0xFFFF0000u);
      } else {
        v[2 * j] = half_to_float(uint16_t(raw.w[j]));
        v[2 * j + 1] = half_to_float(uint16_t(raw.w[j] >> 16));
      }
    }
  }
};

struct alignas(16) Four {
  float v[4];
};

// Three roles' 16 bytes, as they came.
struct Loaded {
  Words base, expert, anti;
};

// Combines one vector into out; false where a token of it needs a look by constrained().
template <int32_t kDtype, bool kSteered>
PTK_HOST_DEVICE bool combine_vector(const Loaded& loaded, float alpha, float* out, bool whole) {
  using V = Vector<kDtype>;
  const V base(loaded.base);
  V x = base;
  if constexpr (kSteered) {
    const V expert(loaded.expert), anti(loaded.anti);
    for (int j = 0; j < V::kSize; ++j) x.v[j] = combined(base.v[j], expert.v[j], anti.v[j], alpha);
  }
  bool ordinary = true;
  for (int j = 0; j < V::kSize; ++j) {
    ordinary = ordinary && x.v[j] > -INFINITY;  // false for NaN
    x.v[j] += 0.0f;
  }
  for (int j = 0; !ordinary && j < V::kSize; ++j) {
    if (base.v[j] == -INFINITY) x.v[j] = float_of_bits(kMaskedBits);
  }
  if (whole) {
    for (int j = 0; j < V::kSize; j += 4) {
      *reinterpret_cast<Four*>(out + j) = {x.v[j], x.v[j + 1], x.v[j + 2], x.v[j + 3]};
    }
  } else {
    for (int j = 0; j < V::kSize; ++j) out[j] = x.v[j];
  }
  return ordinary;
}

// Combines tokens [begin, end), whole vectors from an address of 16 bytes, into out[0 ...].
template <int32_t kDtype, bool kSteered, class Team>
PTK_KERNEL void combine_vectors(const Team& team, const Source& in, int64_t begin, int64_t end,
                                float* out, Seen& seen) {
  constexpr int kSize = Vector<kDtype>::kSize, kStep = Team::kThreads * kSize;
  const auto at = [&](const void* row) {
    return static_cast<const char*>(row) + begin * element_size(kDtype);
  };
  const char *base = at(in.base), *expert = at(in.expert), *anti = at(in.anti);
  const int count = int(end - begin);
  const bool whole = reinterpret_cast<uintptr_t>(out) % sizeof(Four) == 0;
  bool ordinary = !(in.bias || in.allowed);
  uint32_t tokens = 0;
  for (int i = team.thread() * kSize; i < count; i += kAhead * kStep) {
    Loaded loaded[kAhead];  // all loads are issued before the first is used
    for (int k = 0; k < kAhead; ++k) {
      const int offset = (i + k * kStep) * element_size(kDtype);
      if (i + k * kStep >= count) break;
      loaded[k].base = team.load_once(base + offset);
      if constexpr (kSteered) {
        loaded[k].expert = team.load_once(expert + offset);
        loaded[k].anti = team.load_once(anti + offset);
      }
    }
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * kStep >= count) break;
      ordinary &= combine_vector<kDtype, kSteered>(loaded[k], in.alpha, out + i + k * kStep, whole);
      tokens += kSize;
    }
  }
  if (ordinary) {
    seen.live += tokens;
    return;
  }
  PTK_UNROLL(1)
  for (int i = team.thread() * kSize; i < count; i += kStep) {
    PTK_UNROLL(1)
    for (int j = i; j < i + kSize; ++j) out[j] = constrained(in, out[j], begin + j, seen);
  }
}

// Tokens [begin, end) one by one, of any dtypes and alignment.
template <class Team>
PTK_KERNEL void combine_singly(const Team& team, const Source& in, int64_t begin, int64_t end,
                               float* out, Seen& seen) {
  for (int64_t i = begin + team.thread(); i < end; i += Team::kThreads) {
    out[i - begin] = combined_at(in, i, seen);
  }
}

template <class Team>
PTK_KERNEL void combine_range(const Team& team, const Source& in, int64_t begin, int64_t end, float* out,
                              Seen& seen) {
  if (in.expert) {
    switch (in.base_dtype) {
      case kDtypeBf16: return combine_vectors<kDtypeBf16, true>(team, in, begin, end, out, seen);
      case kDtypeF16: return combine_vectors<kDtypeF16, true>(team, in, begin, end, out, seen);
      default: return combine_vectors<kDtypeF32, true>(team, in, begin, end, out, seen);
    }
  }
  switch (in.base_dtype) {
    case kDtypeBf16: return combine_vectors<kDtypeBf16, false>(team, in, begin, end, out, seen);
    case kDtypeF16: return combine_vectors<kDtypeF16, false>(team, in, begin, end, out, seen);
    default: return combine_vectors<kDtypeF32, false>(team, in, begin, end, out, seen);
  }
}

// Combines tokens [begin, end): one by one up to the first address that is a multiple of 16 bytes, then by
// vectors, the rest one by one. Roles that differ in dtype or alignment have no vectors.
template <class Team>
PTK_KERNEL void combine_share(const Team& team, const Source& in, int64_t begin, int64_t end, float* out,
                              Seen& seen) {
  const int64_t width = element_size(in.base_dtype), size = 16 / width;  // of a vector, in tokens
  const auto offset = [&](const void* row) {
    return (int64_t(reinterpret_cast<uintptr_t>(row) / uint64_t(width)) + begin) % size;
  };
  const auto as_base = [&](const void* row, int32_t dtype) {
    return dtype == in.base_dtype && offset(row) == offset(in.base);
  };
  const bool alike = !in.expert || (as_base(in.expert, in.expert_dtype) && as_base(in.anti, in.anti_dtype));
  const int64_t head = begin + (size - offset(in.base)) % size;
  const int64_t first = alike && head < end ? head : end;
  const int64_t last = first + (end - first) / size * size;
  combine_range(team, in, first, last, out + (first - begin), seen);
  PTK_UNROLL(1)
  for (int part = 0; part < 2; ++part) {
    const int64_t from = part == 0 ? begin : last, to = part == 0 ? first : end;
    combine_singly(team, in, from, to, out + (from - begin), seen);
  }
}

// A lane's four tokens of a tile.
template <class Team>
PTK_KERNEL Four four_of(const Team& team, const Tiles& tiles, int t) {
  return *reinterpret_cast<const Four*>(tiles.tile(t) + 4 * team.lane());
}

// Maximum and approximate mass, to the tile's own maximum, of each tile. Lanes add up in integers of
// 2^-24: the order does not matter, and 128 of them stay below 2^32.
template <class Team>
PTK_KERNEL void summarise(const Team& team, const Tiles& tiles, int count) {
  constexpr float kLog2E = 1.4426950408889634f;
  for (int t = team.warp(); t < count; t += Team::kWarps) {
    const Four x = four_of(team, tiles, t);
    const float most = lane::max(lane::max(x.v[0], x.v[1]), lane::max(x.v[2], x.v[3]));
    const float top = value_of(team.max(key_of(most)));
    const float from = top > -INFINITY ? top : 0.0f;
    float sum = 0.0f;
    for (int j = 0; j < 4; ++j) sum += team.exp2_approx((x.v[j] - from) * kLog2E);
    // +inf makes NaN here; the sums of such a row are made anew later.
    const uint32_t total = team.sum(sum >= 0.0f ? uint32_t(sum * 0x1p24f + 0.5f) : 0);
    if (team.lane() == 0) {
      tiles.max[t] = top;
      tiles.raw[t] = float(total) * 0x1p-24f;
    }
  }
}

// +inf somewhere in the row: only those tokens stay, all equal. Returns how many this warp has.
template <class Team>
PTK_KERNEL uint32_t keep_positive_inf(const Team& team, const Tiles& tiles, int count) {
  uint32_t live = 0;
  for (int t = team.warp(); t < count; t += Team::kWarps) {
    float* x = tiles.tile(t) + 4 * team.lane();
    uint32_t kept = 0;
    for (int j = 0; j < 4; ++j) {
      const bool infinite = x[j] == INFINITY;
      x[j] = infinite ? 0.0f : -INFINITY;
      kept += infinite;
    }
    kept = team.sum(kept);
    live += kept;
    if (team.lane() == 0) {
      tiles.max[t] = kept ? 0.0f : -INFINITY;
      tiles.raw[t] = float(kept);
    }
  }
  return live;
}

template <class Team>
PTK_KERNEL Row place_row(const Team& team, size_t place, int64_t vocab_size) {
  Row row{};
  row.place = uint32_t(place);
  row.tiles = int(tiles_of(vocab_size));
  const Share share = share_of_block(row.tiles, team.block(), team.blocks());
  row.count = share.count;
  row.first_id = uint32_t(share.first) * kTile;
  return row;
}

// Reads and combines the row; all blocks know its maximum, count and status after.
template <class Team>
PTK_KERNEL Row prepare_row(Cluster<Team>& cluster, const Source& in, size_t place) {
  const Team& team = cluster.team;
  Row row = place_row(team, place, in.vocab_size);
  const Tiles tiles(cluster.s, row);
  const int64_t begin = row.first_id, whole = begin + int64_t(row.count) * kTile;
  const int64_t end = whole < in.vocab_size ? whole : in.vocab_size;
  Seen seen;
  combine_share(team, in, begin, end, tiles.x, seen);
  for (int64_t i = end + team.thread(); i < whole; i += Team::kThreads) tiles.x[i - begin] = -INFINITY;
  team.sync();
  summarise(team, tiles, row.count);
  team.sync();
  uint32_t top = 0, bottom = 0;  // order keys; of the bottom the complement
  for (int t = team.thread(); t < row.count; t += Team::kThreads) {
    const uint32_t key = key_of(tiles.max[t]);
    top = key > top ? key : top;
    if (tiles.max[t] > -INFINITY) bottom = ~key > bottom ? ~key : bottom;
  }
  uint64_t all[] = {team.max(top), team.max(bottom), team.sum(seen.live), team.max(seen.nan)};
  cluster.meet();  // only now: the loads of the row did not wait for other blocks
  cluster.template exchange<Merge::kMax, Merge::kMax, Merge::kSum, Merge::kMax>(all);
  row.max = value_of(uint32_t(all[0]));
  row.least = value_of(~uint32_t(all[1]));
  row.live = uint32_t(all[2]);
  row.status = all[3] ? kStatusNan : 0;
  if (row.max == INFINITY) {
    row.status |= kStatusPositiveInf;
    row.max = row.least = 0.0f;
    uint64_t live[] = {keep_positive_inf(team, tiles, row.count)};
    cluster.template exchange<Merge::kSum>(live);
    row.live = uint32_t(live[0]);
  }
  if (row.live == 0) row.status |= kStatusEmpty;
  return row;
}

// Masses of the row: exact at its temperature, where that is wanted; at temperature 1 by the tiles' sums.
struct RowMass {
  uint64_t scaled, raw;
};

template <class Team>
PTK_KERNEL RowMass row_mass(Cluster<Team>& cluster, const Row row, Exponent e, bool scaled) {
  const Team& team = cluster.team;
  const Tiles tiles(cluster.s, row);
  uint64_t sums[] = {0, 0};
  for (int t = team.warp(); scaled && t < row.count; t += Team::kWarps) {
    uint64_t total = 0;
    if ((tiles.max[t] - row.max) * e.hi >= kNoMass) {
      const Four x = four_of(team, tiles, t);
      Digits digits;
      for (int j = 0; j < 4; ++j) digits.add(exponential(x.v[j] - row.max, e));
      total = warp_total(team, digits);
    }
    sums[0] += total;
    if (team.lane() == 0) tiles.mass[t] = share_of(total);
  }
  const Exponent one = make_exponent(1.0);
  for (int t = team.thread(); t < row.count; t += Team::kThreads) {
    const double share = double(tiles.raw[t]) * double(exponential(tiles.max[t] - row.max, one));
    sums[1] += uint64_t(share * kMassOne);
  }
  for (int mask = 16; mask > 0; mask /= 2) sums[1] += team.shuffle_xor(sums[1], mask);
  cluster.template exchange<Merge::kSum, Merge::kSum>(sums);
  return {sums[0], sums[1]};
}

}  // namespace cuda
}  // namespace ptk
