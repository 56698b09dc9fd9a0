// The order of tokens, x descending then id ascending, and its prefixes: what filters keep
// (docs/contracts.md, Selection).
#pragma once

#include "dtypes.h"
#include "params.h"

namespace ptk {

constexpr float kLowest = -FLT_MAX;  // masked tokens are below it

// An integer that orders as the number does, for all but NaN.
PTK_HOST_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = bits_of_float(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
PTK_HOST_DEVICE float value_of(uint32_t key) {
  return float_of_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// A token's x or score, and its id, in 64 bits. The first of two tokens has the larger number: the one with
// the higher value, or with the lower id. 0 comes after all of them.
PTK_HOST_DEVICE uint64_t pack(float value, uint32_t id) { return uint64_t(key_of(value)) << 32 | uint32_t(~id); }
PTK_HOST_DEVICE float packed_value(uint64_t packed) { return value_of(uint32_t(packed >> 32)); }
PTK_HOST_DEVICE uint32_t packed_id(uint64_t packed) { return ~uint32_t(packed); }

// A prefix of the order: x > this x, or x equal and id <= this id.
struct Prefix {
  float x;
  uint32_t id;
  uint32_t count;
  uint64_t mass;

  PTK_HOST_DEVICE bool has(float value, uint32_t token_id) const {
    return value > x || (value == x && token_id <= id);
  }
};

// A prefix is long enough when it has this many tokens or this much mass.
struct Need {
  uint32_t count;
  uint64_t mass;
  PTK_HOST_DEVICE bool met(uint32_t c, uint64_t m) const { return c >= count || m >= mass; }
};

// The lowest x that min_p keeps, rounding included: fl(x - max) >= shift. Rounding is monotone, so bisection
// over the ordered keys finds it.
PTK_HOST_DEVICE float min_p_cutoff(float max, float shift) {
  uint32_t low = key_of(kLowest), high = key_of(max);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (value_of(middle) - max >= shift) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return value_of(low);
}

// Whether select_kept reads the mass of the whole row, of `count` tokens.
PTK_HOST_DEVICE bool needs_total_mass(const RowParams& p, uint32_t count) {
  const bool min_p = p.min_p_shift > -INFINITY;
  if (p.filter_order == kOrderJoint) return true;
  return p.top_k >= count && !(p.filter_order == kOrderVllm && min_p);
}

// The kept set of a row that has a token left: the one place of the filters' policy, on the CPU, on GPUs and
// over ranks. `total_mass` is the whole row's where needs_total_mass is true, else anything. Search finds in the row:
//   Prefix find(float low, Need)  the shortest prefix of the tokens with x >= low that meets the need,
//                                 all of them where none does
//   Prefix whole(float low)       all tokens with x >= low
template <class Search>
PTK_HOST_DEVICE Prefix select_kept(Search& search, const RowParams& p, float max, uint32_t count,
                                   uint64_t total_mass) {
  // -inf where min_p is off: a cutoff of min_p's may be any other number, kLowest too.
  const float cutoff = p.min_p_shift > -INFINITY ? min_p_cutoff(max, p.min_p_shift) : -INFINITY;
  const float low = p.filter_order == kOrderVllm ? cutoff : -INFINITY;
  const bool top_k = p.top_k < count, top_p = p.top_p < kTopPOff;
  const bool joint = p.filter_order == kOrderJoint;
  Prefix kept{kLowest, UINT32_MAX, count, total_mass};
  if (!joint && !top_k && low > -INFINITY) kept = search.whole(low);
  // First by count, or by count and mass at once; then by mass, of what that left.
  PTK_UNROLL(1)
  for (int stage = 0; stage < 2; ++stage) {
    const bool by_count = stage == 0 && top_k, by_mass = joint ? stage == 0 : stage == 1;
    if (!by_count && !(by_mass && top_p)) continue;
    const uint64_t mass = by_mass && top_p ? mass_target(p.top_p, kept.mass) : UINT64_MAX;
    kept = search.find(low > kept.x ? low : kept.x, Need{by_count ? p.top_k : UINT32_MAX, mass});
  }
  return kept.x < cutoff ? search.whole(cutoff) : kept;
}

}  // namespace ptk
