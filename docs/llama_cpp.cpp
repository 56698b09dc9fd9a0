// Steers a GGUF model with two small ones: llama.cpp runs all three, proxytune draws the tokens.
//
//   llama_cpp BASE EXPERT ANTI PROMPT [COUNT [TOKENS [ALPHA [TEMPERATURE [TOP_P [SEED]]]]]]
//
// COUNT outputs of one prompt are decoded as one batch, with the seeds SEED, SEED + 1, ...; each
// output is what it would be alone but for rounding. docs/llama_cpp.md says how to build it.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama.h"
#include "proxytune.h"

namespace {

struct Options {
  std::string base, expert, anti, prompt;
  int count = 1, tokens = 64;
  float alpha = 1.0f, temperature = 0.7f, top_p = 0.9f;
  int64_t seed = 0;
};

// Tokens for the three models, each with its sequence and its position in it.
class Batch {
 public:
  void clear() {
    token_.clear(), position_.clear(), sequence_.clear(), logits_.clear();
  }

  void add(llama_seq_id sequence, size_t position, llama_token token, bool logits) {
    token_.push_back(token);
    position_.push_back(static_cast<llama_pos>(position));
    sequence_.push_back(sequence);
    logits_.push_back(logits);
  }

  llama_batch view() {
    one_.assign(token_.size(), 1);
    sequences_.clear();
    for (llama_seq_id& sequence : sequence_) sequences_.push_back(&sequence);
    return {static_cast<int32_t>(token_.size()), token_.data(), nullptr, position_.data(),
            one_.data(), sequences_.data(), logits_.data()};
  }

 private:
  std::vector<llama_token> token_;
  std::vector<llama_pos> position_;
  std::vector<llama_seq_id> sequence_;
  std::vector<int8_t> logits_;
  std::vector<int32_t> one_;
  std::vector<llama_seq_id*> sequences_;
};

// One of the three: a file, and a context with room for `count` sequences of `length` tokens.
class Member {
 public:
  explicit Member(const std::string& path)
      : path_(path),
        model_(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free) {
    if (!model_) throw std::runtime_error("llama.cpp can't open " + path);
  }

  const llama_vocab* vocab() const { return llama_model_get_vocab(model_.get()); }
  int32_t width() const { return llama_vocab_n_tokens(vocab()); }

  void start(int count, size_t length) {
    llama_context_params params = llama_context_default_params();
    params.n_seq_max = static_cast<uint32_t>(count);
    params.n_ctx = static_cast<uint32_t>((length + 255) / 256 * 256) * params.n_seq_max;
    params.n_batch = static_cast<uint32_t>(length);
    context_.reset(llama_init_from_model(model_.get(), params));
    if (!context_) throw std::runtime_error("llama.cpp has no room for the context of " + path_);
  }

  // Runs a batch. The logits are rows of width() each, in the batch's order, where llama.cpp left
  // them: the next run writes over them.
  proxytune_logits run(Batch& batch) {
    const int code = llama_decode(context_.get(), batch.view());
    if (code) throw std::runtime_error(path_ + ": llama_decode gave " + std::to_string(code));
    proxytune_logits logits{};
    logits.data = llama_get_logits(context_.get());
    logits.row_stride = width();
    logits.dtype = PROXYTUNE_F32;
    return logits;
  }

  // Gives sequence `to` what sequence 0 holds.
  void copy(llama_seq_id to) {
    llama_memory_seq_cp(llama_get_memory(context_.get()), 0, to, -1, -1);
  }

 private:
  std::string path_;
  std::unique_ptr<llama_model, decltype(&llama_model_free)> model_;
  std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, llama_free};
};

// How many ids mean the same to all three; what lies past them is never drawn.
int32_t agree(const Member (&members)[3]) {
  int32_t size = members[0].width();
  for (const Member& member : members) size = std::min(size, member.width());
  for (int32_t id = 0; id < size; ++id) {
    for (const Member& member : members) {
      if (std::strcmp(llama_vocab_get_text(members[0].vocab(), id), llama_vocab_get_text(member.vocab(), id))) {
        throw std::runtime_error("the files disagree on token " + std::to_string(id));
      }
    }
  }
  return size;
}

std::vector<llama_token> tokenize(const llama_vocab* vocab, const std::string& text) {
  std::vector<llama_token> tokens(text.size() + 8);
  const int32_t count = llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), tokens.data(),
                                       static_cast<int32_t>(tokens.size()), true, false);
  if (count <= 0) throw std::runtime_error("the prompt has no tokens");
  tokens.resize(static_cast<size_t>(count));
  return tokens;
}

std::string text_of(const llama_vocab* vocab, const std::vector<llama_token>& tokens) {
  std::string text;
  for (const llama_token token : tokens) {
    char piece[256];
    const int32_t size = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, false);
    if (size > 0) text.append(piece, static_cast<size_t>(size));
  }
  return text;
}

class Sampler {
 public:
  Sampler(const Options& options, int32_t vocab_size)
      : vocab_size_(vocab_size),
        workspace_size_((proxytune_cpu_workspace_size(vocab_size, 0) + 63) & ~size_t{63}),
        workspace_(std::aligned_alloc(64, workspace_size_), std::free),
        alpha_(static_cast<size_t>(options.count), options.alpha),
        temperature_(alpha_.size(), options.temperature),
        top_p_(alpha_.size(), options.top_p) {
    if (!workspace_size_ || !workspace_) throw std::runtime_error("no memory for the sampler");
  }

  // The next token of each row. A draw depends on its seed, its position and its logits alone.
  std::vector<int64_t> draw(const proxytune_logits (&logits)[3], const std::vector<int64_t>& seeds,
                            const std::vector<int64_t>& positions) {
    std::vector<int64_t> token_ids(seeds.size());
    proxytune_sample_args args{};
    args.inputs.vocab_size = vocab_size_;
    args.inputs.base = logits[0];
    args.inputs.expert = logits[1];
    args.inputs.anti = logits[2];
    args.inputs.alpha = alpha_.data();
    args.params.temperature = temperature_.data();
    args.params.top_p = top_p_.data();
    args.params.seed = seeds.data();
    args.params.position = positions.data();
    args.token_ids = token_ids.data();
    const int code = proxytune_cpu_sample(&args, 0, static_cast<int64_t>(seeds.size()), workspace_.get(),
                                          workspace_size_, nullptr);
    if (code != PROXYTUNE_OK) throw std::runtime_error(proxytune_error(code));
    return token_ids;
  }

 private:
  const int64_t vocab_size_;
  const size_t workspace_size_;
  std::unique_ptr<void, decltype(&std::free)> workspace_;
  std::vector<float> alpha_, temperature_, top_p_;
};

std::vector<std::vector<llama_token>> generate(const Options& options, Member (&members)[3]) {
  const llama_vocab* vocab = members[0].vocab();
  const std::vector<llama_token> prompt = tokenize(vocab, options.prompt);
  for (Member& member : members) {
    member.start(options.count, prompt.size() + static_cast<size_t>(options.tokens));
  }
  Sampler sampler(options, agree(members));
  Batch batch;
  proxytune_logits logits[3];
  const auto run = [&] {
    for (int role = 0; role < 3; ++role) logits[role] = members[role].run(batch);
  };

  // The prompt runs once, and all outputs begin at its last token's logits: rows 0 bytes apart.
  for (size_t i = 0; i < prompt.size(); ++i) batch.add(0, i, prompt[i], i + 1 == prompt.size());
  run();
  for (proxytune_logits& role : logits) role.row_stride = 0;
  for (Member& member : members) {
    for (llama_seq_id to = 1; to < options.count; ++to) member.copy(to);
  }
  std::vector<std::vector<llama_token>> outputs(static_cast<size_t>(options.count));
  std::vector<size_t> running;
  for (size_t output = 0; output < outputs.size(); ++output) running.push_back(output);

  while (!running.empty()) {
    std::vector<int64_t> seeds, positions;
    for (const size_t output : running) {
      seeds.push_back(options.seed + static_cast<int64_t>(output));
      positions.push_back(static_cast<int64_t>(outputs[output].size()));
    }
    const std::vector<int64_t> drawn = sampler.draw(logits, seeds, positions);
    batch.clear();
    std::vector<size_t> left;
    for (size_t row = 0; row < running.size(); ++row) {
      std::vector<llama_token>& output = outputs[running[row]];
      if (drawn[row] < 0) throw std::runtime_error("the logits left no token to draw");
      const auto token = static_cast<llama_token>(drawn[row]);
      output.push_back(token);
      if (llama_vocab_is_eog(vocab, token) || output.size() == static_cast<size_t>(options.tokens)) continue;
      batch.add(static_cast<llama_seq_id>(running[row]), prompt.size() + output.size() - 1, token, true);
      left.push_back(running[row]);
    }
    running = left;
    if (!running.empty()) run();
  }
  return outputs;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 5) throw std::runtime_error("usage: llama_cpp BASE EXPERT ANTI PROMPT [COUNT ...]");
  Options options{argv[1], argv[2], argv[3], argv[4]};
  if (argc > 5) options.count = std::atoi(argv[5]);
  if (argc > 6) options.tokens = std::atoi(argv[6]);
  if (argc > 7) options.alpha = std::strtof(argv[7], nullptr);
  if (argc > 8) options.temperature = std::strtof(argv[8], nullptr);
  if (argc > 9) options.top_p = std::strtof(argv[9], nullptr);
  if (argc > 10) options.seed = std::atoll(argv[10]);
  if (options.count < 1 || options.tokens < 1) throw std::runtime_error("COUNT and TOKENS must be 1 or more");

  llama_log_set([](ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
  }, nullptr);
  llama_backend_init();
  Member members[3] = {Member(options.base), Member(options.expert), Member(options.anti)};
  const auto outputs = generate(options, members);
  for (const auto& output : outputs) {
    std::printf("tokens:");
    for (const llama_token token : output) std::printf(" %d", token);
    std::printf("\n%s\n", text_of(members[0].vocab(), output).c_str());
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "llama_cpp: %s\n", error.what());
  return 1;
}
