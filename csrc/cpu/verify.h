// The operator verify on one row: one position after the other, up to the first whose draft is not accepted
// (docs/contracts.md, Speculative verification).
#pragma once

namespace ptk {
namespace PTK_ISA {

// Target or draft of a position: what its probabilities are made of.
struct Side {
  float max;
  Prefix kept;
  float share = float(kMassOne / double(kept.mass));  // of the likeliest token in the kept set
};

// The residual max(0, target - draft) of one tile, and the scores of a draw from it.
struct ResidualTile {
  alignas(64) float left[kTile];

  // `draft` is null where the drafter has nothing to draw from: then all of the target is left.
  ResidualTile(const float* x, const Side& target, const float* draft_x, const Side* draft, Exponent e,
               uint32_t first) {
    for (int i = 0; i < kTile; i += kWidth) {
      const F xs = load(x + i);
      F rest = mul(exponential(sub(xs, set(target.max)), e), set(target.share));
      if (draft) {
        const F ys = load(draft_x + i);
        const F drafted = mul(exponential(sub(ys, set(draft->max)), e), set(draft->share));
        rest = sub(rest, select(kept_mask(ys, first + uint32_t(i), draft->kept), drafted, set(0.0f)));
      }
      store(left + i, select(kept_mask(xs, first + uint32_t(i), target.kept), rest, set(0.0f)));
    }
  }
  F score(int i) const { return log_positive(max(load(left + i), set(FLT_MIN))); }
  uint32_t mask(int i) const { return ge(load(left + i), set(FLT_MIN)); }
};

// Draws from max(0, target - draft), or from the target where rounding leaves nothing of that.
inline int64_t draw_residual(const Target& target, const Target& draft, const RowParams& p,
                             const NoiseKey& key) {
  const Side ours{target.row.max, target.kept}, theirs{draft.row.max, draft.kept};
  Draw residual(key);
  for (int t = 0; t < target.row.tiles; ++t) {
    if (!(target.row.tile_max[t] >= target.kept.x)) continue;
    const uint32_t first = uint32_t(t) * kTile;
    const ResidualTile tile(target.row.tile(t), ours, draft.row.tile(t), draft.drawable ? &theirs : nullptr,
                            p.exponent, first);
    residual.take_tile(first, 0.0f, [&](int i) { return tile.score(i); }, [&](int i) { return tile.mask(i); });
  }
  residual.flush();
  return residual.best.id != UINT32_MAX ? residual.best.id : draw(target, p, key);
}

// Whether the target accepts a token of the draft: u < target / draft, in fp64 logs.
inline bool accepts(const Target& target, const Target& draft, const RowParams& p, const RawParams& raw,
                    int64_t id) {
  const auto has = [&](const Target& t) { return t.kept.has(t.row.x[id], uint32_t(id)); };
  if (!has(target)) return false;
  if (!draft.drawable || !has(draft)) return true;  // the draft gives it probability 0
  const NoiseKey key = make_noise_key(raw.seed, raw.position, kStreamAccept);
  const double log_u = std::log(double(uniform_of(key, uint32_t(id))));
  return log_u < double(target.logprob(p, target.row.x[id])) - double(draft.logprob(p, draft.row.x[id]));
}

// One position: writes the token that it emits. Returns its status, and whether its draft is accepted.
struct Step {
  int32_t status;
  bool accepted;
};
inline Step verify_position(const proxytune_verify_args& args, int64_t row, int64_t position,
                            const RawParams& raw, Buffers& b) {
  const int64_t at = row * (args.num_drafts + 1) + position, draft_id = draft_at(args, row, position);
  RowParams p{};
  const Target target = make_target(source_at(args.inputs, raw.alpha, row, position), raw, true, p, b, 0);
  Step step{target.row.status, false};
  if (!target.drawable) {
    write_emitted(args, at, -1, NAN, NAN);
    return step;
  }
  int64_t token_id;
  if (args.mode == PROXYTUNE_VERIFY_REJECTION && draft_id >= 0) {
    const Target draft = make_target(draft_source_at(args, row, position), raw, false, p, b, 1);
    step.accepted = draft_id < args.inputs.vocab_size && accepts(target, draft, p, raw, draft_id);
    const NoiseKey key = make_noise_key(raw.seed, raw.position, kStreamResidual);
    token_id = step.accepted ? draft_id : draw_residual(target, draft, p, key);
  } else {
    const uint32_t stream = undrafted_stream(args.mode, position);
    token_id = draw(target, p, make_noise_key(raw.seed, raw.position, stream));
    step.accepted = token_id == draft_id;
  }
  const float x = target.row.x[token_id];
  write_emitted(args, at, token_id, target.logprob(p, x), target.raw_logprob(x));
  return step;
}

inline void verify_row(const proxytune_verify_args& args, int64_t row, Buffers& b) {
  const RawParams first = params_at(args.inputs.alpha, args.params, row);
  int32_t status = 0, accepted = 0;
  bool active = true;
  for (int64_t j = 0; j <= args.num_drafts; ++j) {
    if (!active) {
      write_emitted(args, row * (args.num_drafts + 1) + j, -1, NAN, NAN);
      continue;
    }
    const Step step = verify_position(args, row, j, params_at_draft(first, j), b);
    status |= step.status;
    active = step.accepted;
    accepted += active;
  }
  args.num_accepted[row] = accepted;
  if (args.status) args.status[row] = status;
}

}  // namespace PTK_ISA
}  // namespace ptk
