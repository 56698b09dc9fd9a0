// Registers the operators of vocabularies spread over ranks. Schemas live in
// proxytune_kernels/ops/table.py; the checks here keep direct callers of torch.ops in bounds.
#include <algorithm>
#include <vector>

#include "binding.h"
#include "cpu/shard.h"

namespace {

using namespace ptk;
using namespace ptk::binding;

const ShardKernels& kernels() {
  const Kernels* current = current_kernels();
  STD_TORCH_CHECK(current, "proxytune: ", proxytune_error(PROXYTUNE_ERROR_ISA));
  return *current->shard;
}

const float* floats(const Tensor& t, int64_t count, const char* name) {
  return values_of<float>(t, count, name);
}
const int32_t* ints(const Tensor& t, int64_t count, const char* name) {
  return values_of<int32_t>(t, count, name);
}
const int64_t* longs(const Tensor& t, int64_t count, const char* name) {
  return values_of<int64_t>(t, count, name);
}
template <typename T>
T* out_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void check_dim(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() == dim, "proxytune: ", name, " has the wrong shape");
}

template <typename Body>
void over_rows(int64_t rows, Body body) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// A rank's part of a batch, [B, n] fp32.
struct Part {
  int64_t rows, size, start;
  const float* x;
  Part(const Tensor& t, int64_t vocab_start, const char* name) : start(vocab_start) {
    check_dim(t, 2, name);
    rows = t.size(0), size = t.size(1);
    x = floats(t, rows * size, name);
    STD_TORCH_CHECK(start >= 0 && size <= kMaxVocabSize && start <= kMaxVocabSize - size,
                    "proxytune: ", name, " reaches past 2^19 tokens");
  }
  ShardRow row(int64_t i) const { return {x + i * size, size, start}; }
};

struct Summaries {
  int64_t world, rows;
  const int64_t* data;
  Summaries(const Tensor& t, int64_t rows, const char* name) : rows(rows) {
    check_dim(t, 2, name);
    world = t.size(0);
    data = longs(t, world * rows, name);
  }
  RowHead head(int64_t row) const { return head_of(data, world, rows, row); }
};

Tensor shard_scan(Tensor x) {
  const Part part(x, 0, "x");
  const ShardKernels& k = kernels();
  const Tensor out = new_tensor(x, ScalarType::Long, part.rows);
  auto* summaries = out_of<int64_t>(out);
  over_rows(part.rows, [&](int64_t row) { summaries[row] = k.scan(part.row(row)); });
  return out;
}

Tensor shard_keys(Tensor x, Tensor summaries, int64_t vocab_start) {
  const Part part(x, vocab_start, "x");
  const Summaries heads(summaries, part.rows, "summaries");
  const Tensor out = new_tensor(x, ScalarType::Long, part.rows, part.size);
  auto* keys = out_of<int64_t>(out);
  over_rows(part.rows, [&](int64_t row) {
    const bool infinite = heads.head(row).infinite;
    for (int64_t i = 0; i < part.size; ++i) {
      const float value = part.x[row * part.size + i];
      const bool live = infinite ? value == INFINITY : value > -INFINITY;  // false for NaN
      const int64_t key = live ? token_key(infinite ? 0.0f : value, uint32_t(part.start + i)) : 0;
      keys[row * part.size + i] = key;
    }
  });
  return out;
}

Tensor shard_draw(Tensor x, Tensor summaries, PTK_PARAMS, MaybeTensor lowest_kept, MaybeTensor wanted,
                  int64_t vocab_start, int64_t noise_stream) {
  const Part part(x, vocab_start, "x");
  const Summaries heads(summaries, part.rows, "summaries");
  const float* alphas = floats(alpha, part.rows, "alpha");
  const proxytune_params params = params_of(part.rows, PTK_PARAM_VALUES);
  check_stream(noise_stream);
  const int64_t* given = lowest_kept ? longs(*lowest_kept, part.rows, "lowest_kept") : nullptr;
  const int64_t* ids = wanted ? longs(*wanted, part.rows, "wanted") : nullptr;
  const ShardKernels& k = kernels();
  const int64_t width = kWords + (ids != nullptr);
  const Tensor out = new_tensor(x, ScalarType::Long, part.rows, width);
  over_rows(part.rows, [&](int64_t row) {
    int64_t* words = out_of<int64_t>(out) + row * width;
    std::fill(words, words + width, 0);
    const RawParams raw = params_at(alphas, params, row);
    const RowHead head = heads.head(row);
    if (!valid(raw) || head.count == 0) return;
    const RowParams p = make_row_params(raw);
    const NoiseKey noise = make_noise_key(raw.seed, raw.position, uint32_t(noise_stream));
    const int64_t lowest = given ? std::max(given[row], kLowestKey) : kLowestKey;
    k.draw(part.row(row), head, p, noise, lowest, given || !is_listed(p, head), words);
    if (!ids) return;
    const int64_t i = ids[row] < 0 ? -1 : ids[row] - part.start;
    if (i < 0 || i >= part.size) return;
    const float value = part.x[row * part.size + i];
    const bool live = head.infinite ? value == INFINITY : value > -INFINITY;
    if (live) words[kWordWanted] = token_key(head.infinite ? 0.0f : value, uint32_t(ids[row]));
  });
  return out;
}

Tensor shard_histogram(Tensor keys, Tensor summaries, Tensor temperature, Tensor edges) {
  check_dim(keys, 2, "keys");
  check_dim(edges, 2, "edges");
  const int64_t rows = keys.size(0), size = keys.size(1), bins = edges.size(1);
  const int64_t* key = longs(keys, rows * size, "keys");
  const int64_t* edge = longs(edges, rows * bins, "edges");
  const float* temperatures = floats(temperature, rows, "temperature");
  const Summaries heads(summaries, rows, "summaries");
  const ShardKernels& k = kernels();
  const Tensor out = new_tensor(keys, ScalarType::Long, rows, 2 * bins);
  over_rows(rows, [&](int64_t row) {
    int64_t* counts = out_of<int64_t>(out) + row * 2 * bins;
    int64_t* masses = counts + bins;
    std::fill(counts, counts + 2 * bins, 0);
    const bool greedy = !(temperatures[row] >= FLT_MIN);
    const Exponent e = make_exponent(greedy ? 1.0 : double(temperatures[row]));
    const int64_t *first = edge + row * bins, *last = first + bins, *own = key + row * size;
    std::vector<uint64_t> mass(static_cast<size_t>(size));
    k.key_masses(own, size, heads.head(row).max, e, mass.data());
    for (int64_t i = 0; i < size; ++i) {
      if (own[i] <= 0) continue;
      // The first edge that is not above the key.
      const auto bin = std::lower_bound(first, last, own[i], std::greater<int64_t>()) - first;
      if (bin == bins) continue;
      ++counts[bin];
      masses[bin] = int64_t(uint64_t(masses[bin]) + mass[size_t(i)]);
    }
  });
  return out;
}

using Finished = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            Tensor, Tensor>;

Finished shard_finish(Tensor summaries, Tensor words, MaybeTensor candidates, PTK_PARAMS,
                      MaybeTensor kept, int64_t noise_stream) {
  check_dim(words, 3, "words");
  Gathered g{};
  g.world = words.size(0), g.rows = words.size(1), g.num_words = words.size(2);
  STD_TORCH_CHECK(g.num_words == kWords || g.num_words == kWords + 1 ||
                      (kept && g.num_words == kResidualWords),
                  "proxytune: words has the wrong shape");
  g.summaries = longs(summaries, g.world * g.rows, "summaries");
  g.words = longs(words, g.world * g.rows * g.num_words, "words");
  if (candidates) {
    check_dim(*candidates, 3, "candidates");
    g.num_candidates = candidates->size(2);
    const int64_t all = g.world * g.rows * g.num_candidates;
    g.candidates = longs(*candidates, all, "candidates");
  }
  const int64_t* given = kept ? longs(*kept, g.rows * 4, "kept") : nullptr;
  const float* alphas = floats(alpha, g.rows, "alpha");
  const proxytune_params params = params_of(g.rows, PTK_PARAM_VALUES);
  check_stream(noise_stream);
  const ShardKernels& k = kernels();
  const auto column = [&](ScalarType type) { return new_tensor(words, type, g.rows); };
  const Tensor token_ids = column(ScalarType::Long), logprobs = column(ScalarType::Float),
               raw_logprobs = column(ScalarType::Float), num_kept = column(ScalarType::Int),
               status = column(ScalarType::Int), lowest_kept = column(ScalarType::Long),
               kept_mass = column(ScalarType::Long), wanted = column(ScalarType::Float),
               wanted_raw = column(ScalarType::Float), raw_mass = column(ScalarType::Long),
               undecided = column(ScalarType::Int);
  over_rows(g.rows, [&](int64_t row) {
    KnownRow known{};
    if (given) {
      const int64_t* v = given + row * 4;
      known = {{v[0], uint64_t(v[1]), uint64_t(v[2])}, uint64_t(v[3])};
    }
    const ShardResult r =
        finish_row(k, g, row, params_at(alphas, params, row), uint32_t(noise_stream), given ? &known : nullptr);
    out_of<int64_t>(token_ids)[row] = r.token_id;
    out_of<float>(logprobs)[row] = r.logprob;
    out_of<float>(raw_logprobs)[row] = r.raw_logprob;
    out_of<int32_t>(num_kept)[row] = r.num_kept;
    out_of<int32_t>(status)[row] = r.status;
    out_of<int64_t>(lowest_kept)[row] = r.kept.key;
    out_of<int64_t>(kept_mass)[row] = int64_t(r.kept.mass);
    out_of<float>(wanted)[row] = r.wanted_logprob;
    out_of<float>(wanted_raw)[row] = r.wanted_raw_logprob;
    out_of<int64_t>(raw_mass)[row] = int64_t(r.raw_mass);
    out_of<int32_t>(undecided)[row] = r.undecided;
  });
  return {token_ids, logprobs, raw_logprobs, num_kept, status, lowest_kept, kept_mass,
          wanted, wanted_raw, raw_mass, undecided};
}

// u < target / draft, in fp64 logs; what the draft's distribution does not hold is accepted whenever
// the target's does.
bool accepts(float target, float draft, int64_t id, int64_t seed, int64_t position) {
  if (std::isnan(target) || std::isnan(draft)) return !std::isnan(target);
  const NoiseKey noise = make_noise_key(seed, position, kStreamAccept);
  return std::log(double(uniform_of(noise, uint32_t(id)))) < double(target) - double(draft);
}

std::tuple<Tensor, Tensor> shard_accept(Tensor target_logprobs, Tensor target_status,
                                        Tensor draft_logprobs, Tensor draft_token_ids, Tensor seed,
                                        Tensor position) {
  check_dim(draft_token_ids, 2, "draft_token_ids");
  const int64_t rows = draft_token_ids.size(0), drafts = draft_token_ids.size(1);
  const int64_t* ids = longs(draft_token_ids, rows * drafts, "draft_token_ids");
  const float* target = floats(target_logprobs, rows * (drafts + 1), "target_logprobs");
  const int32_t* status = ints(target_status, rows * (drafts + 1), "target_status");
  const float* draft = floats(draft_logprobs, rows * drafts, "draft_logprobs");
  const int64_t* seeds = longs(seed, rows, "seed");
  const int64_t* positions = longs(position, rows, "position");
  const Tensor num_accepted = new_tensor(seed, ScalarType::Int, rows);
  const Tensor residual = new_tensor(seed, ScalarType::Long, rows);
  over_rows(rows, [&](int64_t row) {
    int64_t j = 0, stopped = -1;
    for (; j < drafts; ++j) {
      const int64_t id = ids[row * drafts + j];
      if (id < 0 || status[row * (drafts + 1) + j] >= kStatusEmpty) break;
      const int64_t at = int64_t(uint64_t(positions[row]) + uint64_t(j));
      stopped = j;
      if (!accepts(target[row * (drafts + 1) + j], draft[row * drafts + j], id, seeds[row], at)) break;
      stopped = -1;
    }
    out_of<int32_t>(num_accepted)[row] = int32_t(j);
    out_of<int64_t>(residual)[row] = stopped;
  });
  return {num_accepted, residual};
}

// One side of all positions that a residual may be drawn at.
struct Side {
  Part part;
  Summaries heads;
  const int64_t *lowest_kept, *kept_mass;
  Side(const Tensor& x, const Tensor& summaries, const Tensor& keys, const Tensor& masses,
       int64_t vocab_start)
      : part(x, vocab_start, "x"),
        heads(summaries, part.rows, "summaries"),
        lowest_kept(longs(keys, part.rows, "cut")),
        kept_mass(longs(masses, part.rows, "kept_mass")) {}
  ShardSide row(int64_t i) const {
    return {part.row(i), heads.head(i), std::max(lowest_kept[i], kLowestKey), uint64_t(kept_mass[i])};
  }
};

Tensor shard_residual(Tensor x, Tensor summaries, Tensor cut, Tensor kept_mass, Tensor draft_x,
                      Tensor draft_summaries, Tensor draft_cut, Tensor draft_kept_mass, Tensor steps,
                      PTK_PARAMS, int64_t vocab_start) {
  const Side target(x, summaries, cut, kept_mass, vocab_start);
  const Side draft(draft_x, draft_summaries, draft_cut, draft_kept_mass, vocab_start);
  check_dim(steps, 1, "steps");
  const int64_t rows = steps.size(0), drafts = rows > 0 ? draft.part.rows / rows : 0;
  STD_TORCH_CHECK(draft.part.rows == rows * drafts && target.part.rows == rows * (drafts + 1) &&
                      draft.part.size == target.part.size,
                  "proxytune: x, draft_x and steps must be of [B, k + 1], [B, k] and [B]");
  const int64_t* step = longs(steps, rows, "steps");
  const float* alphas = floats(alpha, rows, "alpha");
  const proxytune_params params = params_of(rows, PTK_PARAM_VALUES);
  const ShardKernels& k = kernels();
  const Tensor out = new_tensor(x, ScalarType::Long, rows, kResidualWords);
  over_rows(rows, [&](int64_t row) {
    int64_t* words = out_of<int64_t>(out) + row * kResidualWords;
    std::fill(words, words + kResidualWords, 0);
    if (step[row] < 0 || step[row] >= drafts) return;
    const RawParams raw = params_at_draft(params_at(alphas, params, row), step[row]);
    const ShardSide from = target.row(row * (drafts + 1) + step[row]);
    if (!valid(raw) || from.head.count == 0) return;
    const NoiseKey noise = make_noise_key(raw.seed, raw.position, kStreamResidual);
    k.residual(from, draft.row(row * drafts + step[row]), make_row_params(raw), noise, words);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(proxytune, CPU, m) {
  m.impl("shard_scan", TORCH_BOX(&shard_scan));
  m.impl("shard_keys", TORCH_BOX(&shard_keys));
  m.impl("shard_draw", TORCH_BOX(&shard_draw));
  m.impl("shard_histogram", TORCH_BOX(&shard_histogram));
  m.impl("shard_finish", TORCH_BOX(&shard_finish));
  m.impl("shard_accept", TORCH_BOX(&shard_accept));
  m.impl("shard_residual", TORCH_BOX(&shard_residual));
}
