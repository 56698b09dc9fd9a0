// Registers the CPU kernels with torch, through its stable ABI: one build serves several versions.
// Schemas live in proxytune_kernels/_library.py. Arguments are checked in proxytune_kernels/_check.py
// with messages for people; the checks here only keep direct callers of torch.ops in bounds.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>

#include "include/proxytune.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A thread's workspace, kept between calls: fresh pages would cost more than the kernel. It holds
// one or two fp32 rows of the widest vocabulary the thread has seen.
void* thread_workspace(int64_t vocab_size, bool rejection) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t capacity = 0;
  const size_t size = proxytune_cpu_workspace_size(vocab_size, rejection);
  if (size > capacity) {
    memory.reset(std::aligned_alloc(64, size));
    capacity = memory ? size : 0;
  }
  return memory.get();
}

void check_code(int code) { STD_TORCH_CHECK(code == PROXYTUNE_OK, "proxytune: ", proxytune_error(code)); }

// at::parallel_for in the form the C API takes.
void run_chunks(void*, int64_t chunks, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, chunks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

// Rows narrower than this are not worth waking threads for.
constexpr int64_t kParallelVocabSize = 16384;

// Rows over torch's threads, one call of the C API each; where there are fewer rows than threads,
// each row over all of them. An error must not leave a worker thread as an exception.
template <typename Call>
void over_rows(int64_t rows, int64_t vocab_size, bool rejection, Call call) {
  if (rows == 0) return;  // an empty tensor's pointer is null, which the C API refuses
  const int64_t threads = torch::stable::get_num_threads();
  if (rows < threads && vocab_size >= kParallelVocabSize) {
    const proxytune_parallel parallel{run_chunks, nullptr, int(threads)};
    return check_code(call(0, rows, thread_workspace(vocab_size, rejection), &parallel));
  }
  std::atomic<int> code{PROXYTUNE_OK};
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const int result = call(begin, end, thread_workspace(vocab_size, rejection), nullptr);
    if (result != PROXYTUNE_OK) code.store(result, std::memory_order_relaxed);
  });
  check_code(code);
}

int32_t dtype_code(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return PROXYTUNE_F32;
  if (type == ScalarType::BFloat16) return PROXYTUNE_BF16;
  STD_TORCH_CHECK(type == ScalarType::Half, "proxytune: ", name,
                  " must be float32, bfloat16 or float16");
  return PROXYTUNE_F16;
}

proxytune_logits logits_of(const Tensor& t, int64_t rows, int64_t positions, int64_t vocab_size,
                           const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK((last == 1 || last == 2) && t.size(0) == rows &&
                      (last == 1 ? positions == 1 : t.size(1) == positions) &&
                      t.size(last) >= vocab_size,
                  "proxytune: ", name, " has the wrong shape");
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1, "proxytune: ", name,
                  " must be contiguous in its last dimension");
  return {t.data_ptr(), t.stride(0), last == 2 ? t.stride(1) : 0, dtype_code(t, name)};
}

template <typename T>
T* values_of(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == count && t.is_contiguous(), "proxytune: ",
                  name, " has the wrong dtype or shape, or is not contiguous");
  return static_cast<T*>(t.data_ptr());
}

// Pointers of a call's constraints: Matrix-like tensors with a stride per row and position.
template <typename T>
void constraint_of(const MaybeTensor& t, ScalarType type, int64_t rows, int64_t positions,
                   int64_t width, const char* name, const T** data, int64_t* row_stride,
                   int64_t* position_stride) {
  if (!t) return;
  const int64_t last = t->dim() - 1;
  STD_TORCH_CHECK(t->scalar_type() == type && (last == 1 || last == 2) && t->size(0) == rows &&
                      (last == 1 ? positions == 1 : t->size(1) == positions) &&
                      t->size(last) == width && (t->stride(last) == 1 || width <= 1),
                  "proxytune: ", name, " has the wrong dtype or shape");
  *data = static_cast<const T*>(t->data_ptr());
  *row_stride = t->stride(0);
  *position_stride = last == 2 ? t->stride(1) : 0;
}

proxytune_inputs inputs_of(const Tensor& base, const MaybeTensor& expert, const MaybeTensor& anti,
                           const Tensor& alpha, const MaybeTensor& bias, const MaybeTensor& allowed,
                           int64_t vocab_size) {
  STD_TORCH_CHECK(proxytune_cpu_workspace_size(vocab_size, 0) > 0,
                  "proxytune: vocab_size must be in [1, 2^19], got ", vocab_size);
  const int64_t rows = base.size(0), positions = base.dim() == 3 ? base.size(1) : 1;
  proxytune_inputs in{};
  in.vocab_size = vocab_size;
  in.base = logits_of(base, rows, positions, vocab_size, "base");
  STD_TORCH_CHECK(expert.has_value() == anti.has_value(),
                  "proxytune: expert and anti must be given together");
  if (expert) {
    in.expert = logits_of(*expert, rows, positions, vocab_size, "expert");
    in.anti = logits_of(*anti, rows, positions, vocab_size, "anti");
  }
  in.alpha = values_of<float>(alpha, ScalarType::Float, rows, "alpha");
  constraint_of(bias, ScalarType::Float, rows, positions, vocab_size, "bias", &in.bias,
                &in.bias_row_stride, &in.bias_position_stride);
  const int32_t* words = nullptr;
  constraint_of(allowed, ScalarType::Int, rows, positions, (vocab_size + 31) / 32, "allowed_mask",
                &words, &in.allowed_row_stride, &in.allowed_position_stride);
  in.allowed = reinterpret_cast<const uint32_t*>(words);
  return in;
}

struct ParamTensors {
  const Tensor &temperature, &top_k, &top_p, &min_p, &filter_order, &seed, &position;
};

proxytune_params params_of(const ParamTensors& p, int64_t rows) {
  return {values_of<float>(p.temperature, ScalarType::Float, rows, "temperature"),
          values_of<int32_t>(p.top_k, ScalarType::Int, rows, "top_k"),
          values_of<float>(p.top_p, ScalarType::Float, rows, "top_p"),
          values_of<float>(p.min_p, ScalarType::Float, rows, "min_p"),
          values_of<int32_t>(p.filter_order, ScalarType::Int, rows, "filter_order"),
          values_of<int64_t>(p.seed, ScalarType::Long, rows, "seed"),
          values_of<int64_t>(p.position, ScalarType::Long, rows, "position")};
}

#define PTK_PARAMS                                                                             \
  Tensor alpha, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor filter_order, \
      Tensor seed, Tensor position
#define PTK_PARAM_VALUES alpha, temperature, top_k, top_p, min_p, filter_order, seed, position
#define PTK_CONSTRAINTS MaybeTensor bias, MaybeTensor allowed_mask, int64_t vocab_size
#define PTK_CONSTRAINT_VALUES bias, allowed_mask, vocab_size

// A new CPU tensor, [rows] or [rows, columns]. Straight from the shim: going through the dispatcher
// costs as much again as the rest of a small call.
Tensor empty(ScalarType type, int64_t rows, int64_t columns = -1) {
  int32_t dtype = aoti_torch_dtype_float32();
  if (type == ScalarType::Long) dtype = aoti_torch_dtype_int64();
  if (type == ScalarType::Int) dtype = aoti_torch_dtype_int32();
  const int64_t sizes[] = {rows, columns}, strides[] = {columns < 0 ? 1 : columns, 1};
  AtenTensorHandle handle;
  const auto code = aoti_torch_empty_strided(columns < 0 ? 1 : 2, sizes, strides, dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(code == 0, "proxytune: out of memory");
  return Tensor(handle);
}

struct SampleTensors {
  Tensor token_ids, logprobs, raw_logprobs, num_kept, status;
};

SampleTensors empty_sample(int64_t rows) {
  return {empty(ScalarType::Long, rows), empty(ScalarType::Float, rows),
          empty(ScalarType::Float, rows), empty(ScalarType::Int, rows),
          empty(ScalarType::Int, rows)};
}

proxytune_sample_args sample_args(const Tensor& base, const MaybeTensor& expert,
                                  const MaybeTensor& anti, const Tensor& alpha,
                                  const ParamTensors& params, const MaybeTensor& bias,
                                  const MaybeTensor& allowed, int64_t vocab_size, int64_t stream,
                                  const SampleTensors& out) {
  STD_TORCH_CHECK(base.dim() == 2, "proxytune: base has the wrong shape");
  const int64_t rows = base.size(0);
  proxytune_sample_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, bias, allowed, vocab_size);
  args.params = params_of(params, rows);
  args.stream = int32_t(stream);
  args.token_ids = values_of<int64_t>(out.token_ids, ScalarType::Long, rows, "token_ids");
  args.logprobs = values_of<float>(out.logprobs, ScalarType::Float, rows, "logprobs");
  args.raw_logprobs = values_of<float>(out.raw_logprobs, ScalarType::Float, rows, "raw_logprobs");
  args.num_kept = values_of<int32_t>(out.num_kept, ScalarType::Int, rows, "num_kept");
  args.status = values_of<int32_t>(out.status, ScalarType::Int, rows, "status");
  return args;
}

// Before anything is sized by it.
void check_num_top(int64_t num_top) {
  STD_TORCH_CHECK(num_top >= 1 && num_top <= PROXYTUNE_MAX_TOP,
                  "proxytune: num_top must be in [1, 128], got ", num_top);
}

void add_top(proxytune_sample_args& args, int64_t rows, int64_t num_top,
             const Tensor& top_token_ids, const Tensor& top_logprobs) {
  args.num_top = int32_t(num_top);
  args.top_token_ids =
      values_of<int64_t>(top_token_ids, ScalarType::Long, rows * num_top, "top_token_ids");
  args.top_logprobs =
      values_of<float>(top_logprobs, ScalarType::Float, rows * num_top, "top_logprobs");
}

void run_sample(const proxytune_sample_args& args, int64_t rows) {
  over_rows(rows, args.inputs.vocab_size, false, [&](int64_t begin, int64_t end, void* workspace,
                                                     const proxytune_parallel* parallel) {
    return proxytune_cpu_sample(&args, begin, end, workspace, parallel);
  });
}

#define PTK_SAMPLE \
  Tensor base, MaybeTensor expert, MaybeTensor anti, PTK_PARAMS, PTK_CONSTRAINTS, int64_t stream
#define PTK_SAMPLE_VALUES                                                                          \
  base, expert, anti, alpha, {temperature, top_k, top_p, min_p, filter_order, seed, position}, bias, \
      allowed_mask, vocab_size, stream
#define PTK_SAMPLE_OUTPUTS \
  Tensor token_ids, Tensor logprobs, Tensor raw_logprobs, Tensor num_kept, Tensor status
#define PTK_SAMPLE_OUTPUT_VALUES {token_ids, logprobs, raw_logprobs, num_kept, status}

void sample_out(PTK_SAMPLE, PTK_SAMPLE_OUTPUTS) {
  run_sample(sample_args(PTK_SAMPLE_VALUES, PTK_SAMPLE_OUTPUT_VALUES), base.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample(PTK_SAMPLE) {
  const SampleTensors out = empty_sample(base.size(0));
  run_sample(sample_args(PTK_SAMPLE_VALUES, out), base.size(0));
  return {out.token_ids, out.logprobs, out.raw_logprobs, out.num_kept, out.status};
}

void sample_top_out(PTK_SAMPLE, int64_t num_top, PTK_SAMPLE_OUTPUTS, Tensor top_token_ids,
                    Tensor top_logprobs) {
  check_num_top(num_top);
  proxytune_sample_args args = sample_args(PTK_SAMPLE_VALUES, PTK_SAMPLE_OUTPUT_VALUES);
  add_top(args, base.size(0), num_top, top_token_ids, top_logprobs);
  run_sample(args, base.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_top(PTK_SAMPLE,
                                                                              int64_t num_top) {
  check_num_top(num_top);
  const int64_t rows = base.size(0);
  const SampleTensors out = empty_sample(rows);
  const Tensor top_token_ids = empty(ScalarType::Long, rows, num_top);
  const Tensor top_logprobs = empty(ScalarType::Float, rows, num_top);
  proxytune_sample_args args = sample_args(PTK_SAMPLE_VALUES, out);
  add_top(args, rows, num_top, top_token_ids, top_logprobs);
  run_sample(args, rows);
  return {out.token_ids, out.logprobs, out.raw_logprobs, out.num_kept, out.status, top_token_ids,
          top_logprobs};
}

void combine_out(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor alpha, PTK_CONSTRAINTS,
                 Tensor x) {
  const int64_t rows = base.size(0);
  STD_TORCH_CHECK(base.dim() == 2, "proxytune: base has the wrong shape");
  proxytune_combine_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES);
  args.x = values_of<float>(x, ScalarType::Float, rows * vocab_size, "out");
  args.x_row_stride = vocab_size;
  std::atomic<int> code{PROXYTUNE_OK};
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const int result = proxytune_cpu_combine(&args, begin, end);
    if (result != PROXYTUNE_OK) code.store(result, std::memory_order_relaxed);
  });
  check_code(code);
}

Tensor combine(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor alpha, PTK_CONSTRAINTS) {
  Tensor x = empty(ScalarType::Float, base.size(0), vocab_size);
  combine_out(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES, x);
  return x;
}

void score_out(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor token_ids, Tensor alpha,
               int64_t vocab_size, Tensor logprobs) {
  STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
  const int64_t rows = base.size(0), positions = base.size(1);
  proxytune_score_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, std::nullopt, std::nullopt, vocab_size);
  args.positions = positions;
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && token_ids.dim() == 2 &&
                      token_ids.size(0) == rows && token_ids.size(1) == positions,
                  "proxytune: token_ids has the wrong dtype or shape");
  const Tensor ids = torch::stable::contiguous(token_ids);
  args.token_ids = static_cast<const int64_t*>(ids.data_ptr());
  args.token_ids_row_stride = positions;
  args.logprobs = values_of<float>(logprobs, ScalarType::Float, rows * positions, "out");
  over_rows(rows * positions, vocab_size, false, [&](int64_t begin, int64_t end, void* workspace,
                                           const proxytune_parallel* parallel) {
    return proxytune_cpu_score(&args, begin, end, workspace, parallel);
  });
}

Tensor score(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor token_ids, Tensor alpha,
             int64_t vocab_size) {
  STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
  Tensor logprobs = empty(ScalarType::Float, base.size(0), base.size(1));
  score_out(base, expert, anti, token_ids, alpha, vocab_size, logprobs);
  return logprobs;
}

void verify_out(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor draft_token_ids,
                MaybeTensor draft_logits, PTK_PARAMS, PTK_CONSTRAINTS, int64_t mode,
                Tensor token_ids, Tensor num_accepted, Tensor logprobs, Tensor status) {
  STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
  const int64_t rows = base.size(0), positions = base.size(1);
  STD_TORCH_CHECK(positions >= 1 && draft_token_ids.scalar_type() == ScalarType::Long &&
                      draft_token_ids.dim() == 2 && draft_token_ids.size(0) == rows &&
                      draft_token_ids.size(1) == positions - 1,
                  "proxytune: draft_token_ids has the wrong dtype or shape");
  proxytune_verify_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES);
  args.params = params_of({temperature, top_k, top_p, min_p, filter_order, seed, position}, rows);
  args.num_drafts = positions - 1;
  args.mode = int32_t(mode);
  const Tensor drafts = torch::stable::contiguous(draft_token_ids);
  args.draft_token_ids = static_cast<const int64_t*>(drafts.data_ptr());
  args.draft_token_ids_row_stride = positions - 1;
  if (draft_logits) {
    args.draft_logits = logits_of(*draft_logits, rows, positions - 1, vocab_size, "draft_logits");
  }
  args.token_ids = values_of<int64_t>(token_ids, ScalarType::Long, rows * positions, "token_ids");
  args.num_accepted = values_of<int32_t>(num_accepted, ScalarType::Int, rows, "num_accepted");
  args.logprobs = values_of<float>(logprobs, ScalarType::Float, rows * positions, "logprobs");
  args.status = values_of<int32_t>(status, ScalarType::Int, rows, "status");
  const bool rejection = mode == PROXYTUNE_VERIFY_REJECTION;
  over_rows(rows, vocab_size, rejection, [&](int64_t begin, int64_t end, void* workspace,
                                           const proxytune_parallel* parallel) {
    return proxytune_cpu_verify(&args, begin, end, workspace, parallel);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> verify(Tensor base, MaybeTensor expert, MaybeTensor anti,
                                                  Tensor draft_token_ids, MaybeTensor draft_logits,
                                                  PTK_PARAMS, PTK_CONSTRAINTS, int64_t mode) {
  STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
  const int64_t rows = base.size(0), positions = base.size(1);
  Tensor token_ids = empty(ScalarType::Long, rows, positions);
  Tensor num_accepted = empty(ScalarType::Int, rows);
  Tensor logprobs = empty(ScalarType::Float, rows, positions);
  Tensor status = empty(ScalarType::Int, rows);
  verify_out(base, expert, anti, draft_token_ids, draft_logits, PTK_PARAM_VALUES,
             PTK_CONSTRAINT_VALUES, mode, token_ids, num_accepted, logprobs, status);
  return {token_ids, num_accepted, logprobs, status};
}

PyObject* isa(PyObject*, PyObject*) {
  const char* name = proxytune_cpu_isa();
  if (name) return PyUnicode_FromString(name);
  PyErr_SetString(PyExc_RuntimeError, proxytune_error(PROXYTUNE_ERROR_ISA));
  return nullptr;
}

PyObject* set_isa(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "z", &name)) return nullptr;
  if (proxytune_cpu_set_isa(name) != PROXYTUNE_OK) {
    return PyErr_Format(PyExc_ValueError,
                        "set_isa: name must be 'scalar', 'avx2' or 'avx512' and run on this "
                        "processor, got '%s'",
                        name);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Instruction set of the kernels in use."},
    {"set_isa", set_isa, METH_VARARGS, "Use this instruction set; None for the widest."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "CPU kernels.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(proxytune, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_out", TORCH_BOX(&sample_out));
  m.impl("sample_top", TORCH_BOX(&sample_top));
  m.impl("sample_top_out", TORCH_BOX(&sample_top_out));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_out", TORCH_BOX(&combine_out));
  m.impl("score", TORCH_BOX(&score));
  m.impl("score_out", TORCH_BOX(&score_out));
  m.impl("verify", TORCH_BOX(&verify));
  m.impl("verify_out", TORCH_BOX(&verify_out));
}

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
