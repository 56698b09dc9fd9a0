// Plain types that the kernels of every instruction set share.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>

#include "../common/addressing.h"
#include "../common/target.h"

namespace ptk {

// Tile summaries are read in whole groups of kTile.
constexpr int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

constexpr int kMaxTiles = int(kMaxVocabSize / kTile);
constexpr int kCandidates = 8192;  // tokens collected at once
constexpr int kSorted = 64;        // that are sorted without bins
constexpr int kBinBits = 8;
constexpr int kBins = 1 << kBinBits;
constexpr int kSampled = 16;       // tokens of a tile: the widest vector

constexpr int64_t kInt8Group = 128;  // int8 weights of a row that share a scale; the last group may have fewer
constexpr int64_t int8_groups(int64_t inputs) { return (inputs + kInt8Group - 1) / kInt8Group; }

// Working memory of the selection, 192 KiB whatever the vocabulary.
struct Scratch {
  alignas(64) float x[kCandidates + kSampled];
  alignas(64) uint32_t ids[kCandidates + kSampled];
  alignas(64) float p[kCandidates];
  alignas(64) uint32_t bins[std::max(kCandidates, kMaxTiles) + kSampled];
  uint64_t order[kCandidates];
};

constexpr int kMaxChunks = 64;  // that the tiles of one row are shared out in

// One row's working memory.
struct RowBuffer {
  float* x;         // [padded vocabulary]
  float* tile_max;  // [padded tiles]
};

// One thread's working memory: two rows for verification by rejection, else one.
struct Buffers {
  RowBuffer rows[2];
  Scratch* scratch;
  const proxytune_parallel* parallel;  // threads for the tiles of one row; null: one thread
};

// A layer with int8 weights: a head's arguments, outputs as tokens, weight.dtype unread; and its scales [outputs,
// int8_groups(size)].
struct Int8LinearArgs : proxytune_head_logits_args {
  const void* scales;
  int32_t scale_dtype;
};

// The kernels of one instruction set: the operators of the C API on one row, and int8_linear, which is not in it.
struct Kernels {
  const char* name;
  void (*combine)(const proxytune_combine_args&, int64_t row);
  void (*sample)(const proxytune_sample_args&, int64_t row, Buffers&);
  void (*score)(const proxytune_score_args&, int64_t row, int64_t position, Buffers&);
  void (*verify)(const proxytune_verify_args&, int64_t row, Buffers&);
  void (*head_logits)(const proxytune_head_logits_args&, int64_t begin, int64_t end);
  void (*int8_linear)(const Int8LinearArgs&, int64_t begin, int64_t end);
  const struct ShardKernels* shard;  // shard.h
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The kernels in use: the widest this processor runs, or what PROXYTUNE_FORCE_ISA names.
const Kernels* current_kernels();

}  // namespace ptk
