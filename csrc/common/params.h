// One row's parameters, derived once, and the integer arithmetic of the contract that every backend
// shares (docs/contracts.md, Selection).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../include/proxytune.h"
#include "philox.h"

namespace ptk {

constexpr int kTile = 128;                   // tokens per tile summary
constexpr int64_t kMaxVocabSize = 1 << 19;   // masses of 2^44 a token sum to less than 2^63
constexpr int kMaxTop = 128;                 // likeliest tokens that can be asked for
constexpr double kMassOne = 17592186044416.0;  // 2^44, the mass of the likeliest token

PTK_HOST_DEVICE double log_mass(uint64_t mass) { return std::log(double(mass) / kMassOne); }

PTK_HOST_DEVICE constexpr int64_t tiles_of(int64_t vocab_size) { return (vocab_size + kTile - 1) / kTile; }

enum Status : int32_t { kStatusNan = 1, kStatusPositiveInf = 2, kStatusEmpty = 4, kStatusBadParams = 8 };
enum FilterOrder : int32_t { kOrderVllm = 0, kOrderHf = 1, kOrderJoint = 2 };
enum VerifyMode : int32_t { kVerifyCoupled = 0, kVerifyRejection = 1 };

// A row's parameters as the caller gives them.
struct RawParams {
  float alpha, temperature;
  int32_t top_k;
  float top_p, min_p;
  int32_t filter_order;
  int64_t seed, position;
};

// The fields of proxytune_params, in order: X(type, name, default). `alpha` comes before them, with the inputs.
#define PTK_EACH_PARAM(X)                                                                    \
  X(float, temperature, 1), X(int32_t, top_k, 0), X(float, top_p, 1), X(float, min_p, 0),    \
      X(int32_t, filter_order, 0), X(int64_t, seed, 0), X(int64_t, position, 0)

template <typename T>
PTK_HOST_DEVICE T value_at(const T* values, int64_t row, T fallback) {
  return values ? values[row] : fallback;
}

PTK_HOST_DEVICE RawParams params_at(const float* alpha, const proxytune_params& p, int64_t row) {
#define PTK_VALUE_AT(type, name, fallback) value_at(p.name, row, type(fallback))
  return {value_at(alpha, row, 1.0f), PTK_EACH_PARAM(PTK_VALUE_AT)};
#undef PTK_VALUE_AT
}

// The parameters at a drafted position. Past 2^63 - 1 the position becomes negative, which is out of range.
PTK_HOST_DEVICE RawParams params_at_draft(RawParams p, int64_t draft) {
  p.position = int64_t(uint64_t(p.position) + uint64_t(draft));
  return p;
}

// exp2 argument per unit of logit: log2(e) / T as a sum, so that the argument is rounded once.
struct Exponent {
  float hi, lo;
  float floor;  // the logit difference whose exponent is -100; finite
};

// Temperatures above 2^120 count as 2^120 here, so that the floor is finite: masses change only where logits
// differ by more than 2^90.
PTK_HOST_DEVICE Exponent make_exponent(double temperature) {
  const double value = 1.4426950408889634 / (temperature < 0x1p120 ? temperature : 0x1p120);
  const float hi = float(value);
  return {hi, float(value - double(hi)), float(-100.0 / value)};
}

struct RowParams {
  float alpha;
  bool greedy;
  float inv_temperature;
  Exponent exponent;
  uint32_t top_k;      // UINT32_MAX: off
  uint64_t top_p;      // 32 fractional bits; 2^32: off
  float min_p_shift;   // keep x - max >= this; -inf: off
  int32_t filter_order;
};

// False where a parameter is out of its range (then the row is not sampled: kStatusBadParams).
PTK_HOST_DEVICE bool valid(const RawParams& p) {
  // Comparisons are false for NaN.
  return p.alpha >= -FLT_MAX && p.alpha <= FLT_MAX && p.temperature >= 0 &&
         p.temperature <= FLT_MAX && p.top_k >= -1 && p.top_p > 0 && p.top_p <= 1 && p.min_p >= 0 &&
         p.min_p <= 1 && p.filter_order >= 0 && p.filter_order <= 2 && p.position >= 0;
}

PTK_HOST_DEVICE RowParams make_row_params(const RawParams& p) {
  RowParams row;
  row.alpha = p.alpha;
  // A subnormal temperature has no finite reciprocal, and GPUs may flush it: it is 0.
  row.greedy = p.temperature < FLT_MIN;
  const double temperature = row.greedy ? 1.0 : double(p.temperature);
  row.inv_temperature = row.greedy ? 1.0f : 1.0f / p.temperature;
  row.exponent = make_exponent(temperature);
  row.top_k = p.top_k > 0 ? uint32_t(p.top_k) : UINT32_MAX;
  row.top_p = uint64_t(double(p.top_p) * 4294967296.0);
  row.min_p_shift = p.min_p > 0 ? float(temperature * std::log(double(p.min_p))) : -INFINITY;
  row.filter_order = p.filter_order;
  return row;
}

constexpr uint64_t kTopPOff = uint64_t(1) << 32;

// ceil(p * mass), at least 1; p has 32 fractional bits and is below 1, mass is below 2^63: exact.
PTK_HOST_DEVICE uint64_t mass_target(uint64_t top_p, uint64_t mass) {
  const uint64_t low = top_p * (mass & 0xFFFFFFFFu);
  const uint64_t high = top_p * (mass >> 32);
  const uint64_t target = high + (low >> 32) + ((low & 0xFFFFFFFFu) != 0);
  return target > 0 ? target : 1;
}

}  // namespace ptk
