// Plain types that the kernels of every instruction set share.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../common/binning.h"
#include "../common/dtypes.h"
#include "../common/order.h"
#include "../common/params.h"
#include "../common/race.h"

namespace ptk {

// One role's logits of one row; null where the role is absent.
struct Matrix {
  const void* row = nullptr;
  int32_t dtype = kDtypeF32;
};

struct RowInput {
  Matrix base, expert, anti;  // expert and anti are null for the base alone
  float alpha;
  const float* bias;          // null, or [vocab_size]
  const uint32_t* allowed;    // null, or [ceil(vocab_size / 32)]
  int64_t vocab_size;
};

// Tile summaries are read in whole groups of kTile.
constexpr int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

constexpr int kMaxTiles = int(kMaxVocabSize / kTile);
constexpr int kCandidates = 2048;   // tokens sorted at once
constexpr int kTables = 4;
constexpr int kBoundBins = 256;

// Working memory of the selection, about 84 KiB whatever the vocabulary.
struct Scratch {
  alignas(64) float x[kCandidates];
  alignas(64) uint32_t ids[kCandidates];
  uint64_t order[kCandidates];
  uint64_t mass[kTables][kBins + 1];  // the last bin is for what is outside the range
  uint32_t counts[kTables][kBins + 1];
  uint8_t bins[kMaxTiles];
};

// The caller's threads, for the tiles of one row where there are fewer rows than threads.
struct Parallel {
  void (*run)(void* pool, int64_t chunks, void (*body)(void* context, int64_t chunk), void* context);
  void* pool;
  int chunks;
};
constexpr int kMaxChunks = 64;

// One row's working memory.
struct RowBuffer {
  float* x;         // [padded vocabulary]
  float* tile_max;  // [padded tiles]
};

// One thread's working memory: two rows for verification by rejection, else one.
struct Buffers {
  RowBuffer rows[2];
  Scratch* scratch;
  const Parallel* parallel;  // null: one thread
};

struct SampleResult {
  int64_t token_id = -1;
  float logprob = NAN, raw_logprob = NAN;
  int32_t num_kept = 0, status = 0;
};

// Where a row's likeliest tokens and their raw logprobs go, in order; either may be null.
struct TopTokens {
  int count = 0;  // at most kMaxTop; 0: they are not wanted
  int64_t* token_ids = nullptr;
  float* logprobs = nullptr;
  void put(int i, int64_t id, float logprob) const {
    if (token_ids) token_ids[i] = id;
    if (logprobs) logprobs[i] = logprob;
  }
};

struct VerifyStep {
  int64_t token_id = -1;
  float logprob = NAN, raw_logprob = NAN;
  int32_t status = 0;
  bool accepted = false;
};

// Hidden states and weights of one role, and how its logits lie.
struct HeadInput {
  const float* hidden;  // [rows, size]
  int64_t hidden_stride;
  int64_t rows, size;
  const void* weight;  // [tokens, size]
  int64_t weight_stride;
  int32_t dtype;  // of the weights
  int64_t out_stride;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  const struct ShardKernels* shard;  // shard_types.h
  void (*combine)(const RowInput&, float* out);
  SampleResult (*sample)(const RowInput&, const RawParams&, uint32_t stream, const TopTokens&,
                         Buffers&);
  float (*score)(const RowInput&, int64_t token_id, Buffers&);
  VerifyStep (*coupled)(const RowInput&, const RawParams&, int64_t draft_id, Buffers&);
  VerifyStep (*reject)(const RowInput&, const RowInput* draft, const RawParams&, int64_t draft_id,
                       uint32_t undrafted_stream, Buffers&);
  void (*head_logits)(const HeadInput&, int64_t begin, int64_t end, float* out);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The kernels in use: the widest this processor runs, or what PROXYTUNE_FORCE_ISA names.
const Kernels* current_kernels();

}  // namespace ptk
