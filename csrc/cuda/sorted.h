// What a block does with a list of tokens: it sorts them, and finds where a need is met.
#pragma once

#include "shared.h"

namespace ptk {
namespace cuda {

// Sorts n packed tokens, no more than threads, descending: each goes where its rank says.
template <class Team>
PTK_KERNEL void sort_by_rank(const Team& team, uint64_t* tokens, int n) {
  const bool mine = team.thread() < n;
  const uint64_t token = mine ? tokens[team.thread()] : 0;
  int rank = 0;
  if (mine) {
    for (int i = 0; i < n; ++i) rank += tokens[i] > token;
  }
  team.sync();
  if (mine) tokens[rank] = token;
  team.sync();
}

// Sorts n packed tokens, n at most kList, descending: a bitonic network on the next power of 2.
template <class Team>
PTK_KERNEL void sort_by_network(const Team& team, uint64_t* tokens, int n) {
  int size = 2;
  while (size < n) size *= 2;
  for (int i = n + team.thread(); i < size; i += Team::kThreads) tokens[i] = 0;
  team.sync();
  for (int width = 2; width <= size; width *= 2) {
    for (int step = width / 2; step > 0; step /= 2) {
      for (int i = team.thread(); i < size / 2; i += Team::kThreads) {
        const int a = 2 * i - (i & (step - 1)), b = a + step;
        const bool descending = !(a & width);
        const uint64_t left = tokens[a], right = tokens[b];
        if ((left < right) == descending) {
          tokens[a] = right;
          tokens[b] = left;
        }
      }
      team.sync();
    }
  }
}

// The first of n items, in order, with which a need is met.
struct Found {
  int index;  // -1: the need is not met
  // Counts and masses without it and with it; `before` is of all items where the need is not met.
  Running before, through;
};

// Adds up item(i), a Running, for i in [0, n), to `taken`. One warp does, and all threads get the result.
template <class Team, class Item>
PTK_KERNEL Found first_met(const Team& team, Shared& s, int n, Running taken, Need need, Item item) {
  team.sync();  // all have read the last result, and written what items read
  if (team.warp() == 0) {
    int index = -1;
    Running through = taken;
    for (int start = 0; start < n && index < 0; start += 32) {
      const int i = start + team.lane();
      Running sum = i < n ? item(i) : Running{0, 0};
      const Running mine = sum;
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t count = team.shuffle_up(sum.count, step);
        const uint64_t mass = team.shuffle_up(sum.mass, step);
        if (team.lane() >= step) sum = {sum.count + count, sum.mass + mass};
      }
      sum = {sum.count + taken.count, sum.mass + taken.mass};
      const uint32_t met = team.ballot(i < n && need.met(sum.count, sum.mass));
      const int from = met ? lowest_bit(met) : 31;
      if (met) index = start + from;
      through = {team.shuffle(sum.count, from), team.shuffle(sum.mass, from)};
      taken = through;
      if (met) {
        taken = {team.shuffle(sum.count - mine.count, from), team.shuffle(sum.mass - mine.mass, from)};
      }
    }
    if (team.lane() == 0) {
      s.found = index;
      s.before = taken;
      s.through = through;
    }
  }
  team.sync();
  return {s.found, s.before, s.through};
}

}  // namespace cuda
}  // namespace ptk
