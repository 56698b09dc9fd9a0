// Sampling: one cluster a row, one launch, one read of device memory.
//
//   x = fma(alpha, expert - anti, base), filtered, and its argmax of x / T + noise
//
// Bytes a row: 3 logits a token in, 28 out. docs/cuda.md follows the phases.
#pragma once

#include "draw.h"

namespace ptk {
namespace cuda {

// Whether a token is among this block's; of none (-1) the first block says yes.
template <class Team>
PTK_KERNEL bool owns(const Team& team, const Row& row, int64_t id) {
  return team.block() == (id < 0 ? 0 : block_of_tile(int(id / kTile), row.tiles, team.blocks()));
}

// x of a token that this block owns.
PTK_HOST_DEVICE float x_of(Shared& s, const Row& row, int64_t id) { return Tiles(s, row).x[id - row.first_id]; }

// Reads a row and selects its kept set, into the block's shared memory.
template <class Team>
PTK_KERNEL void make_target(Cluster<Team>& cluster, const Source& source, size_t place, Target& target) {
  const Team& team = cluster.team;
  publish(team, cluster.s.source, source);
  publish(team, target.row, prepare_row(cluster, cluster.s.source, place));
  const RowParams& p = cluster.s.params;
  const Row& row = target.row;
  Prefix kept{};
  RowMass mass{};
  if (row.live > 0) {
    const bool wanted = !p.greedy && needs_total_mass(p, row.live);
    mass = row_mass(cluster, row, p.exponent, wanted);
    Search<Team> search(cluster, row, p.exponent, wanted);
    kept = p.greedy ? likeliest(cluster, row) : select_kept(search, p, row.max, row.live, mass.scaled);
  }
  if (team.thread() == 0) {
    target.kept = kept;
    target.raw_mass = mass.raw;
    target.drawable = row.live > 0;
  }
  team.sync();
}

// Writes the row's likeliest tokens, in order, with their raw logprobs; -1 and NaN where it has fewer.
template <class Team>
PTK_KERNEL void write_top(Cluster<Team>& cluster, const proxytune_sample_args& args, int64_t row) {
  if (args.num_top == 0) return;
  const Team& team = cluster.team;
  const Target& target = cluster.s.target;
  int n = 0;
  Search<Team> search(cluster, target.row, make_exponent(1.0), false);
  if (target.drawable) {
    search.list_prefix(search.find(kLowest, Need{uint32_t(args.num_top), UINT64_MAX}));
    n = cluster.s.listed < args.num_top ? cluster.s.listed : args.num_top;
  }
  if (team.block() != 0) return;
  for (int i = team.thread(); i < args.num_top; i += Team::kThreads) {
    const uint64_t token = i < n ? cluster.s.tokens.list.sorted[i] : 0;
    write_top_token(args, row, i, i < n ? int64_t(packed_id(token)) : -1,
                    i < n ? target.raw_logprob(packed_value(token)) : NAN);
  }
}

template <class Team>
PTK_KERNEL void write_no_top(const Team& team, const proxytune_sample_args& args, int64_t row) {
  if (team.block() != 0) return;
  for (int i = team.thread(); i < args.num_top; i += Team::kThreads) {
    write_top_token(args, row, i, -1, NAN);
  }
}

// Two threads of the block that owns the token write what a row gives: each takes one logarithm.
template <class Team>
PTK_KERNEL void write_drawn(const Team& team, const proxytune_sample_args& args, int64_t row,
                            Shared& s, int64_t token_id, int32_t status) {
  if (!owns(team, s.target.row, token_id)) return;
  const float x = token_id >= 0 ? x_of(s, s.target.row, token_id) : 0.0f;
  if (team.thread() == 0) write_draw(args, row, s.target, s.params, token_id, x, status);
  if (team.thread() == Team::kThreads - 32) write_raw_logprob(args, row, s.target, token_id, x);
}

// The row's parameters, into shared memory; false where one is out of range.
template <class Team>
PTK_KERNEL bool set_params(Cluster<Team>& cluster, const RawParams& raw) {
  if (!valid(raw)) return false;
  if (cluster.team.thread() == 0) {
    cluster.s.raw = raw;
    cluster.s.params = make_row_params(raw);
  }
  cluster.team.sync();
  return true;
}

// The work of one cluster: draws the token of one row. `memory` is this block's, shared_bytes of it.
// kTop: whether the likeliest tokens may be asked for, which takes half as much code again.
template <bool kTop = true, class Team>
PTK_KERNEL void sample_cluster(const Team& team, std::byte* memory, const proxytune_sample_args& args,
                               int64_t row) {
  Cluster<Team> cluster(team, *reinterpret_cast<Shared*>(memory));
  Shared& s = cluster.s;
  int64_t token_id = -1;
  int32_t status = kStatusBadParams;
  if (set_params(cluster, params_at(args.inputs.alpha, args.params, row))) {
    make_target(cluster, source_at(args.inputs, s.raw.alpha, row, 0), kRowOffset, s.target);
    status = s.target.row.status;
    if (s.target.drawable) {
      const NoiseKey key = make_noise_key(s.raw.seed, s.raw.position, uint32_t(args.noise_stream));
      token_id = draw(cluster, s.target, s.params, key);
    }
    if constexpr (kTop) write_top(cluster, args, row);
  } else if constexpr (kTop) {
    write_no_top(team, args, row);
  }
  write_drawn(team, args, row, s, token_id, status);
  cluster.meet();
}

}  // namespace cuda
}  // namespace ptk
