// The operators sample and score on one row, and what verify shares with them.
#pragma once

namespace ptk {
namespace PTK_ISA {

// Reads a row and selects its kept set; where the parameters are valid, p is made of them.
inline Target make_target(const Source& source, const RawParams& raw, bool want_raw, RowParams& p,
                          Buffers& b, int buffer, Sums* sums = nullptr) {
  Target target{};
  if (!valid(raw)) {
    target.row.status = kStatusBadParams;
    return target;
  }
  p = make_row_params(raw);
  target.row = sums ? prepare_attributed(source, b.rows[buffer], b.parallel, b.scratch, *sums)
                    : prepare_row(source, b.rows[buffer], b.parallel);
  target.drawable = target.row.count > 0;
  if (!target.drawable) return target;
  const bool want_scaled = !p.greedy && needs_total_mass(p, target.row.count);
  // Flat rows need the masses of many tokens: those above top_p's cut come with the whole row's.
  Known known{};
  known.guessed = want_scaled && p.top_p < kTopPOff && is_flat(target.row, p.exponent);
  if (known.guessed) known.guess = guess_cut(target.row, p, *b.scratch);
  const float split = known.guessed ? value_of(known.guess.high + 1) : INFINITY;
  const Divergence divergence{source, sums ? sums->centre : 0.0f, sums ? sums->divergence : nullptr};
  const RowMass mass =
      row_mass(target.row, p.exponent, want_scaled, want_raw, split, sums ? &divergence : nullptr);
  target.raw_mass = mass.raw;
  known.all = {kLowest, UINT32_MAX, target.row.count, mass.scaled};
  known.upper = mass.upper;
  Search search{target.row, p.exponent, *b.scratch, known};
  target.kept = p.greedy ? likeliest(target.row)
                         : select_kept(search, p, target.row.max, target.row.count, mass.scaled);
  return target;
}

inline uint32_t draw(const Target& target, const RowParams& p, const NoiseKey& key) {
  return p.greedy ? target.kept.id : gumbel_max(target.row, target.kept, p, key);
}

// Collects the tokens of a prefix of at most kMaxTop tokens, in order of id; returns how many they are.
inline int collect_prefix(const Row& row, const Prefix& prefix, Scratch& s) {
  static_assert(kMaxTop + kWidth <= kCandidates, "compress writes whole vectors");
  int n = 0;
  for (int t = 0; t < row.tiles && n < int(prefix.count); ++t) {
    if (!(row.tile_max[t] >= prefix.x)) continue;
    const float* x = row.tile(t);
    for (int i = 0; i < kTile; i += kWidth) {
      const F v = load(x + i);
      const uint32_t id = uint32_t(t) * kTile + uint32_t(i);
      const uint32_t inside = kept_mask(v, id, prefix);
      if (inside) n += compress(v, add_u(set_u(id), iota()), inside, s.x + n, s.ids + n);
    }
  }
  return n;
}

// Writes the row's likeliest tokens in order, with their raw logprobs, whatever the filters keep.
inline void write_top(const proxytune_sample_args& args, int64_t row, const Target& target, Scratch& s) {
  int n = 0;
  if (target.drawable) {
    const Known known{{kLowest, UINT32_MAX, target.row.count, target.raw_mass}, false, {}, {}};
    Search search{target.row, make_exponent(1.0), s, known};
    n = collect_prefix(target.row, search.find(kLowest, Need{uint32_t(args.num_top), UINT64_MAX}), s);
    sort_collected(n, s);
  }
  for (int i = 0; i < args.num_top; ++i) {
    if (i < n) {
      write_top_token(args, row, i, sorted_id(s, i), target.raw_logprob(sorted_x(s, i)));
    } else {
      write_top_token(args, row, i, -1, NAN);
    }
  }
}

inline void sample_row(const proxytune_sample_args& args, int64_t row, Buffers& b) {
  const RawParams raw = params_at(args.inputs.alpha, args.params, row);
  RowParams p{};
  const Source source = source_at(args.inputs, raw.alpha, row, 0);
  const bool attributed = args.attribution && valid(raw);
  Sums sums;
  const Target target = make_target(source, raw, true, p, b, 0, attributed ? &sums : nullptr);
  int64_t token_id = -1;
  float x = 0.0f;
  if (target.drawable) {
    token_id = draw(target, p, make_noise_key(raw.seed, raw.position, uint32_t(args.noise_stream)));
    x = target.row.x[token_id];
  }
  write_draw(args, row, target, p, token_id, x, target.row.status);
  write_raw_logprob(args, row, target, token_id, x);
  if (args.num_top > 0) write_top(args, row, target, *b.scratch);
  if (args.attribution) {
    const int64_t given = args.attributed ? args.attributed[row] : -1;
    attribute(source, target, given >= 0 ? given : token_id, sums,
              args.attribution + row * PROXYTUNE_ATTRIBUTION);
  }
}

inline void score_row(const proxytune_score_args& args, int64_t row, int64_t position, Buffers& b) {
  const float alpha = value_at(args.inputs.alpha, row, 1.0f);
  const Row read = prepare_row(source_at(args.inputs, alpha, row, position), b.rows[0], b.parallel);
  const int64_t token_id = args.token_ids[row * args.token_ids_row_stride + position];
  float& logprob = args.logprobs[row * args.positions + position];
  logprob = NAN;
  if (token_id < 0 || token_id >= args.inputs.vocab_size || read.count == 0) return;
  const RowMass mass = row_mass(read, make_exponent(1.0), false, true);
  logprob = whole_logprob(read.x[token_id] - read.max, mass.raw);
}

}  // namespace PTK_ISA
}  // namespace ptk
