// Verification: one launch for all positions of all requests, one cluster for each position. A cluster finds
// what its position would emit, whatever the others do; the last one of a request to finish joins them
// (docs/contracts.md, Speculative verification).
#pragma once

#include "sample.h"

namespace ptk {
namespace cuda {

// What a position leaves for the last: its status, and whether its draft is accepted.
constexpr int32_t kStepAccepted = 1 << 8;

// One position's result.
struct Step {
  int64_t token_id = -1;
  float logprob = NAN, raw_logprob = NAN;
  int32_t status = 0;
  bool accepted = false;
};

// Draws from max(0, target - draft); 0 where rounding leaves nothing of it.
template <class Team>
PTK_KERNEL uint64_t draw_residual(Cluster<Team>& cluster, const NoiseKey& key) {
  const Target &target = cluster.s.target, &draft = cluster.s.draft;
  const Exponent e = cluster.s.params.exponent;
  const Row &row = target.row, &theirs = draft.row;
  const Tiles tiles(cluster.s, row), their_tiles(cluster.s, theirs);
  const float share = float(kMassOne / double(target.kept.mass));
  const float their_share = draft.drawable ? float(kMassOne / double(draft.kept.mass)) : 0.0f;
  const auto rest = [&](float x, uint32_t id) {
    const float mass = exponential(x - row.max, e) * share;
    if (!draft.drawable) return mass;
    const float y = their_tiles.x[id - theirs.first_id];
    return draft.kept.has(y, id) ? mass - exponential(y - theirs.max, e) * their_share : mass;
  };
  const uint64_t best = gumbel_max_tiles(
      cluster.team, cluster.s, row, key,
      [&](float x, uint32_t id) { return target.kept.has(x, id) && rest(x, id) >= FLT_MIN; },
      [&](float x, uint32_t id) { return log_positive(rest(x, id)); },
      [&](int t) { return tiles.max[t] >= target.kept.x ? 0.0f : -INFINITY; });
  return best_of_cluster(cluster, best);
}

// Whether the target accepts a token of the draft: u < target / draft, in fp64 logs.
template <class Team>
PTK_KERNEL bool accepts(Cluster<Team>& cluster, int64_t id) {
  Shared& s = cluster.s;
  const Target &target = s.target, &draft = s.draft;
  uint64_t both[] = {0, 0};
  if (owns(cluster.team, target.row, id)) {
    both[0] = bits_of_float(x_of(s, target.row, id));
    both[1] = bits_of_float(x_of(s, draft.row, id));
  }
  cluster.template exchange<Merge::kMax, Merge::kMax>(both);
  const float x = float_of_bits(uint32_t(both[0])), y = float_of_bits(uint32_t(both[1]));
  if (!target.kept.has(x, uint32_t(id))) return false;
  if (!draft.drawable) return true;
  if (!draft.kept.has(y, uint32_t(id))) return true;  // the draft gives it probability 0
  const NoiseKey key = make_noise_key(s.raw.seed, s.raw.position, kStreamAccept);
  const double log_u = std::log(double(uniform_of(key, uint32_t(id))));
  return log_u < double(target.logprob(s.params, x)) - double(draft.logprob(s.params, y));
}

// The token of one position, given its kept set; where `drafted`, by rejection.
template <class Team>
PTK_KERNEL void emit(Cluster<Team>& cluster, bool drafted, int64_t vocab_size, uint32_t stream, Step& step) {
  Shared& s = cluster.s;
  const int64_t draft_id = s.place.draft_id;
  if (drafted && draft_id < vocab_size && accepts(cluster, draft_id)) {
    step.token_id = draft_id;
    step.accepted = true;
    return;
  }
  const NoiseKey key =
      make_noise_key(s.raw.seed, s.raw.position, drafted ? uint32_t(kStreamResidual) : stream);
  const uint64_t won = drafted ? draw_residual(cluster, key) : 0;
  step.token_id = won ? packed_id(won) : draw(cluster, s.target, s.params, key);
}

// One position of valid parameters: the drafter's row first, where rejection needs it, then the
// target's.
template <class Team>
PTK_KERNEL void verify_position(Cluster<Team>& cluster, const proxytune_verify_args& args, Step& step) {
  Shared& s = cluster.s;
  const bool rejection = args.mode == PROXYTUNE_VERIFY_REJECTION;
  const bool drafted = rejection && s.place.draft_id >= 0;
  // One copy of the code for both rows.
  PTK_UNROLL(1)
  for (int pass = drafted ? 0 : 1; pass < 2; ++pass) {
    const bool draft = pass == 0;
    const Source source =
        draft ? draft_source_at(args, s.place.row, s.place.position)
              : source_at(args.inputs, s.raw.alpha, s.place.row, s.place.position);
    const size_t offset = draft ? row_bytes(args.inputs.vocab_size, cluster.team.blocks()) : 0;
    make_target(cluster, source, kRowOffset + offset, draft ? s.draft : s.target);
  }
  step.status = s.target.row.status;
  if (!s.target.drawable) return;
  emit(cluster, drafted, args.inputs.vocab_size, undrafted_stream(args.mode, s.place.position), step);
  if (!rejection) step.accepted = step.token_id == s.place.draft_id;
}

// Joins the positions of a request: what comes after the first that is not accepted is dropped.
template <class Team>
PTK_KERNEL void join(const Team& team, const proxytune_verify_args& args, int64_t row, const int32_t* steps) {
  const int64_t positions = args.num_drafts + 1;
  int32_t status = 0, accepted = 0;
  bool active = true;
  for (int64_t j = 0; j < positions; ++j) {
    const int64_t at = row * positions + j;
    if (!active) {
      write_emitted(args, at, -1, NAN, NAN);
      continue;
    }
    const int32_t step = team.load_fresh(steps + at);
    status |= step & (kStepAccepted - 1);
    active = step & kStepAccepted;
    accepted += active;
  }
  args.num_accepted[row] = accepted;
  if (args.status) args.status[row] = status;
}

// The work of one cluster: one position of one request. `arrived` [rows] is zero before the launch and
// after; `steps` is [rows, positions].
template <class Team>
PTK_KERNEL void verify_cluster(const Team& team, std::byte* memory, const proxytune_verify_args& args,
                               int32_t* arrived, int32_t* steps, int64_t row, int64_t position) {
  Cluster<Team> cluster(team, *reinterpret_cast<Shared*>(memory));
  Shared& s = cluster.s;
  if (team.thread() == 0) {
    s.place = {row, position, draft_at(args, row, position)};
  }
  Step step;
  if (set_params(cluster, params_at_draft(params_at(args.inputs.alpha, args.params, row), position))) {
    verify_position(cluster, args, step);
  } else {
    step.status = kStatusBadParams;
  }
  if (owns(team, s.target.row, step.token_id) && team.thread() == 0) {
    const int64_t positions = args.num_drafts + 1, request = s.place.row;
    const int64_t at = request * positions + s.place.position;
    if (step.token_id >= 0) {
      const float x = x_of(s, s.target.row, step.token_id);
      step.logprob = s.target.logprob(s.params, x);
      step.raw_logprob = s.target.raw_logprob(x);
    }
    write_emitted(args, at, step.token_id, step.logprob, step.raw_logprob);
    steps[at] = step.status | (step.accepted ? kStepAccepted : 0);
    if (team.arrive(arrived + request) == int32_t(positions) - 1) {
      join(team, args, request, steps);
      arrived[request] = 0;
    }
  }
  cluster.meet();
}

}  // namespace cuda
}  // namespace ptk
