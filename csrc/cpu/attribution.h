// What steering did to a row (docs/contracts.md, Attribution). Sums over the roles' logits are taken as they are
// combined, the divergence goes with the raw masses, and a token's rank takes another look at the base's logits.
#pragma once

namespace ptk {
namespace PTK_ISA {

// sum + 2^t, that to 9.5e-6 relative, t at most 126; at -inf it is 0, or nearly. 2^(f/2) is a cubic, squared.
inline F add_exp2(F t, F sum) {
  constexpr float kExp2[] = {8.23831e-3f, 5.924067e-2f, 3.4673264e-1f, 9.9999531e-1f};
  const F f = fraction(t);
  F p = set(kExp2[0]);
  for (int i = 1; i < 4; ++i) p = fma(p, f, set(kExp2[i]));
  return fma(times_exp2(p, t), p, sum);
}

constexpr double kLog2E = 1.4426950408889634;

// Sums of 2^(log2(e) logit + its role's shift). The shifts are guesses from the row's first tile: what they do not
// fit is summed anew, in fp64.
struct Shifts {
  float base = 0.0f, expert = 0.0f, anti = 0.0f;
};
struct Sums {
  Shifts shifts;
  double base = 0.0, expert = 0.0, anti = 0.0;
  float centre = 0.0f;                                // x - base of the likeliest token
  float base_max[kMaxTiles], divergence[kMaxTiles];  // of each tile
};

// Takes a tile as ScanSink does, with the sums.
struct AttributionSink : ScanSink {
  static constexpr bool kRoles = true;
  F shift_base, shift_expert, shift_anti;
  F base, expert, anti, base_top;

  AttributionSink(float* out, const Shifts& s)
      : ScanSink(out), shift_base(set(s.base)), shift_expert(set(s.expert)), shift_anti(set(s.anti)),
        base(set(0.0f)), expert(set(0.0f)), anti(set(0.0f)), base_top(set(-INFINITY)) {}
  static F added(F sum, F v, F shift) { return add_exp2(fma(v, set(float(kLog2E)), shift), sum); }

  void roles(F b, F e, F a) {
    base_top = ptk::PTK_ISA::max(b, base_top);
    base = added(base, b, shift_base);
    expert = added(expert, e, shift_expert);
    anti = added(anti, a, shift_anti);
  }
};

// By the highest logit of the first tile.
inline float first_shift(const void* logits, int32_t dtype, int64_t vocab_size) {
  float top = -INFINITY;
  for (int64_t i = 0; i < std::min<int64_t>(kTile, vocab_size); ++i) {
    const float v = logit_at(logits, dtype, i);
    if (v > top) top = v;
  }
  return std::isfinite(top) ? float(-double(top) * kLog2E) : 0.0f;
}

inline Shifts shifts_of(const Source& in) {
  Shifts s;
  s.base = first_shift(in.base, in.base_dtype, in.vocab_size);
  if (!in.expert) return s;
  s.expert = first_shift(in.expert, in.expert_dtype, in.vocab_size);
  s.anti = first_shift(in.anti, in.anti_dtype, in.vocab_size);
  return s;
}

// As prepare_row, with the roles' sums.
constexpr int kGroup = kWidth > 2 ? kWidth / 2 : 1;  // tiles that are added up in fp32: 128 values a lane at most
inline Row prepare_attributed(const Source& in, const RowBuffer& buffer, const proxytune_parallel* parallel,
                              Scratch* scratch, Sums& sums) {
  sums.shifts = shifts_of(in);
  Row row = empty_row(in, buffer, parallel);
  Scanned scanned[kMaxChunks];
  float* const parts[] = {scratch->x, scratch->p, scratch->p + kMaxTiles};
  const int groups = (row.tiles + kGroup - 1) / kGroup;
  const int chunks = over_tiles(parallel, groups, [&](int chunk, int begin, int end) {
    Scanned own;
    for (int g = begin; g < end; ++g) {
      AttributionSink sink(nullptr, sums.shifts);
      for (int t = g * kGroup; t < std::min((g + 1) * kGroup, row.tiles); ++t) {
        sink.base_top = set(-INFINITY);
        scan_tile(in, row, t, sink, own);
        sums.base_max[t] = reduce_max(sink.base_top);
      }
      parts[0][g] = reduce_halves(sink.base);
      parts[1][g] = reduce_halves(sink.expert);
      parts[2][g] = reduce_halves(sink.anti);
    }
    scanned[chunk] = own;
  });
  for (int g = 0; g < groups; ++g) {
    sums.base += parts[0][g];
    sums.expert += parts[1][g];
    sums.anti += parts[2][g];
  }
  finish_row(in, row, scanned, chunks);
  if (row.count > 0) {
    const int64_t top = likeliest(row).id;
    sums.centre = row.max - logit_at(in.base, in.base_dtype, top);
  }
  return row;
}

// A role's softmax. Where a logit is +inf, those share it.
struct Softmax {
  double shift, sum;

  double log_of(float logit) const {
    if (shift == INFINITY) return logit == INFINITY ? -std::log(sum) : -INFINITY;
    return logit > -INFINITY ? double(logit) - shift - std::log(sum) : -INFINITY;
  }
};

// Whether a sum of 2^t over a row is far from what fp32 loses: below, or above, or NaN.
inline bool fits(double sum) { return sum > 0x1p-60 && sum < 0x1p90; }

inline Softmax softmax_of(const void* logits, int32_t dtype, int64_t vocab_size, float shift, double sum) {
  if (fits(sum)) return {-double(shift) / kLog2E, sum};
  Softmax exact{-INFINITY, 0.0};
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double v = logit_at(logits, dtype, i);
    if (v > exact.shift) exact.shift = v;
  }
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double v = logit_at(logits, dtype, i);
    if (v > -INFINITY) exact.sum += v == exact.shift ? 1.0 : std::exp(v - exact.shift);
  }
  return exact;
}

// KL divergence of x from the base, in nats.
inline double divergence_of(const Target& target, const Source& in, const Softmax& base, const Sums& sums) {
  const Row& row = target.row;
  const double log_sum = log_mass(target.raw_mass) + double(row.max);  // of exp(x)
  double diverging = 0.0;
  for (int t = 0; t < row.tiles; ++t) diverging += double(sums.divergence[t]);
  if (fits(sums.base) && std::isfinite(diverging) && !(row.status & kStatusPositiveInf)) {
    return diverging / (double(target.raw_mass) * 0x1p-44) + double(sums.centre) - log_sum + base.shift +
           std::log(base.sum);
  }
  double kl = 0.0;
  for (int64_t i = 0; i < in.vocab_size; ++i) {
    const double x = row.x[i] > -INFINITY ? double(row.x[i]) - log_sum : -INFINITY;
    if (x > -700.0) kl += std::exp(x) * (x - base.log_of(logit_at(in.base, in.base_dtype, i)));
  }
  return kl;
}

// A token's place in the base's order, 1 the first.
inline int64_t rank_in_base(const Source& in, const Sums& sums, int64_t token_id) {
  const float logit = logit_at(in.base, in.base_dtype, token_id);
  int64_t rank = 1;
  for (int64_t start = 0; start < in.vocab_size; start += kTile) {
    if (sums.base_max[start / kTile] < logit) continue;
    const int n = int(std::min<int64_t>(kTile, in.vocab_size - start));
    float base[kTile];
    widen_tile(in.base, in.base_dtype, start, n, -INFINITY, base);
    for (int i = 0; i < n; ++i) rank += base[i] > logit || (base[i] == logit && start + i < token_id);
  }
  return rank;
}

// Writes a row's numbers for a token; NaN, and rank 0, where it has none.
inline void attribute(const Source& in, const Target& target, int64_t token_id, const Sums& sums, float* out) {
  std::fill(out, out + PROXYTUNE_ATTRIBUTION, NAN);
  out[PROXYTUNE_ATTRIBUTION_BASE_RANK] = out[PROXYTUNE_ATTRIBUTION_CHANGED] = 0.0f;
  if (!target.drawable || token_id < 0 || token_id >= in.vocab_size) return;
  const auto softmax = [&](const void* logits, int32_t dtype, float shift, double sum) {
    return softmax_of(logits, dtype, in.vocab_size, shift, sum);
  };
  const auto probability = [&](const Softmax& role, const void* logits, int32_t dtype) {
    return role.sum > 0.0 ? float(std::exp(role.log_of(logit_at(logits, dtype, token_id)))) : NAN;
  };
  const Softmax base = softmax(in.base, in.base_dtype, sums.shifts.base, sums.base);
  out[PROXYTUNE_ATTRIBUTION_BASE] = probability(base, in.base, in.base_dtype);
  if (in.expert) {
    const Softmax expert = softmax(in.expert, in.expert_dtype, sums.shifts.expert, sums.expert);
    const Softmax anti = softmax(in.anti, in.anti_dtype, sums.shifts.anti, sums.anti);
    out[PROXYTUNE_ATTRIBUTION_EXPERT] = probability(expert, in.expert, in.expert_dtype);
    out[PROXYTUNE_ATTRIBUTION_ANTI] = probability(anti, in.anti, in.anti_dtype);
  }
  out[PROXYTUNE_ATTRIBUTION_PROXY] = std::exp(target.raw_logprob(target.row.x[token_id]));
  const int64_t likeliest_id = likeliest(target.row).id, rank = rank_in_base(in, sums, token_id);
  out[PROXYTUNE_ATTRIBUTION_BASE_RANK] = float(rank);
  const bool first = likeliest_id == token_id ? rank == 1 : rank_in_base(in, sums, likeliest_id) == 1;
  out[PROXYTUNE_ATTRIBUTION_CHANGED] = float(!first);
  const double kl = divergence_of(target, in, base, sums);
  out[PROXYTUNE_ATTRIBUTION_KL] = kl < 0.0 ? 0.0f : float(kl);
}

}  // namespace PTK_ISA
}  // namespace ptk
