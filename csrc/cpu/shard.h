// Rows whose vocabulary is spread over several ranks: a rank's part, and what the ranks tell each other
// about a row (docs/sharded.md).
#pragma once

#include "types.h"

namespace ptk {

constexpr int kIdBits = 19;
constexpr uint32_t kLastId = uint32_t(kMaxVocabSize) - 1;

// 51 bits in the contract's order of tokens, the first one highest: by x, then by id. Scores, too, have such
// keys. Keys of different tokens differ, and none is 0.
inline int64_t token_key(float x, uint32_t id) {
  // -0 + 0 = +0: equal logits must have equal bits for the order by id.
  return int64_t(key_of(x + 0.0f)) << kIdBits | (kLastId - id);
}
inline float key_value(int64_t key) { return value_of(uint32_t(key >> kIdBits)); }
inline uint32_t key_id(int64_t key) { return kLastId - (uint32_t(key) & kLastId); }

// The lowest key of a token that is not masked: -FLT_MAX, the last id.
constexpr int64_t kLowestKey = int64_t(0x00800000) << kIdBits;

// A token drawn from the residual goes before all that are drawn from the target.
constexpr int64_t kResidualBit = int64_t(1) << 51;

// Part of one row: fp32 as `combine` leaves it, of tokens start to start + size - 1.
struct ShardRow {
  const float* x;
  int64_t size, start;
};

// A rank's summary of its part: key_of(max) << 21 | whether there is a NaN << 20 | the number of tokens that
// are not masked, or, where the maximum is +inf, of those that are +inf.
constexpr int kSummaryCountBits = 20;

// What all ranks' summaries say of the row.
struct RowHead {
  float max = -INFINITY;   // finite, or -inf where nothing is left
  bool infinite = false;   // a +inf was there: its tokens are 0, all others masked
  uint32_t count = 0;      // tokens left
  int32_t status = 0;
};

// The words of a rank's draw. The last one is there where a token was asked for.
enum Word : int {
  kWordBest,      // key of the best score among the kept tokens, 0 for none
  kWordCount,     // number of the kept tokens << 32 | bits of the best one's x
  kWordKeptMass,  // mass of the kept tokens
  kWordMass,      // mass of all
  kWordRawMass,   // mass of all at temperature 1
  kWordWanted,    // key of the token asked for, 0 where it is elsewhere or masked
};
constexpr int kWords = 5;
constexpr int kResidualWords = 2;

// A kept set: the tokens whose key is at least this.
struct KeptKeys {
  int64_t key;
  uint64_t count, mass;
};

// A row of which the kept set and the mass at temperature 1 are known.
struct KnownRow {
  KeptKeys kept;
  uint64_t raw_mass;
};

struct ShardResult {
  int64_t token_id = -1;
  float logprob = NAN, raw_logprob = NAN;
  int32_t num_kept = 0, status = 0;
  KeptKeys kept{};
  float wanted_logprob = NAN, wanted_raw_logprob = NAN;  // of the token asked for, where it is kept
  uint64_t raw_mass = 0;                                 // of the row at temperature 1
  bool undecided = false;      // the candidates end before the kept set does
};

// What the ranks have sent of some rows.
struct Gathered {
  int64_t world, rows;
  const int64_t* summaries;   // [world, rows]
  const int64_t* words;       // [world, rows, num_words]
  int64_t num_words;
  const int64_t* candidates;  // [world, rows, num_candidates], descending, 0 past the last; or null
  int64_t num_candidates;

  int64_t summary(int64_t rank, int64_t row) const { return summaries[rank * rows + row]; }
  const int64_t* word(int64_t rank, int64_t row) const {
    return words + (rank * rows + row) * num_words;
  }
  const int64_t* candidate(int64_t rank, int64_t row) const {
    return candidates + (rank * rows + row) * num_candidates;
  }
};

// Target or draft of one position of rejection, on this rank.
struct ShardSide {
  ShardRow row;
  RowHead head;
  int64_t lowest_kept;  // key
  uint64_t kept_mass;   // of all ranks
};

// Whether the token is drawn from the listed candidates, where the kept set is not known before.
inline bool is_listed(const RowParams& p, const RowHead& head) {
  return !p.greedy && (p.top_k < head.count || p.top_p < kTopPOff);
}

// What depends on the instruction set.
struct ShardKernels {
  int64_t (*scan)(const ShardRow&);
  void (*draw)(const ShardRow&, const RowHead&, const RowParams&, const NoiseKey&, int64_t lowest_kept,
               bool drawn, int64_t* words);
  void (*residual)(const ShardSide& target, const ShardSide& draft, const RowParams&,
                   const NoiseKey&, int64_t* words);
  void (*key_masses)(const int64_t* keys, int64_t n, float max, Exponent, uint64_t* out);
  int64_t (*gumbel_max_keys)(const int64_t* keys, int64_t n, float max, const RowParams&, const NoiseKey&);
};

RowHead head_of(const int64_t* summaries, int64_t world, int64_t rows, int64_t row);

// The results of one row; `given` is what is known of it, or null.
ShardResult finish_row(const ShardKernels&, const Gathered&, int64_t row, const RawParams&,
                       uint32_t noise_stream, const KnownRow* given);

}  // namespace ptk
