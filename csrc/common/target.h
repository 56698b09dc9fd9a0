// A row with its kept set, and what the operators say of a token that was drawn from it: the results of
// the CPU and of the CUDA kernels.
#pragma once

#include <tuple>

#include "order.h"

namespace ptk {

// The log of the probability that the kept set gives one of its tokens, whose x lies `below` the maximum.
PTK_HOST_DEVICE float kept_logprob(float below, const RowParams& p, uint64_t kept_mass) {
  if (p.greedy) return 0.0f;
  return float(double(below) * double(p.inv_temperature) - log_mass(kept_mass));
}

// The same at temperature 1, of the whole row.
PTK_HOST_DEVICE float whole_logprob(float below, uint64_t raw_mass) {
  return float(double(below) - log_mass(raw_mass));
}

template <class Row>
struct Target {
  Row row;
  Prefix kept;
  uint64_t raw_mass;  // of the whole row, at temperature 1
  bool drawable;      // a token is left

  PTK_HOST_DEVICE float logprob(const RowParams& p, float x) const {
    return kept_logprob(x - row.max, p, kept.mass);
  }
  PTK_HOST_DEVICE float raw_logprob(float x) const { return whole_logprob(x - row.max, raw_mass); }
};

// A result of an operator, and the field of the C API's arguments that says where it goes: one value for
// each row, or for each row and column. An optional one is not written where there are no columns. `columns`
// says which of a call's numbers of columns it has: the first (1), the second (2), none (0).
template <typename Field, bool kOptional = false>
struct Result {
  const char* name;
  Field field;
  int columns = 0;
};
template <typename Field>
constexpr Result<Field, true> optional_result(const char* name, Field field, int columns = 1) {
  return {name, field, columns};
}

// The results of each operator, in the order of its schema.
inline constexpr std::tuple kSampleResults{
    Result{"token_ids", &proxytune_sample_args::token_ids},
    Result{"logprobs", &proxytune_sample_args::logprobs},
    Result{"raw_logprobs", &proxytune_sample_args::raw_logprobs},
    Result{"num_kept", &proxytune_sample_args::num_kept},
    Result{"status", &proxytune_sample_args::status},
    optional_result("top_token_ids", &proxytune_sample_args::top_token_ids),
    optional_result("top_logprobs", &proxytune_sample_args::top_logprobs),
    optional_result("attribution", &proxytune_sample_args::attribution, 2),
};
inline constexpr std::tuple kVerifyResults{
    Result{"token_ids", &proxytune_verify_args::token_ids, 1},
    Result{"num_accepted", &proxytune_verify_args::num_accepted},
    Result{"logprobs", &proxytune_verify_args::logprobs, 1},
    Result{"raw_logprobs", &proxytune_verify_args::raw_logprobs, 1},
    Result{"status", &proxytune_verify_args::status},
};

// Writes what sample says of a row; token_id is -1, and x is not read, where nothing was drawn. In two
// parts of one logarithm each: on a GPU a thread takes one of them.
template <class Row>
PTK_HOST_DEVICE void write_draw(const proxytune_sample_args& args, int64_t row, const Target<Row>& target,
                                const RowParams& p, int64_t token_id, float x, int32_t status) {
  const bool drawn = token_id >= 0;
  args.token_ids[row] = token_id;
  if (args.num_kept) args.num_kept[row] = drawn ? int32_t(target.kept.count) : 0;
  if (args.status) args.status[row] = status;
  if (args.logprobs) args.logprobs[row] = drawn ? target.logprob(p, x) : NAN;
}
template <class Row>
PTK_HOST_DEVICE void write_raw_logprob(const proxytune_sample_args& args, int64_t row,
                                       const Target<Row>& target, int64_t token_id, float x) {
  if (args.raw_logprobs) args.raw_logprobs[row] = token_id >= 0 ? target.raw_logprob(x) : NAN;
}

// Writes likeliest token number i of a row: -1 and NaN where it has fewer.
PTK_HOST_DEVICE void write_top_token(const proxytune_sample_args& args, int64_t row, int i,
                                     int64_t token_id, float raw_logprob) {
  const int64_t at = row * args.num_top + i;
  if (args.top_token_ids) args.top_token_ids[at] = token_id;
  if (args.top_logprobs) args.top_logprobs[at] = raw_logprob;
}

// Writes what verify says of a position, number `at` of all: -1 and NaN where it emits nothing.
PTK_HOST_DEVICE void write_emitted(const proxytune_verify_args& args, int64_t at, int64_t token_id,
                                   float logprob, float raw_logprob) {
  args.token_ids[at] = token_id;
  if (args.logprobs) args.logprobs[at] = logprob;
  if (args.raw_logprobs) args.raw_logprobs[at] = raw_logprob;
}

// The noise that draws a token where there is no draft. A row without any draft gets what sample draws.
PTK_HOST_DEVICE uint32_t undrafted_stream(int32_t mode, int64_t position) {
  return mode == PROXYTUNE_VERIFY_REJECTION && position > 0 ? kStreamBonus : kStreamSample;
}

}  // namespace ptk
