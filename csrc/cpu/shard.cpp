// Decides on a row by what the ranks have sent of it: the same on every rank (docs/sharded.md).
#include "shard.h"

#include <vector>

namespace ptk {
namespace {

// The row's likeliest tokens in order, as far as they are certain, with the mass up to each.
struct Certain {
  std::vector<int64_t> keys;
  std::vector<uint64_t> mass;

  Certain(const ShardKernels& kernels, const Gathered& g, int64_t row, const RowHead& head,
          Exponent e) {
    int64_t floor = 1;  // below it a rank may have tokens that it did not send
    for (int64_t rank = 0; rank < g.world && g.num_candidates > 0; ++rank) {
      const int64_t* sent = g.candidate(rank, row);
      for (int64_t i = 0; i < g.num_candidates && sent[i] > 0; ++i) keys.push_back(sent[i]);
      const int64_t last = sent[g.num_candidates - 1];
      if (summary_count(g.summary(rank, row)) > g.num_candidates) floor = std::max(floor, last);
    }
    std::sort(keys.begin(), keys.end(), std::greater<int64_t>());
    while (!keys.empty() && keys.back() < floor) keys.pop_back();
    mass.resize(keys.size());
    kernels.key_masses(keys.data(), int64_t(keys.size()), head.max, e, mass.data());
    for (size_t i = 1; i < mass.size(); ++i) mass[i] += mass[i - 1];
  }

  static int64_t summary_count(int64_t summary) {
    return summary & ((int64_t(1) << kSummaryCountBits) - 1);
  }
};

// The sum of all ranks' words.
struct Total {
  int64_t best = 0, wanted = 0;
  float x = -INFINITY;
  uint64_t kept_count = 0, kept_mass = 0;
  uint64_t mass = 0, raw_mass = 0;

  Total(const Gathered& g, int64_t row) {
    for (int64_t rank = 0; rank < g.world; ++rank) {
      const int64_t* w = g.word(rank, row);
      if (w[kWordBest] > best) {
        best = w[kWordBest];
        x = std::bit_cast<float>(uint32_t(w[kWordCount]));
      }
      kept_count += uint64_t(w[kWordCount]) >> 32;
      if (g.num_words <= kResidualWords) continue;
      kept_mass += uint64_t(w[kWordKeptMass]);
      mass += uint64_t(w[kWordMass]);
      raw_mass += uint64_t(w[kWordRawMass]);
      if (g.num_words > kWords) wanted = std::max(wanted, w[kWordWanted]);
    }
    best &= ~kResidualBit;
  }
};

// Prefixes of the row, for ptk::select_kept, as far as its certain tokens tell them.
struct CertainSearch {
  const Certain& list;
  const Prefix above_cutoff, all;  // what min_p keeps, and all tokens: the ranks have counted both
  // Where a prefix is not known: how many tokens of the list are in it for certain.
  size_t at_least = SIZE_MAX;

  bool known() const { return at_least == SIZE_MAX; }

  Prefix whole(float low) {
    const Prefix& found = low > kLowest ? above_cutoff : all;
    if (found.count <= at_least) at_least = SIZE_MAX;  // it ends before the other one does
    return found;
  }

  Prefix find(float low, Need need) {
    const Prefix unknown{-INFINITY, 0, 0, 0};
    if (!known()) {
      at_least = 1;
      return unknown;
    }
    for (size_t i = 0; i < list.keys.size() && key_value(list.keys[i]) >= low; ++i) {
      const int64_t key = list.keys[i];
      const auto count = uint32_t(i + 1);
      if (need.met(count, list.mass[i])) return {key_value(key), key_id(key), count, list.mass[i]};
    }
    const Prefix rest = whole(low);
    if (rest.count <= need.count && rest.mass < need.mass) return rest;
    at_least = list.keys.size();
    return unknown;
  }
};

}  // namespace

RowHead head_of(const int64_t* summaries, int64_t world, int64_t rows, int64_t row) {
  RowHead head;
  const int64_t masked = key_of(-INFINITY);
  int64_t top = masked;
  for (int64_t rank = 0; rank < world; ++rank) {
    const int64_t summary = summaries[rank * rows + row];
    top = std::max(top, summary >> (kSummaryCountBits + 1));
    head.status |= summary >> kSummaryCountBits & 1 ? kStatusNan : 0;
  }
  head.max = key_value(top << kIdBits);
  head.infinite = head.max == INFINITY;
  for (int64_t rank = 0; rank < world; ++rank) {
    const int64_t summary = summaries[rank * rows + row];
    // Where there is a +inf, only such tokens count.
    const bool counts = !head.infinite || summary >> (kSummaryCountBits + 1) == top;
    head.count += counts ? uint32_t(Certain::summary_count(summary)) : 0;
  }
  if (head.infinite) head.max = 0.0f, head.status |= kStatusPositiveInf;
  if (head.count == 0) head.status |= kStatusEmpty;
  return head;
}

ShardResult finish_row(const ShardKernels& kernels, const Gathered& g, int64_t row,
                       const RawParams& raw, uint32_t noise_stream, const KnownRow* given) {
  ShardResult out;
  if (!valid(raw)) {
    out.status = kStatusBadParams;
    return out;
  }
  const RowHead head = head_of(g.summaries, g.world, g.rows, row);
  out.status = head.status;
  if (head.count == 0) return out;
  const RowParams p = make_row_params(raw);
  const Total total(g, row);
  int64_t token = total.best;
  float x = total.x;
  if (given) {
    out.kept = given->kept;
  } else if (p.greedy) {
    out.kept = {total.best, 1, uint64_t(kMassOne)};
  } else {
    const Certain list(kernels, g, row, head, p.exponent);
    const float cutoff = p.min_p_shift > -INFINITY ? min_p_cutoff(head.max, p.min_p_shift) : kLowest;
    CertainSearch search{list, {cutoff, UINT32_MAX, uint32_t(total.kept_count), total.kept_mass},
                         {kLowest, UINT32_MAX, head.count, total.mass}};
    const Prefix kept = select_kept(search, p, head.max, head.count, total.mass);
    const bool listed = is_listed(p, head);
    if (!search.known() || (listed && kept.count > list.keys.size())) {
      out.status = kStatusBadParams;
      out.undecided = true;
      return out;
    }
    out.kept = {token_key(kept.x, std::min(kept.id, kLastId)), kept.count, kept.mass};
    // Where min_p alone decides, the ranks have drawn from just these tokens.
    if (listed) {
      const NoiseKey noise = make_noise_key(raw.seed, raw.position, noise_stream);
      token = kernels.gumbel_max_keys(list.keys.data(), kept.count, head.max, p, noise);
      x = key_value(token);
    }
  }
  if (token == 0) return out;  // nothing was exchanged for this row
  out.token_id = key_id(token);
  out.num_kept = int32_t(out.kept.count);
  out.logprob = kept_logprob(x - head.max, p, out.kept.mass);
  out.raw_mass = given ? given->raw_mass : total.raw_mass;
  out.raw_logprob = whole_logprob(x - head.max, out.raw_mass);
  if (total.wanted >= out.kept.key) {
    const float shifted = key_value(total.wanted) - head.max;
    out.wanted_logprob = kept_logprob(shifted, p, out.kept.mass);
    out.wanted_raw_logprob = whole_logprob(shifted, out.raw_mass);
  }
  return out;
}

}  // namespace ptk
