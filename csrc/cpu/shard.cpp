// What the ranks' numbers on a row decide: the same on every rank (docs/sharded.md).
#include "shard_types.h"

#include <vector>

namespace ptk {
namespace {

// A prefix of the order, as far as the candidates tell: where it is not known, the tokens in it are at
// least so many.
struct Found {
  Cut cut;
  bool known;
};

const Found& shorter(const Found& a, const Found& b) { return b.cut.count < a.cut.count ? b : a; }

// The row's likeliest tokens as far as they are certain, in order, with the mass up to each.
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

  // The shortest prefix of so many tokens or so much mass.
  Found find(uint64_t count, uint64_t needed) const {
    for (size_t i = 0; i < keys.size(); ++i) {
      if (i + 1 >= count || mass[i] >= needed) return {{keys[i], i + 1, mass[i]}, true};
    }
    return {{0, keys.size() + 1, 0}, false};
  }
};

// What all ranks' words add up to.
struct Total {
  int64_t best = 0, wanted = 0;
  float x = -INFINITY;
  Cut kept{};
  uint64_t mass = 0, raw_mass = 0;

  Total(const Gathered& g, int64_t row) {
    for (int64_t rank = 0; rank < g.world; ++rank) {
      const int64_t* w = g.word(rank, row);
      if (w[kWordBest] > best) {
        best = w[kWordBest];
        x = std::bit_cast<float>(uint32_t(w[kWordCount]));
      }
      kept.count += uint64_t(w[kWordCount]) >> 32;
      if (g.num_words <= kResidualWords) continue;
      kept.mass += uint64_t(w[kWordKeptMass]);
      mass += uint64_t(w[kWordMass]);
      raw_mass += uint64_t(w[kWordRawMass]);
      if (g.num_words > kWords) wanted = std::max(wanted, w[kWordWanted]);
    }
    best &= ~kResidualBit;
  }
};

// The tokens that min_p keeps.
int64_t min_p_cut(float max, float shift) {
  return shift > -INFINITY ? token_key(min_p_cutoff(max, shift), kLastId) : kNoCut;
}

// docs/contracts.md, Selection: `likely` is what min_p keeps.
Found select(const Certain& list, const RowHead& head, const RowParams& p, const Total& total,
             const Cut& likely) {
  const bool top_k = p.top_k < head.count, top_p = p.top_p < kTopPOff;
  const Found all{{kNoCut, head.count, total.mass}, true}, by_min_p{likely, true};
  Found by_k = top_k ? list.find(p.top_k, UINT64_MAX) : all;
  if (top_k) by_k.cut.count = p.top_k;
  Found whole = all;  // what top_p's mass is a share of
  if (p.filter_order == kOrderVllm) whole = shorter(by_min_p, by_k);
  if (p.filter_order == kOrderHf) whole = by_k;
  Found by_p = all;
  if (top_p && whole.known) by_p = list.find(UINT64_MAX, mass_target(p.top_p, whole.cut.mass));
  if (top_p && !whole.known) by_p = {{0, 1, 0}, false};
  return shorter(shorter(by_min_p, by_k), by_p);
}

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
    // Where a +inf was there, only tokens that are it count.
    const bool counts = !head.infinite || summary >> (kSummaryCountBits + 1) == top;
    head.count += counts ? uint32_t(Certain::summary_count(summary)) : 0;
  }
  if (head.infinite) head.max = 0.0f, head.status |= kStatusPositiveInf;
  if (head.count == 0) head.status |= kStatusEmpty;
  return head;
}

ShardResult finish_row(const ShardKernels& kernels, const Gathered& g, int64_t row,
                       const RawParams& raw, uint32_t stream, const KnownRow* given) {
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
    Cut likely = total.kept;
    likely.key = min_p_cut(head.max, p.min_p_shift);
    const Certain list(kernels, g, row, head, p.exponent);
    const Found kept = select(list, head, p, total, likely);
    const bool listed = is_listed(p, head);
    if (!kept.known || (listed && kept.cut.count > list.keys.size())) {
      out.status = kStatusBadParams;
      out.undecided = true;
      return out;
    }
    out.kept = kept.cut;
    // Where min_p alone decides, the ranks have drawn from just these.
    if (listed) {
      const NoiseKey noise = make_noise_key(raw.seed, raw.position, stream);
      token = kernels.race_keys(list.keys.data(), int64_t(kept.cut.count), head.max, p, noise);
      x = key_value(token);
    }
  }
  if (token == 0) return out;  // nothing was exchanged for this row
  const auto logprob = [&](float value) {
    if (p.greedy) return 0.0f;
    return float(double(value - head.max) * double(p.inv_temperature) - log_mass(out.kept.mass));
  };
  out.token_id = key_id(token);
  out.num_kept = int32_t(out.kept.count);
  out.logprob = logprob(x);
  out.raw_mass = given ? given->raw_mass : total.raw_mass;
  const auto raw_logprob = [&](float value) {
    return float(double(value - head.max) - log_mass(out.raw_mass));
  };
  out.raw_logprob = raw_logprob(x);
  if (total.wanted >= out.kept.key) {
    out.wanted_logprob = logprob(key_value(total.wanted));
    out.wanted_raw_logprob = raw_logprob(key_value(total.wanted));
  }
  return out;
}

}  // namespace ptk
