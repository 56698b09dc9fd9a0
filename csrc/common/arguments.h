// Which arguments the C API takes, on the CPU and on GPUs, and its return values in words.
#pragma once

#include "../include/proxytune.h"
#include "params.h"

namespace ptk {

static_assert(PROXYTUNE_MAX_TOP == kMaxTop);

inline bool valid_logits(const proxytune_logits& l) {
  return !l.data || (l.dtype >= PROXYTUNE_F32 && l.dtype <= PROXYTUNE_BF16);
}

inline bool valid_inputs(const proxytune_inputs& in) {
  return in.vocab_size >= 1 && in.vocab_size <= kMaxVocabSize && in.base.data &&
         in.num_edits >= 0 && (in.edits || in.num_edits == 0) && !in.expert.data == !in.anti.data && valid_logits(in.base) && valid_logits(in.expert) &&
         valid_logits(in.anti);
}

inline bool valid_sample(const proxytune_sample_args* args) {
  return args && valid_inputs(args->inputs) && args->token_ids && args->noise_stream >= 0 &&
         args->noise_stream <= int32_t(kStreamBonus) && args->num_top >= 0 && args->num_top <= kMaxTop;
}

inline bool valid_verify(const proxytune_verify_args* args) {
  if (!args || !valid_inputs(args->inputs) || !args->token_ids || !args->num_accepted ||
      args->num_drafts < 0 || (args->num_drafts > 0 && !args->draft_token_ids)) {
    return false;
  }
  if (args->mode == PROXYTUNE_VERIFY_COUPLED) return true;
  if (args->mode != PROXYTUNE_VERIFY_REJECTION) return false;
  return args->num_drafts == 0 || (args->draft_logits.data && valid_logits(args->draft_logits));
}

inline bool valid_score(const proxytune_score_args* args) {
  return args && valid_inputs(args->inputs) && args->token_ids && args->logprobs && args->positions >= 1;
}

inline bool valid_combine(const proxytune_combine_args* args) {
  return args && valid_inputs(args->inputs) && args->x;
}

inline bool valid_head_logits(const proxytune_head_logits_args* args) {
  return args && args->hidden && args->weight.data && valid_logits(args->weight) && args->logits &&
         args->rows >= 0 && args->size >= 1;
}

inline bool valid_workspace(const void* workspace, size_t size, size_t wanted, size_t alignment) {
  return workspace && size >= wanted && reinterpret_cast<uintptr_t>(workspace) % alignment == 0;
}

inline const char* error_text(int code) {
  switch (code) {
    case PROXYTUNE_OK: return "no error";
    case PROXYTUNE_ERROR_ARGUMENT:
      return "a required pointer is missing, a size, dtype, mode or stream is out of range, or a workspace "
             "is too small or not aligned";
    case PROXYTUNE_ERROR_ISA:
      return "PROXYTUNE_FORCE_ISA names an instruction set that is unknown or not on this processor";
    case PROXYTUNE_ERROR_MEMORY: return "the workspace could not be allocated";
    case PROXYTUNE_ERROR_DEVICE:
      return "the device has a compute capability below 9.0, or one that nothing was compiled for";
    case PROXYTUNE_ERROR_SHAPE:
      return "a row does not fit in the shared memory of the largest cluster that the device runs";
    case PROXYTUNE_ERROR_EDITS: return "the kernels for GPUs take no edits";
    default: return "unknown error code";
  }
}

}  // namespace ptk
