// The C API of the CPU: the check of the arguments, the workspace and the loop over rows.
#include <cstdlib>
#include <new>

#include "../common/arguments.h"
#include "types.h"

namespace ptk {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

size_t row_bytes(int64_t values) { return aligned(size_t(padded(values)) * sizeof(float)); }
size_t buffer_bytes(int64_t vocab_size) {
  return row_bytes(vocab_size) + row_bytes(tiles_of(vocab_size));
}

// The caller's workspace, or one allocated for the call.
class Workspace {
 public:
  Workspace(void* given, int64_t vocab_size, bool rejection, const proxytune_parallel* parallel) {
    buffers.parallel = parallel;
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
};

// Calls body(kernels, i, buffers) for i in [begin, end).
template <typename Body>
int each(int64_t vocab_size, bool rejection, int64_t begin, int64_t end, void* workspace,
         size_t workspace_size, const proxytune_parallel* parallel, Body body) {
  const size_t wanted = proxytune_cpu_workspace_size(vocab_size, rejection);
  if (begin < 0 || (workspace && !valid_workspace(workspace, workspace_size, wanted, kAlign)) ||
      (parallel && !parallel->run)) {
    return PROXYTUNE_ERROR_ARGUMENT;
  }
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  Workspace w(workspace, vocab_size, rejection, parallel);
  if (!w.ready) return PROXYTUNE_ERROR_MEMORY;
  for (int64_t i = begin; i < end; ++i) body(*kernels, i, w.buffers);
  return PROXYTUNE_OK;
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
                         void* workspace, size_t workspace_size, const proxytune_parallel* parallel) {
  if (!valid_sample(args)) return PROXYTUNE_ERROR_ARGUMENT;
  return each(args->inputs.vocab_size, false, begin, end, workspace, workspace_size, parallel,
              [&](const Kernels& kernels, int64_t row, Buffers& b) { kernels.sample(*args, row, b); });
}

int proxytune_cpu_score(const proxytune_score_args* args, int64_t begin, int64_t end,
                        void* workspace, size_t workspace_size, const proxytune_parallel* parallel) {
  if (!valid_score(args)) return PROXYTUNE_ERROR_ARGUMENT;
  return each(args->inputs.vocab_size, false, begin, end, workspace, workspace_size, parallel,
              [&](const Kernels& kernels, int64_t i, Buffers& b) {
                kernels.score(*args, i / args->positions, i % args->positions, b);
              });
}

int proxytune_cpu_verify(const proxytune_verify_args* args, int64_t begin, int64_t end,
                         void* workspace, size_t workspace_size, const proxytune_parallel* parallel) {
  if (!valid_verify(args)) return PROXYTUNE_ERROR_ARGUMENT;
  return each(args->inputs.vocab_size, args->mode == PROXYTUNE_VERIFY_REJECTION, begin, end, workspace,
              workspace_size, parallel, [&](const Kernels& kernels, int64_t row, Buffers& b) { kernels.verify(*args, row, b); });
}

int proxytune_cpu_combine(const proxytune_combine_args* args, int64_t begin, int64_t end) {
  if (!valid_combine(args) || begin < 0) return PROXYTUNE_ERROR_ARGUMENT;
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  for (int64_t row = begin; row < end; ++row) kernels->combine(*args, row);
  return PROXYTUNE_OK;
}

int proxytune_cpu_head_logits(const proxytune_head_logits_args* args, int64_t begin, int64_t end) {
  if (!valid_head_logits(args) || begin < 0) return PROXYTUNE_ERROR_ARGUMENT;
  const Kernels* kernels = current_kernels();
  if (!kernels) return PROXYTUNE_ERROR_ISA;
  kernels->head_logits(*args, begin, end);
  return PROXYTUNE_OK;
}

const char* proxytune_error(int code) { return error_text(code); }

}  // extern "C"
