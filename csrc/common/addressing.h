// Where a call's row lies, and its parameters (include/proxytune.h).
#pragma once

#include "../include/proxytune.h"
#include "params.h"

namespace ptk {

// Null where the role is absent.
PTK_HOST_DEVICE const void* logits_at(const proxytune_logits& l, int64_t row, int64_t position) {
  if (!l.data) return nullptr;
  const int64_t bytes = l.dtype == PROXYTUNE_F32 ? 4 : 2;
  return static_cast<const char*>(l.data) + (row * l.row_stride + position * l.position_stride) * bytes;
}

PTK_HOST_DEVICE const float* bias_at(const proxytune_inputs& in, int64_t row, int64_t position) {
  if (!in.bias) return nullptr;
  return in.bias + row * in.bias_row_stride + position * in.bias_position_stride;
}

PTK_HOST_DEVICE const uint32_t* allowed_at(const proxytune_inputs& in, int64_t row, int64_t position) {
  if (!in.allowed) return nullptr;
  return in.allowed + row * in.allowed_row_stride + position * in.allowed_position_stride;
}

template <typename T>
PTK_HOST_DEVICE T value_at(const T* values, int64_t row, T fallback) {
  return values ? values[row] : fallback;
}

PTK_HOST_DEVICE RawParams params_at(const proxytune_params& p, const proxytune_inputs& in, int64_t row) {
  return {value_at(in.alpha, row, 1.0f),      value_at(p.temperature, row, 1.0f),
          value_at(p.top_k, row, int32_t(0)), value_at(p.top_p, row, 1.0f),
          value_at(p.min_p, row, 0.0f),       value_at(p.filter_order, row, int32_t(0)),
          value_at(p.seed, row, int64_t(0)),  value_at(p.position, row, int64_t(0))};
}

// The parameters at a drafted position: past 2^63 - 1 it is negative, so out of range.
PTK_HOST_DEVICE RawParams params_at_draft(RawParams p, int64_t draft) {
  p.position = int64_t(uint64_t(p.position) + uint64_t(draft));
  return p;
}

}  // namespace ptk
