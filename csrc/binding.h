// What the bindings share: tensors as arguments of the C API, and the operators `sample` and
// `verify` over any backend. Through torch's stable ABI: one build serves several versions.
//
// Schemas live in proxytune_kernels/ops/table.py. proxytune_kernels/ops/checks.py checks arguments, with
// messages for people; the checks here only keep direct callers of torch.ops in bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "common/params.h"
#include "include/proxytune.h"

namespace ptk::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t dtype_code(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return PROXYTUNE_F32;
  if (type == ScalarType::BFloat16) return PROXYTUNE_BF16;
  STD_TORCH_CHECK(type == ScalarType::Half, "proxytune: ", name,
                  " must be float32, bfloat16 or float16");
  return PROXYTUNE_F16;
}

inline proxytune_logits logits_of(const Tensor& t, int64_t rows, int64_t positions,
                                  int64_t vocab_size, const char* name) {
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

inline proxytune_inputs inputs_of(const Tensor& base, const MaybeTensor& expert,
                                  const MaybeTensor& anti, const Tensor& alpha,
                                  const MaybeTensor& bias, const MaybeTensor& allowed,
                                  int64_t vocab_size) {
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= kMaxVocabSize,
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

inline proxytune_params params_of(const ParamTensors& p, int64_t rows) {
  return {values_of<float>(p.temperature, ScalarType::Float, rows, "temperature"),
          values_of<int32_t>(p.top_k, ScalarType::Int, rows, "top_k"),
          values_of<float>(p.top_p, ScalarType::Float, rows, "top_p"),
          values_of<float>(p.min_p, ScalarType::Float, rows, "min_p"),
          values_of<int32_t>(p.filter_order, ScalarType::Int, rows, "filter_order"),
          values_of<int64_t>(p.seed, ScalarType::Long, rows, "seed"),
          values_of<int64_t>(p.position, ScalarType::Long, rows, "position")};
}

// A new tensor on the device of `like`, [rows] or [rows, columns]. Straight from the shim: going
// through the dispatcher costs as much again as the rest of a small call.
inline Tensor empty(const Tensor& like, ScalarType type, int64_t rows, int64_t columns = -1) {
  int32_t dtype = aoti_torch_dtype_float32();
  if (type == ScalarType::Long) dtype = aoti_torch_dtype_int64();
  if (type == ScalarType::Int) dtype = aoti_torch_dtype_int32();
  const int64_t sizes[] = {rows, columns}, strides[] = {columns < 0 ? 1 : columns, 1};
  const int32_t device_type =
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  const auto code = aoti_torch_empty_strided(columns < 0 ? 1 : 2, sizes, strides, dtype,
                                             device_type, like.get_device_index(), &handle);
  STD_TORCH_CHECK(code == 0, "proxytune: out of memory");
  return Tensor(handle);
}

struct SampleTensors {
  Tensor token_ids, logprobs, raw_logprobs, num_kept, status;
};

inline SampleTensors empty_sample(const Tensor& base) {
  const int64_t rows = base.size(0);
  return {empty(base, ScalarType::Long, rows), empty(base, ScalarType::Float, rows),
          empty(base, ScalarType::Float, rows), empty(base, ScalarType::Int, rows),
          empty(base, ScalarType::Int, rows)};
}

inline proxytune_sample_args sample_args(const Tensor& base, const MaybeTensor& expert,
                                         const MaybeTensor& anti, const Tensor& alpha,
                                         const ParamTensors& params, const MaybeTensor& bias,
                                         const MaybeTensor& allowed, int64_t vocab_size,
                                         int64_t stream, const SampleTensors& out) {
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
inline void check_num_top(int64_t num_top) {
  STD_TORCH_CHECK(num_top >= 1 && num_top <= PROXYTUNE_MAX_TOP,
                  "proxytune: num_top must be in [1, 128], got ", num_top);
}

inline void add_top(proxytune_sample_args& args, int64_t rows, int64_t num_top,
                    const Tensor& top_token_ids, const Tensor& top_logprobs) {
  args.num_top = int32_t(num_top);
  args.top_token_ids =
      values_of<int64_t>(top_token_ids, ScalarType::Long, rows * num_top, "top_token_ids");
  args.top_logprobs =
      values_of<float>(top_logprobs, ScalarType::Float, rows * num_top, "top_logprobs");
}

#define PTK_PARAMS                                                            \
  Tensor alpha, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, \
      Tensor filter_order, Tensor seed, Tensor position
#define PTK_PARAM_VALUES alpha, temperature, top_k, top_p, min_p, filter_order, seed, position
#define PTK_CONSTRAINTS MaybeTensor bias, MaybeTensor allowed_mask, int64_t vocab_size
#define PTK_CONSTRAINT_VALUES bias, allowed_mask, vocab_size

#define PTK_SAMPLE \
  Tensor base, MaybeTensor expert, MaybeTensor anti, PTK_PARAMS, PTK_CONSTRAINTS, int64_t stream
#define PTK_SAMPLE_VALUES                                                                       \
  base, expert, anti, alpha, {temperature, top_k, top_p, min_p, filter_order, seed, position}, \
      bias, allowed_mask, vocab_size, stream
#define PTK_SAMPLE_OUTPUTS \
  Tensor token_ids, Tensor logprobs, Tensor raw_logprobs, Tensor num_kept, Tensor status
#define PTK_SAMPLE_OUTPUT_VALUES token_ids, logprobs, raw_logprobs, num_kept, status

// The operators over a backend, which has
//   static void check_devices(const Tensor& base, const Others&... others);
//   static void sample(const proxytune_sample_args& args, const Tensor& base);
//   static void verify(const proxytune_verify_args& args, const Tensor& base);
// where base.size(0) is the number of rows.
template <typename Backend>
struct Operators {
  using Results5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Results7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Results4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static void sample_out(PTK_SAMPLE, PTK_SAMPLE_OUTPUTS) {
    Backend::check_devices(base, expert, anti, PTK_PARAM_VALUES, bias, allowed_mask,
                           PTK_SAMPLE_OUTPUT_VALUES);
    Backend::sample(sample_args(PTK_SAMPLE_VALUES, {PTK_SAMPLE_OUTPUT_VALUES}), base);
  }

  static Results5 sample(PTK_SAMPLE) {
    Backend::check_devices(base, expert, anti, PTK_PARAM_VALUES, bias, allowed_mask);
    const SampleTensors out = empty_sample(base);
    Backend::sample(sample_args(PTK_SAMPLE_VALUES, out), base);
    return {out.token_ids, out.logprobs, out.raw_logprobs, out.num_kept, out.status};
  }

  static void sample_top_out(PTK_SAMPLE, int64_t num_top, PTK_SAMPLE_OUTPUTS, Tensor top_token_ids,
                             Tensor top_logprobs) {
    check_num_top(num_top);
    Backend::check_devices(base, expert, anti, PTK_PARAM_VALUES, bias, allowed_mask,
                           PTK_SAMPLE_OUTPUT_VALUES, top_token_ids, top_logprobs);
    proxytune_sample_args args = sample_args(PTK_SAMPLE_VALUES, {PTK_SAMPLE_OUTPUT_VALUES});
    add_top(args, base.size(0), num_top, top_token_ids, top_logprobs);
    Backend::sample(args, base);
  }

  static Results7 sample_top(PTK_SAMPLE, int64_t num_top) {
    check_num_top(num_top);
    Backend::check_devices(base, expert, anti, PTK_PARAM_VALUES, bias, allowed_mask);
    const int64_t rows = base.size(0);
    const SampleTensors out = empty_sample(base);
    const Tensor top_token_ids = empty(base, ScalarType::Long, rows, num_top);
    const Tensor top_logprobs = empty(base, ScalarType::Float, rows, num_top);
    proxytune_sample_args args = sample_args(PTK_SAMPLE_VALUES, out);
    add_top(args, rows, num_top, top_token_ids, top_logprobs);
    Backend::sample(args, base);
    return {out.token_ids, out.logprobs,  out.raw_logprobs, out.num_kept,
            out.status,    top_token_ids, top_logprobs};
  }

  static void verify_out(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor draft_token_ids,
                         MaybeTensor draft_logits, PTK_PARAMS, PTK_CONSTRAINTS, int64_t mode,
                         Tensor token_ids, Tensor num_accepted, Tensor logprobs, Tensor status) {
    STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
    const int64_t rows = base.size(0), positions = base.size(1);
    STD_TORCH_CHECK(positions >= 1 && draft_token_ids.scalar_type() == ScalarType::Long &&
                        draft_token_ids.dim() == 2 && draft_token_ids.size(0) == rows &&
                        draft_token_ids.size(1) == positions - 1,
                    "proxytune: draft_token_ids has the wrong dtype or shape");
    Backend::check_devices(base, expert, anti, draft_token_ids, draft_logits, PTK_PARAM_VALUES,
                           bias, allowed_mask, token_ids, num_accepted, logprobs, status);
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
    Backend::verify(args, base);
  }

  static Results4 verify(Tensor base, MaybeTensor expert, MaybeTensor anti, Tensor draft_token_ids,
                         MaybeTensor draft_logits, PTK_PARAMS, PTK_CONSTRAINTS, int64_t mode) {
    STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
    const int64_t rows = base.size(0), positions = base.size(1);
    Tensor token_ids = empty(base, ScalarType::Long, rows, positions);
    Tensor num_accepted = empty(base, ScalarType::Int, rows);
    Tensor logprobs = empty(base, ScalarType::Float, rows, positions);
    Tensor status = empty(base, ScalarType::Int, rows);
    verify_out(base, expert, anti, draft_token_ids, draft_logits, PTK_PARAM_VALUES,
               PTK_CONSTRAINT_VALUES, mode, token_ids, num_accepted, logprobs, status);
    return {token_ids, num_accepted, logprobs, status};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("sample", TORCH_BOX(&sample));
    m.impl("sample_out", TORCH_BOX(&sample_out));
    m.impl("sample_top", TORCH_BOX(&sample_top));
    m.impl("sample_top_out", TORCH_BOX(&sample_top_out));
    m.impl("verify", TORCH_BOX(&verify));
    m.impl("verify_out", TORCH_BOX(&verify_out));
  }
};

}  // namespace ptk::binding
