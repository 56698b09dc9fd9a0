// The sampling step of a proxy-tuning engine: three models' logits in, every request's next token out.
//
//   engine_step [THREADS]
//
// The first half, namespace steered, is what to copy. The second half is an engine to run it in: three
// small bigram models, two slots, more requests than slots, decoded plainly and then with drafts.
// Both must give the same tokens. docs/engine_step.md says how to build it, and what to put where.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "proxytune.h"

namespace steered {

inline void check(int code) {
  if (code != PROXYTUNE_OK) throw std::runtime_error(proxytune_error(code));
}

// Starts threads for each run. An engine has a pool of its own, and lends that one instead.
class Threads {
 public:
  explicit Threads(int count) : count_(count) {}

  int count() const { return count_; }

  // body(i) for i in [0, chunks), in any order, on any threads; returns when all have.
  void run(int64_t chunks, const std::function<void(int64_t)>& body) {
    std::atomic<int64_t> next = 0;
    const auto work = [&] {
      for (int64_t i; (i = next++) < chunks;) body(i);
    };
    std::vector<std::jthread> helpers;  // they are joined at the end of their lives
    for (int i = 1; i < count_; ++i) helpers.emplace_back(work);
    work();
  }

 private:
  const int count_;
};

// How a request is steered and drawn; the defaults are plain proxy-tuning.
struct Sampling {
  float alpha = 1.0f, temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;
  int64_t seed = 0;
};

// Where the models left their logits: fp32 [slots, positions, vocab_size]. 16-bit logits and padded
// rows work alike: see dtype and the strides of proxytune_logits.
struct Logits {
  const float *base, *expert, *anti;
};

// Draws the slots' tokens. A draw depends on the request's seed, its position and its logits alone:
// not on its slot, on the slots beside it, or on the number of threads.
class Sampler {
 public:
  Sampler(int64_t vocab_size, int slots, Threads& threads)
      : vocab_size_(vocab_size),
        workspace_size_((proxytune_cpu_workspace_size(vocab_size, 0) + 63) & ~size_t{63}),
        threads_(threads),
        alpha_(slots),
        temperature_(slots),
        top_p_(slots),
        min_p_(slots),
        top_k_(slots),
        seed_(slots),
        position_(slots) {
    for (int i = 0; i < threads.count(); ++i) {
      workspaces_.emplace_back(std::aligned_alloc(64, workspace_size_), std::free);
      if (!workspace_size_ || !workspaces_.back()) throw std::runtime_error("vocabulary size, or memory");
    }
  }

  // A slot's new request, before its first token.
  void start(int slot, const Sampling& request) {
    alpha_[slot] = request.alpha;
    temperature_[slot] = request.temperature;
    top_p_[slot] = request.top_p;
    min_p_[slot] = request.min_p;
    top_k_[slot] = request.top_k;
    seed_[slot] = request.seed;
    position_[slot] = 0;
  }

  // `count` more tokens of a slot's request are out.
  void advance(int slot, int64_t count) { position_[slot] += count; }

  // The next token of each of these slots, to token_ids[slot]; -1 where its logits leave none (all
  // masked or NaN). Other slots' rows are not read.
  void sample(std::span<const int> slots, const Logits& logits, int64_t* token_ids) {
    draw(slots, logits, position_.data(), token_ids);
  }

  // The expert's draft of the token `offset` places ahead, from its logits [slots, 1, vocab_size]. It
  // draws with the noise that the target will use there: that is what makes the two agree so often.
  void draft(std::span<const int> slots, const float* expert, int64_t offset, int64_t* token_ids) {
    std::vector<int64_t> position = position_;
    for (int64_t& place : position) place += offset;
    draw(slots, {expert, nullptr, nullptr}, position.data(), token_ids);
  }

  // Compares num_drafts drafts of each slot with what the target draws there: logits at num_drafts + 1
  // positions. token_ids [slots, num_drafts + 1] gets the tokens that plain decoding would give: the
  // drafts up to the first that differs, the target's own in its place, then -1.
  void verify(std::span<const int> slots, const Logits& logits, const int64_t* drafts,
              int64_t num_drafts, int64_t* token_ids, int32_t* num_accepted) {
    proxytune_verify_args args{};
    args.inputs = inputs(logits, num_drafts + 1);
    args.params = params(position_.data());
    args.num_drafts = num_drafts;
    args.mode = PROXYTUNE_VERIFY_COUPLED;
    args.draft_token_ids = drafts;
    args.draft_token_ids_row_stride = num_drafts;
    args.token_ids = token_ids;
    args.num_accepted = num_accepted;
    each(slots, [&](int slot, void* workspace, const proxytune_parallel* lent) {
      return proxytune_cpu_verify(&args, slot, slot + 1, workspace, workspace_size_, lent);
    });
  }

 private:
  void draw(std::span<const int> slots, const Logits& logits, const int64_t* position, int64_t* token_ids) {
    proxytune_sample_args args{};
    args.inputs = inputs(logits, 1);
    args.params = params(position);
    args.token_ids = token_ids;
    each(slots, [&](int slot, void* workspace, const proxytune_parallel* lent) {
      return proxytune_cpu_sample(&args, slot, slot + 1, workspace, workspace_size_, lent);
    });
  }

  proxytune_inputs inputs(const Logits& logits, int64_t positions) const {
    const auto role = [&](const float* data) {
      proxytune_logits made{};
      made.data = data;
      made.row_stride = positions * vocab_size_;
      made.position_stride = vocab_size_;
      made.dtype = PROXYTUNE_F32;
      return made;
    };
    proxytune_inputs made{};
    made.vocab_size = vocab_size_;
    made.base = role(logits.base);
    made.expert = role(logits.expert);
    made.anti = role(logits.anti);
    made.alpha = alpha_.data();
    return made;
  }

  proxytune_params params(const int64_t* position) const {
    proxytune_params made{};
    made.temperature = temperature_.data();
    made.top_k = top_k_.data();
    made.top_p = top_p_.data();
    made.min_p = min_p_.data();
    made.seed = seed_.data();
    made.position = position;
    return made;
  }

  // call(slot, workspace, parallel) for each slot: a thread takes a slot, or, where there are fewer
  // slots than threads, all threads take a part of each slot's row.
  template <typename Call>
  void each(std::span<const int> slots, const Call& call) {
    if (static_cast<int>(slots.size()) < threads_.count()) {
      const proxytune_parallel lent{&lend, &threads_, threads_.count()};
      for (const int slot : slots) check(call(slot, workspaces_[0].get(), &lent));
      return;
    }
    std::atomic<size_t> next = 0;
    std::atomic<int> failed = PROXYTUNE_OK;
    threads_.run(threads_.count(), [&](int64_t thread) {
      for (size_t i; (i = next++) < slots.size();) {
        const int code = call(slots[i], workspaces_[thread].get(), nullptr);
        if (code != PROXYTUNE_OK) failed = code;
      }
    });
    check(failed);
  }

  static void lend(void* pool, int64_t chunks, void (*body)(void*, int64_t), void* context) {
    static_cast<Threads*>(pool)->run(chunks, [=](int64_t chunk) { body(context, chunk); });
  }

  const int64_t vocab_size_;
  const size_t workspace_size_;
  Threads& threads_;
  std::vector<float> alpha_, temperature_, top_p_, min_p_;
  std::vector<int32_t> top_k_;
  std::vector<int64_t> seed_, position_;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> workspaces_;  // one for each thread
};

}  // namespace steered

// An engine to run it in. Its models see one token; yours hold caches, and roll back by a length.

namespace {

constexpr int kVocabSize = 1000, kSlots = 2, kDrafts = 3;
constexpr int64_t kEnd = 831;

enum Role { kBase, kExpert, kAnti };

// Multiples of 1/64 between -8 and 8: sums and small multiples of them do not round.
float noise(uint32_t key, uint32_t last, uint32_t token) {
  uint32_t h = (key * 0x9E3779B9u) ^ (last * 0x85EBCA6Bu) ^ (token * 0xC2B2AE35u);
  h ^= h >> 15;
  h *= 0x2C1B3C6Du;
  h ^= h >> 12;
  h *= 0x297A2D39u;
  h ^= h >> 15;
  return static_cast<float>(static_cast<int32_t>(h >> 22) - 512) / 64.0f;
}

// Logits behind a token. Base and expert have much in common, the anti-expert nothing with them.
void forward(Role role, int64_t last, float* logits) {
  const auto key = static_cast<uint32_t>(last);
  for (uint32_t token = 0; token < kVocabSize; ++token) {
    const float own = noise(1u + role, key, token) / 4.0f;
    logits[token] = role == kAnti ? own : own + 4.0f * noise(0, key, token);
  }
}

struct Request {
  steered::Sampling sampling;
  int64_t prompt;  // its last token, which is all that a bigram model sees
  size_t max_tokens;
  std::vector<int64_t> token_ids = {};

  bool done() const {
    return token_ids.size() == max_tokens || (!token_ids.empty() && token_ids.back() == kEnd);
  }
  int64_t last() const { return token_ids.empty() ? prompt : token_ids.back(); }
};

class Engine {
 public:
  explicit Engine(steered::Threads& threads) : sampler_(kVocabSize, kSlots, threads) {
    for (auto& logits : logits_) logits.resize(size_t{kSlots} * (kDrafts + 1) * kVocabSize);
  }

  // Keeps the slots filled until all requests are done.
  void run(std::vector<Request>& requests, bool speculative) {
    size_t next = 0;
    Request* slots[kSlots] = {};
    for (;;) {
      std::vector<int> busy;
      for (int slot = 0; slot < kSlots; ++slot) {
        if ((!slots[slot] || slots[slot]->done()) && next < requests.size()) {
          slots[slot] = &requests[next++];
          sampler_.start(slot, slots[slot]->sampling);
        }
        if (slots[slot] && !slots[slot]->done()) busy.push_back(slot);
      }
      if (busy.empty()) return;
      speculative ? round(busy, slots) : step(busy, slots);
    }
  }

  int64_t drafted = 0, accepted = 0;

 private:
  steered::Logits logits() const {
    return {logits_[kBase].data(), logits_[kExpert].data(), logits_[kAnti].data()};
  }

  void step(const std::vector<int>& busy, Request* const* slots) {
    for (const int slot : busy) {
      for (const Role role : {kBase, kExpert, kAnti}) {
        forward(role, slots[slot]->last(), &logits_[role][size_t(slot) * kVocabSize]);
      }
    }
    int64_t token_ids[kSlots];
    sampler_.sample(busy, logits(), token_ids);
    for (const int slot : busy) take(slot, *slots[slot], {&token_ids[slot], 1});
  }

  // Drafts, then all three models over the last token and the drafts, then the comparison.
  void round(const std::vector<int>& busy, Request* const* slots) {
    int64_t drafts[kSlots][kDrafts], drawn[kSlots];
    for (int i = 0; i < kDrafts; ++i) {
      for (const int slot : busy) {
        const int64_t last = i ? drafts[slot][i - 1] : slots[slot]->last();
        forward(kExpert, last, &logits_[kExpert][size_t(slot) * kVocabSize]);
      }
      sampler_.draft(busy, logits_[kExpert].data(), i, drawn);
      for (const int slot : busy) drafts[slot][i] = drawn[slot];
    }
    for (const int slot : busy) {
      for (int i = 0; i <= kDrafts; ++i) {
        const int64_t last = i ? drafts[slot][i - 1] : slots[slot]->last();
        const size_t place = (size_t(slot) * (kDrafts + 1) + i) * kVocabSize;
        // A real engine keeps the expert's logits of the drafting, and runs it at the last place only.
        for (const Role role : {kBase, kExpert, kAnti}) forward(role, last, &logits_[role][place]);
      }
    }
    int64_t token_ids[kSlots][kDrafts + 1];
    int32_t num_accepted[kSlots];
    sampler_.verify(busy, logits(), drafts[0], kDrafts, token_ids[0], num_accepted);
    for (const int slot : busy) {
      drafted += kDrafts;
      accepted += num_accepted[slot];
      take(slot, *slots[slot], {token_ids[slot], size_t(num_accepted[slot]) + 1});
    }
  }

  // What was drawn, up to the request's end.
  void take(int slot, Request& request, std::span<const int64_t> token_ids) {
    for (const int64_t token : token_ids) {
      if (token < 0) throw std::runtime_error("the logits left no token to draw");
      if (!request.done()) request.token_ids.push_back(token);
    }
    sampler_.advance(slot, static_cast<int64_t>(token_ids.size()));
  }

  steered::Sampler sampler_;
  std::vector<float> logits_[3];
};

std::vector<Request> requests() {
  return {
      {{.alpha = 1.0f, .temperature = 0.7f, .top_p = 0.9f, .seed = 7}, 11, 24},
      {{.alpha = 0.5f, .temperature = 1.0f, .top_k = 2, .seed = -1}, 12, 9},
      {{.alpha = 0.0f, .temperature = 0.0f}, 13, 16},
      {{.alpha = 1.5f, .temperature = 1.2f, .min_p = 0.4f, .seed = 1}, 14, 20},
      {{.alpha = -1.0f, .temperature = 0.9f, .seed = 2}, 15, 5},
  };
}

}  // namespace

int main(int argc, char** argv) try {
  steered::Threads threads(argc > 1 ? std::atoi(argv[1]) : 2);
  Engine engine(threads);
  std::vector<Request> plain = requests(), speculative = requests();
  engine.run(plain, false);
  engine.run(speculative, true);
  for (size_t i = 0; i < plain.size(); ++i) {
    std::printf("request %zu:", i);
    for (const int64_t token : plain[i].token_ids) std::printf(" %lld", (long long)token);
    std::printf("\n");
    if (speculative[i].token_ids != plain[i].token_ids) {
      throw std::runtime_error("speculation changed the tokens");
    }
  }
  std::printf("speculation: the same tokens, %lld of %lld drafts kept\n",
              (long long)engine.accepted, (long long)engine.drafted);
} catch (const std::exception& error) {
  std::fprintf(stderr, "engine_step: %s\n", error.what());
  return 1;
}
