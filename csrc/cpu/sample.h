// The operators on one row: sample, score, and verify in both modes.
#pragma once

namespace ptk {
namespace PTK_ISA {

// A row and its kept set, ready to draw from.
struct Target {
  Row row;
  Prefix kept{};
  uint64_t raw_mass = 0;  // of the whole row at temperature 1, where wanted
  bool drawable = false;
};

// The first of the likeliest tokens.
inline Prefix likeliest(const Row& row) {
  uint32_t id = uint32_t(row.likeliest_tile()) * kTile;
  while (row.x[id] != row.max) ++id;
  return {row.max, id, 1, uint64_t(kMassOne)};
}

inline Target make_target(const RowInput& in, const RawParams& raw, bool want_raw, RowParams& p,
                          Buffers& b, int buffer) {
  Target target;
  if (!valid(raw)) {
    target.row.status = kStatusBadParams;
    return target;
  }
  p = make_row_params(raw);
  target.row = prepare_row(in, b.rows[buffer], b.parallel);
  target.drawable = target.row.count > 0;
  if (!target.drawable) return target;
  const bool want_scaled = !p.greedy && needs_total_mass(p, target.row.count);
  const RowMass mass = row_mass(target.row, p.exponent, want_scaled, want_raw);
  target.raw_mass = mass.raw;
  Search search{target.row, p.exponent, *b.scratch};
  target.kept = p.greedy ? likeliest(target.row)
                         : select_kept(search, p, target.row.max, target.row.count, mass.scaled);
  return target;
}

inline bool is_kept(const Target& target, int64_t id) {
  return target.kept.has(target.row.x[id], uint32_t(id));
}

// Draws from the kept set.
inline uint32_t draw(const Target& target, const RowParams& p, const NoiseKey& key) {
  return p.greedy ? target.kept.id : race(target.row, target.kept, p, key);
}

// Log of the probability that the kept set gives a kept token.
inline float kept_logprob(const Target& target, const RowParams& p, int64_t id) {
  if (p.greedy) return 0.0f;
  const double scaled = double(target.row.x[id] - target.row.max) * double(p.inv_temperature);
  return float(scaled - log_mass(target.kept.mass));
}

inline SampleResult sample_row(const RowInput& in, const RawParams& raw, uint32_t stream,
                               const TopTokens& top, Buffers& b) {
  RowParams p;
  const Target target = make_target(in, raw, true, p, b, 0);
  SampleResult out;
  out.status = target.row.status;
  if (!target.drawable) {
    for (int i = 0; i < top.count; ++i) top.put(i, -1, NAN);
    return out;
  }
  const NoiseKey key = make_noise_key(raw.seed, raw.position, stream);
  const uint32_t id = draw(target, p, key);
  out.token_id = id;
  out.num_kept = int32_t(target.kept.count);
  out.logprob = kept_logprob(target, p, id);
  const double log_raw_mass = log_mass(target.raw_mass);
  out.raw_logprob = raw_logprob(target.row, target.row.x[id], log_raw_mass);
  if (top.count > 0) write_top(target.row, log_raw_mass, top, *b.scratch);
  return out;
}

inline float score_row(const RowInput& in, int64_t token_id, Buffers& b) {
  const Row row = prepare_row(in, b.rows[0], b.parallel);
  if (token_id < 0 || token_id >= in.vocab_size || row.count == 0) return NAN;
  const RowMass mass = row_mass(row, make_exponent(1.0), false, true);
  return raw_logprob(row, row.x[token_id], log_mass(mass.raw));
}

// Draws from max(0, target - draft), or from the target where rounding leaves nothing of it.
inline int64_t draw_residual(const Target& target, const RowParams& p, const Target& draft,
                             const RowParams& q, const NoiseKey& key) {
  const F share_p = set(float(kMassOne / double(target.kept.mass)));
  const float draft_max = draft.drawable ? draft.row.max : target.row.max;
  const F share_q = set(draft.drawable ? float(kMassOne / double(draft.kept.mass)) : 0.0f);
  Best best;
  for (int t = 0; t < target.row.tiles; ++t) {
    if (!(target.row.tile_max[t] >= target.kept.x)) continue;
    const float *x = target.row.tile(t), *y = draft.drawable ? draft.row.tile(t) : x;
    const uint32_t first = uint32_t(t) * kTile;
    alignas(64) float left[kTile];
    for (int i = 0; i < kTile; i += kWidth) {
      const F xs = load(x + i), ys = load(y + i);
      const F mass = mul(exponential(sub(xs, set(target.row.max)), p.exponent), share_p);
      const F drafted = mul(exponential(sub(ys, set(draft_max)), q.exponent), share_q);
      const uint32_t in_draft = draft.drawable ? kept_mask(ys, first + uint32_t(i), draft.kept) : 0;
      const F rest = sub(mass, select(in_draft, drafted, set(0.0f)));
      store(left + i, select(kept_mask(xs, first + uint32_t(i), target.kept), rest, set(0.0f)));
    }
    race_tile(
        key, first, 0.0f, [&](int i) { return log_positive(max(load(left + i), set(FLT_MIN))); },
        [&](int i) { return ge(load(left + i), set(FLT_MIN)); }, best);
  }
  if (best.id != UINT32_MAX) return best.id;
  return draw(target, p, key);
}

// Whether the target accepts a token of the draft: u < target / draft, in fp64 logs.
inline bool accepts(const Target& target, const RowParams& p, const Target& draft, const RowParams& q,
                    const RawParams& raw, int64_t id) {
  if (!is_kept(target, id)) return false;
  if (!draft.drawable || !is_kept(draft, id)) return true;  // the draft gives it probability 0
  const NoiseKey key = make_noise_key(raw.seed, raw.position, kStreamAccept);
  const double log_u = std::log(double(uniform_of(key, uint32_t(id))));
  return log_u < double(kept_logprob(target, p, id)) - double(kept_logprob(draft, q, id));
}

// One position of rejection: the token to emit, its logprob, and whether it is the draft.
inline VerifyStep reject_step(const RowInput& in, const RowInput* draft_in, const RawParams& raw,
                              int64_t draft_id, uint32_t undrafted_stream, Buffers& b) {
  RowParams p;
  const Target target = make_target(in, raw, true, p, b, 0);
  VerifyStep step;
  step.status = target.row.status;
  if (!target.drawable) return step;
  RowParams q = p;  // stands where the draft has nothing to draw from
  if (!draft_in || draft_id < 0) {
    step.token_id = draw(target, p, make_noise_key(raw.seed, raw.position, undrafted_stream));
  } else {
    const Target draft = make_target(*draft_in, raw, false, q, b, 1);
    step.accepted = draft_id < in.vocab_size && accepts(target, p, draft, q, raw, draft_id);
    const NoiseKey key = make_noise_key(raw.seed, raw.position, kStreamResidual);
    step.token_id = step.accepted ? draft_id : draw_residual(target, p, draft, q, key);
  }
  step.logprob = kept_logprob(target, p, step.token_id);
  step.raw_logprob = raw_logprob(target.row, target.row.x[step.token_id], log_mass(target.raw_mass));
  return step;
}

inline VerifyStep coupled_step(const RowInput& in, const RawParams& raw, int64_t draft_id, Buffers& b) {
  const SampleResult drawn = sample_row(in, raw, kStreamSample, {}, b);
  return {drawn.token_id, drawn.logprob, drawn.raw_logprob, drawn.status,
          drawn.token_id >= 0 && drawn.token_id == draft_id};
}

}  // namespace PTK_ISA
}  // namespace ptk
