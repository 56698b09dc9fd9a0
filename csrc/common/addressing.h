// Where a call's rows lie (include/proxytune.h).
#pragma once

#include "../include/proxytune.h"
#include "dtypes.h"

namespace ptk {

// What one row is combined from.
struct Source {
  const void *base, *expert, *anti;  // expert and anti are null for the base alone
  int32_t base_dtype, expert_dtype, anti_dtype;
  float alpha;
  const float* bias;        // null, or [vocab_size]
  const uint32_t* allowed;  // null, or [ceil(vocab_size / 32)]
  const proxytune_edit* edits;  // [num_edits]
  int64_t num_edits;
  const float* penalties;  // null, or [3]
  int64_t vocab_size;
};

// Null where there is no such role.
PTK_HOST_DEVICE const void* logits_at(const proxytune_logits& l, int64_t row, int64_t position) {
  if (!l.data) return nullptr;
  const int64_t bytes = l.dtype == PROXYTUNE_F32 ? 4 : 2;
  return static_cast<const char*>(l.data) + (row * l.row_stride + position * l.position_stride) * bytes;
}

PTK_HOST_DEVICE Source source_at(const proxytune_inputs& in, float alpha, int64_t row, int64_t position) {
  Source source{};
  source.base = logits_at(in.base, row, position);
  source.base_dtype = in.base.dtype;
  // alpha = 0 gives base exactly, whatever the other two hold: they are not read.
  if (alpha != 0.0f) {
    source.expert = logits_at(in.expert, row, position);
    source.anti = logits_at(in.anti, row, position);
    source.expert_dtype = in.expert.dtype;
    source.anti_dtype = in.anti.dtype;
  }
  source.alpha = alpha;
  if (in.bias) source.bias = in.bias + row * in.bias_row_stride + position * in.bias_position_stride;
  if (in.allowed) {
    source.allowed = in.allowed + row * in.allowed_row_stride + position * in.allowed_position_stride;
  }
  source.num_edits = in.num_edits;
  if (in.num_edits) source.edits = in.edits + row * in.edits_row_stride + position * in.edits_position_stride;
  if (in.penalties) source.penalties = in.penalties + row * 3;
  source.vocab_size = in.vocab_size;
  return source;
}

// The drafter's row of a position: its logits as they are.
PTK_HOST_DEVICE Source draft_source_at(const proxytune_verify_args& args, int64_t row, int64_t position) {
  Source source{};
  source.base = logits_at(args.draft_logits, row, position);
  source.base_dtype = args.draft_logits.dtype;
  source.vocab_size = args.inputs.vocab_size;
  return source;
}

// -1 where the row has no draft at the position.
PTK_HOST_DEVICE int64_t draft_at(const proxytune_verify_args& args, int64_t row, int64_t position) {
  if (position >= args.num_drafts) return -1;
  return args.draft_token_ids[row * args.draft_token_ids_row_stride + position];
}

}  // namespace ptk
