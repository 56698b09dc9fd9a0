// The C API: checks, addressing, and the loop over rows.
#include <cstdlib>
#include <new>

#include "../common/addressing.h"
#include "../common/arguments.h"
#include "types.h"

namespace ptk {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

size_t row_bytes(int64_t vocab_size) { return aligned(size_t(padded(vocab_size)) * sizeof(float)); }
size_t tile_bytes(int64_t vocab_size) {
  return aligned(size_t(padded(tiles_of(vocab_size))) * sizeof(float));
}

size_t buffer_bytes(int64_t vocab_size) {
  return row_bytes(vocab_size) + tile_bytes(vocab_size);
}

// The caller's workspace, or one allocated for the call.
class Workspace {
 public:
  Workspace(void* given, int64_t vocab_size, bool rejection, const proxytune_parallel* parallel) {
    if (parallel) {
      threads_ = {parallel->run, parallel->pool, parallel->chunks};
      buffers.parallel = &threads_;
    }
    if (!given) {
      owned_ = std::aligned_alloc(kAlign, proxytune_cpu_workspace_size(vocab_size, rejection));
      given = owned_;
    }
    if (!given) return;
    auto* at = static_cast<char*>(given);
    buffers.scratch = new (at) Scratch;
    at += aligned(sizeof(Scratch));
    for (int i = 0; i < (rejection ? 2 : 1); ++i) {
      float* x = reinterpret_cast<float*>(at);
      float* tile_max = reinterpret_cast<float*>(at + row_bytes(vocab_size));
      buffers.rows[i] = {x, tile_max};
      at += buffer_bytes(vocab_size);
    }
    ready = true;
  }
  ~Workspace() { std::free(owned_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  Buffers buffers{};
  bool ready = false;

 private:
  void* owned_ = nullptr;
  Parallel threads_{};
};

Matrix matrix_at(const proxytune_logits& l, int64_t row, int64_t position) {
  return {logits_at(l, row, position), l.dtype};
}

RowInput input_at(const proxytune_inputs& in, int64_t row, int64_t position) {
  RowInput r{};
  r.vocab_size = in.vocab_size;
  r.alpha = in.alpha ? in.alpha[row] : 1.0f;
  r.base = matrix_at(in.base, row, position);
  // alpha = 0 gives base exactly, whatever the other two hold: they are not read.
  if (r.alpha != 0.0f) {
    r.expert = matrix_at(in.expert, row, position);
    r.anti = matrix_at(in.anti, row, position);
  }
  r.bias = bias_at(in, row, position);
  r.allowed = allowed_at(in, row, position);
  return r;
}

template <typename T>
void put(T* out, int64_t i, T value) {
  if (out) out[i] = value;
}

TopTokens top_at(const proxytune_sample_args& a, int64_t row) {
  const int64_t offset = row * a.num_top;
  return {a.num_top, a.top_token_ids ? a.top_token_ids + offset : nullptr,
          a.top_logprobs ? a.top_logprobs + offset : nullptr};
}

void verify_row(const proxytune_verify_args& a, const Kernels& kernels, int64_t row, Buffers& b) {
  const int64_t k = a.num_drafts;
  const RawParams first = params_at(a.params, a.inputs, row);
  int32_t status = 0, accepted = 0;
  bool active = true;
  for (int64_t j = 0; j <= k; ++j) {
    const RawParams params = params_at_draft(first, j);
    VerifyStep step;
    if (active) {
      const RowInput in = input_at(a.inputs, row, j);
      const int64_t draft_id =
          j < k ? a.draft_token_ids[row * a.draft_token_ids_row_stride + j] : -1;
      if (a.mode == PROXYTUNE_VERIFY_COUPLED) {
        step = kernels.coupled(in, params, draft_id, b);
      } else {
        RowInput draft{};
        draft.vocab_size = in.vocab_size;
        if (j < k) draft.base = matrix_at(a.draft_logits, row, j);
        // A row without drafts draws what sample would.
        const uint32_t stream = j == 0 ? kStreamSample : kStreamBonus;
        step = kernels.reject(in, j < k ? &draft : nullptr, params, draft_id, stream, b);
      }
    }
    a.token_ids[row * (k + 1) + j] = step.token_id;
    put(a.logprobs, row * (k + 1) + j, step.logprob);
    put(a.raw_logprobs, row * (k + 1) + j, step.raw_logprob);
    status |= step.status;
    active = active && step.accepted;
    accepted += active;
  }
  a.num_accepted[row] = accepted;
  put(a.status, row, status);
}

}  // namespace
}  // namespace ptk

using namespace ptk;

extern "C" {

size_t proxytune_cpu_workspace_size(int64_t vocab_size, int rejection) {
  if (vocab_size < 1 || vocab_size > kMaxVocabSize) return 0;
  const size_t rows = rejection ? 2 : 1;
  return aligned(sizeof(Scratch)) + rows * buffer_bytes(vocab_size);
}

int proxytune_cpu_sample(const proxytune_sample_args* args, int64_t begin, int64_t end,
                         void* workspace, const proxytune_parallel* parallel) {
  if (!good_sample(args) || begin < 0) return PROXYTUNE_ERROR_ARGUMENT;
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  Workspace w(workspace, args->inputs.vocab_size, false, parallel);
  if (!w.ready) return PROXYTUNE_ERROR_MEMORY;
  for (int64_t row = begin; row < end; ++row) {
    const SampleResult r =
        kernels->sample(input_at(args->inputs, row, 0), params_at(args->params, args->inputs, row),
                        uint32_t(args->noise_stream), top_at(*args, row), w.buffers);
    args->token_ids[row] = r.token_id;
    put(args->logprobs, row, r.logprob);
    put(args->raw_logprobs, row, r.raw_logprob);
    put(args->num_kept, row, r.num_kept);
    put(args->status, row, r.status);
  }
  return PROXYTUNE_OK;
}

int proxytune_cpu_score(const proxytune_score_args* args, int64_t begin, int64_t end,
                        void* workspace, const proxytune_parallel* parallel) {
  if (!args || !good_inputs(args->inputs) || !args->token_ids || !args->logprobs || begin < 0 ||
      args->positions < 1) {
    return PROXYTUNE_ERROR_ARGUMENT;
  }
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  Workspace w(workspace, args->inputs.vocab_size, false, parallel);
  if (!w.ready) return PROXYTUNE_ERROR_MEMORY;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / args->positions, position = i % args->positions;
    const int64_t id = args->token_ids[row * args->token_ids_row_stride + position];
    args->logprobs[i] = kernels->score(input_at(args->inputs, row, position), id, w.buffers);
  }
  return PROXYTUNE_OK;
}

int proxytune_cpu_verify(const proxytune_verify_args* args, int64_t begin, int64_t end,
                         void* workspace, const proxytune_parallel* parallel) {
  if (!good_verify(args) || begin < 0) return PROXYTUNE_ERROR_ARGUMENT;
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  const bool rejection = args->mode == PROXYTUNE_VERIFY_REJECTION;
  Workspace w(workspace, args->inputs.vocab_size, rejection, parallel);
  if (!w.ready) return PROXYTUNE_ERROR_MEMORY;
  for (int64_t row = begin; row < end; ++row) verify_row(*args, *kernels, row, w.buffers);
  return PROXYTUNE_OK;
}

int proxytune_cpu_combine(const proxytune_combine_args* args, int64_t begin, int64_t end) {
  if (!args || !good_inputs(args->inputs) || !args->x || begin < 0) return PROXYTUNE_ERROR_ARGUMENT;
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  for (int64_t row = begin; row < end; ++row) {
    kernels->combine(input_at(args->inputs, row, 0), args->x + row * args->x_row_stride);
  }
  return PROXYTUNE_OK;
}

int proxytune_cpu_head_logits(const proxytune_head_logits_args* args, int64_t begin, int64_t end) {
  if (!args || !args->hidden || !args->weight.data || !good_logits(args->weight) ||
      !args->logits || args->rows < 0 || args->size < 1 || begin < 0) {
    return PROXYTUNE_ERROR_ARGUMENT;
  }
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  const HeadInput in = {args->hidden,      args->hidden_row_stride, args->rows,         args->size,
                        args->weight.data, args->weight.row_stride, args->weight.dtype, args->logits_row_stride};
  kernels->head_logits(in, begin, end, args->logits);
  return PROXYTUNE_OK;
}

const char* proxytune_error(int code) { return sentence(code); }

}  // extern "C"
