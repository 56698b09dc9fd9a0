// Registers the CPU kernels with torch.
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "binding.h"
#include "cpu/amx.h"

namespace {

using namespace ptk::binding;

struct Workspace {
  void* data;
  size_t size;
};

// A thread's workspace, kept between calls: fresh pages would cost more than the kernel. It holds
// one or two fp32 rows of the widest vocabulary the thread has seen.
Workspace thread_workspace(int64_t vocab_size, bool rejection) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t capacity = 0;
  const size_t size = proxytune_cpu_workspace_size(vocab_size, rejection);
  if (size > capacity) {
    memory.reset(std::aligned_alloc(64, size));
    capacity = memory ? size : 0;
  }
  return {memory.get(), capacity};
}

void check_code(int code) {
  STD_TORCH_CHECK(code == PROXYTUNE_OK, "proxytune: ", proxytune_error(code));
}

// at::parallel_for in the form the C API takes.
void run_chunks(void*, int64_t chunks, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, chunks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

// Rows narrower than this are not worth waking threads for.
constexpr int64_t kParallelVocabSize = 16384;

// call(begin, end), a call of the C API, for parts of [0, count) on torch's threads. An error must not leave a
// worker thread as an exception.
template <typename Call>
void in_parallel(int64_t count, Call call) {
  std::atomic<int> code{PROXYTUNE_OK};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const int result = call(begin, end);
    if (result != PROXYTUNE_OK) code.store(result, std::memory_order_relaxed);
  });
  check_code(code);
}

// Rows over torch's threads; where there are fewer rows than threads, each row over all of them.
template <typename Call>
void over_rows(int64_t rows, int64_t vocab_size, bool rejection, Call call) {
  if (rows == 0) return;  // an empty tensor's pointer is null, which the C API refuses
  const int64_t threads = torch::stable::get_num_threads();
  if (rows < threads && vocab_size >= kParallelVocabSize) {
    const proxytune_parallel parallel{run_chunks, nullptr, int(threads)};
    return check_code(call(0, rows, thread_workspace(vocab_size, rejection), &parallel));
  }
  in_parallel(rows, [&](int64_t begin, int64_t end) {
    return call(begin, end, thread_workspace(vocab_size, rejection), nullptr);
  });
}

struct Cpu {
  // The dispatcher comes here where no tensor is on another device.
  template <typename... Others>
  static void check_devices(const Tensor&, const Others&...) {}

  static void sample(const proxytune_sample_args& args, const Tensor& base) {
    over_rows(base.size(0), args.inputs.vocab_size, false,
              [&](int64_t begin, int64_t end, Workspace workspace, const proxytune_parallel* parallel) {
                return proxytune_cpu_sample(&args, begin, end, workspace.data, workspace.size, parallel);
              });
  }

  static void verify(const proxytune_verify_args& args, const Tensor& base) {
    const bool rejection = args.mode == PROXYTUNE_VERIFY_REJECTION;
    over_rows(base.size(0), args.inputs.vocab_size, rejection,
              [&](int64_t begin, int64_t end, Workspace workspace, const proxytune_parallel* parallel) {
                return proxytune_cpu_verify(&args, begin, end, workspace.data, workspace.size, parallel);
              });
  }
};

void combine_out(PTK_LOGITS, Tensor alpha, PTK_CONSTRAINTS, Tensor x) {
  const int64_t rows = base.size(0);
  STD_TORCH_CHECK(base.dim() == 2, "proxytune: base has the wrong shape");
  proxytune_combine_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES);
  args.x = values_of<float>(x, rows * vocab_size, "out");
  args.x_row_stride = vocab_size;
  Arguments(args.inputs, rows, 1).write({"x", args.x, rows * vocab_size * 4});
  in_parallel(rows, [&](int64_t begin, int64_t end) { return proxytune_cpu_combine(&args, begin, end); });
}

Tensor combine(PTK_LOGITS, Tensor alpha, PTK_CONSTRAINTS) {
  Tensor x = new_tensor(base, ScalarType::Float, base.size(0), vocab_size);
  combine_out(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES, x);
  return x;
}

void score_out(PTK_LOGITS, Tensor token_ids, Tensor alpha,
               int64_t vocab_size, Tensor logprobs) {
  STD_TORCH_CHECK(base.dim() == 3 && base.size(1) >= 1, "proxytune: base has the wrong shape");
  const int64_t rows = base.size(0), positions = base.size(1);
  proxytune_score_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, std::nullopt, std::nullopt, std::nullopt, std::nullopt, vocab_size);
  args.positions = positions;
  STD_TORCH_CHECK(positions >= 1, "proxytune: base must have at least one position");
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && token_ids.dim() == 2 &&
                      token_ids.size(0) == rows && token_ids.size(1) == positions,
                  "proxytune: token_ids has the wrong dtype or shape");
  const Tensor ids = torch::stable::contiguous(token_ids);
  args.token_ids = static_cast<const int64_t*>(ids.data_ptr());
  args.token_ids_row_stride = positions;
  args.logprobs = values_of<float>(logprobs, rows * positions, "out");
  Arguments held(args.inputs, rows, positions);
  held.add({"token_ids", args.token_ids, rows * positions * 8});
  held.write({"logprobs", args.logprobs, rows * positions * 4});
  over_rows(rows * positions, vocab_size, false,
            [&](int64_t begin, int64_t end, Workspace workspace, const proxytune_parallel* parallel) {
              return proxytune_cpu_score(&args, begin, end, workspace.data, workspace.size, parallel);
            });
}

Tensor score(PTK_LOGITS, Tensor token_ids, Tensor alpha,
             int64_t vocab_size) {
  STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
  Tensor logprobs = new_tensor(base, ScalarType::Float, base.size(0), base.size(1));
  score_out(base, expert, anti, token_ids, alpha, vocab_size, logprobs);
  return logprobs;
}

// Tokens that a thread takes at once: enough for its weights to be worth the hand-over.
constexpr int64_t kHeadTokens = 192;

void head_logits_out(Tensor hidden, Tensor weight, int64_t begin, int64_t end, Tensor logits) {
  STD_TORCH_CHECK(hidden.dim() == 2, "proxytune: hidden has the wrong shape");
  const int64_t rows = hidden.size(0), size = hidden.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == size && size > 0 &&
                      (weight.stride(1) == 1 || size == 1),
                  "proxytune: weight has the wrong shape, or is not contiguous in its last dimension");
  STD_TORCH_CHECK(0 <= begin && begin < end && end <= weight.size(0),
                  "proxytune: tokens must be in [0, ", weight.size(0), "], got ", begin, " to ", end);
  const int64_t tokens = end - begin;
  proxytune_head_logits_args args{};
  args.hidden = values_of<float>(hidden, rows * size, "hidden");
  args.hidden_row_stride = size;
  args.rows = rows;
  args.size = size;
  args.weight = {weight.data_ptr(), weight.stride(0), 0, dtype_code(weight, "weight")};
  float* const out = values_of<float>(logits, rows * tokens, "logits");
  const Memory read{"hidden", args.hidden, rows * size * 4}, written{"logits", out, rows * tokens * 4};
  STD_TORCH_CHECK(!read.meets(written) && !memory_of("weight", args.weight, weight.size(0), 1, size).meets(written),
                  "proxytune: logits must not overlap hidden or weight in memory");
  args.logits_row_stride = tokens;
  if (rows == 0) return;
  const int64_t panels = (tokens + kHeadTokens - 1) / kHeadTokens;
  in_parallel(panels, [&](int64_t first, int64_t last) {
    proxytune_head_logits_args own = args;
    own.logits = out + first * kHeadTokens;
    return proxytune_cpu_head_logits(&own, begin + first * kHeadTokens,
                                     std::min(begin + last * kHeadTokens, end));
  });
}

// Rows bf16 [T, K] by AMX, times weights of a kind; y of its own.
template <typename Kind>
Tensor by_tiles(const Tensor& rows, const Tensor& weight, const Tensor& scales) {
  const int64_t count = rows.size(0), inputs = rows.size(1), outputs = weight.size(0);
  Tensor y = new_tensor(rows, ScalarType::BFloat16, count, outputs);
  if (count == 0 || outputs == 0) return y;
  Tensor packed = new_tensor(rows, ScalarType::Int, Kind::words(count, inputs));
  auto* const x = static_cast<uint32_t*>(packed.data_ptr());
  Kind::pack(static_cast<const uint16_t*>(rows.data_ptr()), count, inputs, x);
  torch::stable::parallel_for(0, (outputs + Kind::kPanel - 1) / Kind::kPanel, 128 / Kind::kPanel,
                              [&](int64_t begin, int64_t end) {
    Kind::linear(weight.data_ptr(), static_cast<const uint16_t*>(scales.data_ptr()), outputs, inputs, x, count,
                 static_cast<uint16_t*>(y.data_ptr()), begin, end);
  });
  return y;
}

// Rows fp32 [T, K] times weights int8; y of its own.
Tensor by_vectors(const Tensor& rows, const Tensor& weight, const Tensor& scales) {
  const int64_t count = rows.size(0), inputs = rows.size(1), outputs = weight.size(0);
  Tensor y = new_tensor(rows, ScalarType::Float, count, outputs);
  if (count == 0 || outputs == 0) return y;
  const ptk::Kernels* const kernels = ptk::current_kernels();
  check_code(kernels ? PROXYTUNE_OK : PROXYTUNE_ERROR_ISA);
  ptk::Int8LinearArgs args{};
  args.hidden = static_cast<const float*>(rows.data_ptr());
  args.hidden_row_stride = args.size = inputs;
  args.rows = count;
  args.weight = {weight.data_ptr(), inputs, 0, 0};
  args.scales = scales.data_ptr();
  args.scale_dtype = dtype_code(scales, "scales");
  args.logits_row_stride = outputs;
  float* const out = static_cast<float*>(y.data_ptr());
  constexpr int64_t kPart = 48;  // outputs that a thread takes at once, of 24 in blocks
  torch::stable::parallel_for(0, (outputs + kPart - 1) / kPart, 1, [&](int64_t first, int64_t last) {
    ptk::Int8LinearArgs own = args;
    own.logits = out + first * kPart;
    kernels->int8_linear(own, first * kPart, std::min(last * kPart, outputs));
  });
  return y;
}

// Rows [T, K], bf16 by AMX or fp32 by vectors, times weights int8 [N, K] with scales [N, groups of K]; by AMX also int4,
// as uint8 [N, K / 2] with scales and zeros [K / 32, N, 2].
Tensor packed_linear(Tensor rows, Tensor weight, Tensor scales) {
  using namespace ptk::amx;
  const bool tiles = rows.scalar_type() == ScalarType::BFloat16, int4 = weight.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(!tiles || available(), "proxytune: packed_linear of bfloat16 needs a processor with AMX");
  STD_TORCH_CHECK((tiles ? scales.scalar_type() == ScalarType::BFloat16 : rows.scalar_type() == ScalarType::Float) &&
                      ((tiles && int4) || weight.scalar_type() == ScalarType::Char),
                  "proxytune: rows must be float32 and weight int8; or rows and scales bfloat16, weight int8 or uint8");
  STD_TORCH_CHECK(rows.dim() == 2 && weight.dim() == 2 && scales.dim() == (int4 ? 3 : 2),
                  "proxytune: rows, weight and scales must have 2 dimensions (int4's scales 3)");
  const int64_t inputs = rows.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(inputs > 0 && weight.size(1) * (int4 ? 2 : 1) == inputs && scales.size(int4 ? 1 : 0) == outputs &&
                      (int4 ? scales.size(0) * kGroup == inputs && scales.size(2) == 2
                            : scales.size(1) == ptk::int8_groups(inputs)),
                  "proxytune: rows, weight and scales must have shapes [T, K], K > 0, [N, K] and [N, K / ", ptk::kInt8Group,
                  " rounded up], for int4 [T, K], [N, K / 2] and [K / ", kGroup, ", N, 2]");
  STD_TORCH_CHECK(!tiles || (inputs % kInputs == 0 && outputs % (int4 ? Int4::kPanel : 1) == 0),
                  "proxytune: K must be a multiple of ", kInputs, ", for int4 N one of ", Int4::kPanel);
  STD_TORCH_CHECK(rows.is_contiguous() && weight.is_contiguous() && scales.is_contiguous(),
                  "proxytune: rows, weight and scales must be contiguous");
  if (!tiles) return by_vectors(rows, weight, scales);
  return int4 ? by_tiles<Int4>(rows, weight, scales) : by_tiles<Int8>(rows, weight, scales);
}

PyObject* has_amx(PyObject*, PyObject*) { return PyBool_FromLong(ptk::amx::available()); }

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
                        "set_isa: name must be 'scalar', 'avx2', 'avx512' or 'neon' and run on this "
                        "processor, got '%s'",
                        name);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Instruction set of the kernels in use."},
    {"set_isa", set_isa, METH_VARARGS, "Use this instruction set; None for the widest."},
    {"has_amx", has_amx, METH_NOARGS, "Whether packed_linear takes bfloat16 here."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "CPU kernels.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(proxytune, CPU, m) {
  Operators<Cpu>::implement(m);
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_out", TORCH_BOX(&combine_out));
  m.impl("score", TORCH_BOX(&score));
  m.impl("score_out", TORCH_BOX(&score_out));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("head_logits_out", TORCH_BOX(&head_logits_out));
}

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
