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

#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/target.h"
#include "include/proxytune.h"

namespace ptk::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The arguments that schemas have in common, as parameters and as values.
#define PTK_LOGITS const Tensor &base, const MaybeTensor &expert, const MaybeTensor &anti
#define PTK_PARAM_TENSOR(type, name, fallback) const Tensor& name
#define PTK_PARAM_NAME(type, name, fallback) name
#define PTK_PARAMS const Tensor &alpha, PTK_EACH_PARAM(PTK_PARAM_TENSOR)
#define PTK_PARAM_VALUES alpha, PTK_EACH_PARAM(PTK_PARAM_NAME)
#define PTK_CONSTRAINTS                                                                    \
  const MaybeTensor &bias, const MaybeTensor &allowed_mask, const MaybeTensor &entries,  \
      const MaybeTensor &penalties, int64_t vocab_size
#define PTK_CONSTRAINT_TENSORS bias, allowed_mask, entries, penalties
#define PTK_CONSTRAINT_VALUES PTK_CONSTRAINT_TENSORS, vocab_size
#define PTK_SAMPLE PTK_LOGITS, PTK_PARAMS, PTK_CONSTRAINTS, int64_t noise_stream, int64_t top_logprobs, \
                   const MaybeTensor &attributed
#define PTK_SAMPLE_VALUES \
  base, expert, anti, PTK_PARAM_VALUES, PTK_CONSTRAINT_VALUES, noise_stream, top_logprobs, attributed
#define PTK_VERIFY                                                                              \
  PTK_LOGITS, const Tensor &draft_token_ids, const MaybeTensor &draft_logits, PTK_PARAMS,       \
      PTK_CONSTRAINTS, int64_t verify_mode
#define PTK_VERIFY_VALUES(drafts) \
  base, expert, anti, drafts, draft_logits, PTK_PARAM_VALUES, PTK_CONSTRAINT_VALUES, verify_mode

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
constexpr ScalarType kTypeOf = std::is_same_v<T, float>     ? ScalarType::Float
                               : std::is_same_v<T, int64_t> ? ScalarType::Long
                                                            : ScalarType::Int;

template <typename T>
T* values_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == kTypeOf<T> && t.numel() == count && t.is_contiguous(),
                  "proxytune: ", name, " has the wrong dtype or shape, or is not contiguous");
  return static_cast<T*>(t.data_ptr());
}

// The address of a bias or mask, null where there is none, with its stride for each row and position.
template <typename T>
const T* constraint_of(const MaybeTensor& t, int64_t rows, int64_t positions, int64_t width,
                       const char* name, int64_t& row_stride, int64_t& position_stride) {
  if (!t) return nullptr;
  const int64_t last = t->dim() - 1;
  STD_TORCH_CHECK(t->scalar_type() == kTypeOf<T> && (last == 1 || last == 2) && t->size(0) == rows &&
                      (last == 1 ? positions == 1 : t->size(1) == positions) &&
                      t->size(last) == width && (t->stride(last) == 1 || width <= 1),
                  "proxytune: ", name, " has the wrong dtype or shape");
  row_stride = t->stride(0);
  position_stride = last == 2 ? t->stride(1) : 0;
  return static_cast<const T*>(t->data_ptr());
}

inline proxytune_inputs inputs_of(PTK_LOGITS, const Tensor& alpha, PTK_CONSTRAINTS) {
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
  in.alpha = values_of<float>(alpha, rows, "alpha");
  in.bias = constraint_of<float>(bias, rows, positions, vocab_size, "bias", in.bias_row_stride,
                                 in.bias_position_stride);
  in.allowed = reinterpret_cast<const uint32_t*>(
      constraint_of<int32_t>(allowed_mask, rows, positions, (vocab_size + 31) / 32, "allowed_mask",
                             in.allowed_row_stride, in.allowed_position_stride));
  if (entries) {
    const int64_t last = entries->dim() - 1;
    STD_TORCH_CHECK(last >= 2 && entries->size(last) == 4, "proxytune: edits.entries has the wrong shape");
    in.num_edits = entries->size(last - 1);
    in.edits = reinterpret_cast<const proxytune_edit*>(
        values_of<int32_t>(*entries, rows * positions * in.num_edits * 4, "edits.entries"));
    in.edits_position_stride = in.num_edits;
    in.edits_row_stride = positions * in.num_edits;
  }
  if (penalties) in.penalties = values_of<float>(*penalties, rows * 3, "edits.penalties");
  return in;
}

// A call's numbers of columns, by Result::columns: 1 for results that have none.
using Columns = std::array<int64_t, 3>;

// An argument's memory: pieces of `bytes`, at each row and position. data null: there is no such argument.
struct Memory {
  const char* name;
  const void* data;
  int64_t bytes;
  int64_t row_step = 0, position_step = 0;  // in bytes
  int64_t rows = 1, positions = 1;

  // Whether one of its pieces shares a byte with another argument's only piece.
  bool meets(const Memory& other) const {
    const auto *first = static_cast<const char*>(data), *begin = static_cast<const char*>(other.data);
    if (!first || !begin || bytes == 0 || other.bytes == 0) return false;
    const char *last = first + (rows - 1) * row_step + (positions - 1) * position_step + bytes;
    const char *end = begin + other.bytes;
    if (last <= begin || end <= first) return false;
    for (int64_t i = 0; i < rows * positions; ++i) {
      const char* piece = first + i / positions * row_step + i % positions * position_step;
      if (piece < end && begin < piece + bytes) return true;
    }
    return false;
  }
};

inline Memory memory_of(const char* name, const proxytune_logits& l, int64_t rows, int64_t positions,
                        int64_t width) {
  const int64_t size = l.dtype == PROXYTUNE_F32 ? 4 : 2;
  return {name, l.data, width * size, l.row_stride * size, l.position_stride * size, rows, positions};
}

// A call's memory, argument after argument: what is written shares none with what came before.
class Arguments {
 public:
  Arguments(const proxytune_inputs& in, int64_t rows, int64_t positions) : rows_(rows) {
    const int64_t width = in.vocab_size, words = (width + 31) / 32;
    add(memory_of("base", in.base, rows, positions, width));
    add(memory_of("expert", in.expert, rows, positions, width));
    add(memory_of("anti", in.anti, rows, positions, width));
    add({"alpha", in.alpha, rows * 4});
    add({"bias", in.bias, width * 4, in.bias_row_stride * 4, in.bias_position_stride * 4, rows, positions});
    add({"allowed_mask", in.allowed, words * 4, in.allowed_row_stride * 4, in.allowed_position_stride * 4, rows,
         positions});
    add({"edits.entries", in.edits, in.edits ? rows * positions * in.num_edits * 16 : 0});
    add({"edits.penalties", in.penalties, rows * 12});
  }
  explicit Arguments(const proxytune_sample_args& args, int64_t rows) : Arguments(args.inputs, rows, 1) {
    add(args.params);
    add({"attributed", args.attributed, rows * 8});
  }
  Arguments(const proxytune_verify_args& args, int64_t rows) : Arguments(args.inputs, rows, args.num_drafts + 1) {
    add(args.params);
    add({"draft_token_ids", args.draft_token_ids, rows * args.num_drafts * 8});
    add(memory_of("draft_logits", args.draft_logits, rows, args.num_drafts, args.inputs.vocab_size));
  }

  void add(const Memory& read) { held_[count_++] = read; }

  void write(const Memory& written) {
    for (size_t i = 0; i < count_; ++i) {
      STD_TORCH_CHECK(!held_[i].meets(written), "proxytune: ", written.name, " must not overlap ", held_[i].name,
                      " in memory");
    }
    add(written);
  }

  // The results that the caller owns.
  template <typename... Results, typename Args>
  void write(const std::tuple<Results...>& results, const Args& args, const Columns& columns) {
    const auto bytes = [&](const auto& result) {
      return int64_t(sizeof(*(args.*result.field))) * rows_ * columns[result.columns];
    };
    std::apply(
        [&](const Results&... each) { (write({each.name, args.*each.field, bytes(each)}), ...); }, results);
  }

 private:
  void add(const proxytune_params& params) {
#define PTK_ADD_PARAM(type, name, fallback) add({#name, params.name, rows_ * int64_t(sizeof(type))})
    PTK_EACH_PARAM(PTK_ADD_PARAM);
#undef PTK_ADD_PARAM
  }

  int64_t rows_;
  std::array<Memory, 26> held_;
  size_t count_ = 0;
};

inline proxytune_params params_of(int64_t rows, PTK_PARAMS) {
#define PTK_PARAM_ADDRESS(type, name, fallback) values_of<type>(name, rows, #name)
  return {PTK_EACH_PARAM(PTK_PARAM_ADDRESS)};
#undef PTK_PARAM_ADDRESS
}

// Before it becomes 32 bits.
inline void check_stream(int64_t noise_stream) {
  STD_TORCH_CHECK(noise_stream >= 0 && noise_stream <= int64_t(kStreamBonus),
                  "proxytune: noise_stream is out of range");
}

inline proxytune_sample_args sample_args(PTK_SAMPLE) {
  STD_TORCH_CHECK(base.dim() == 2, "proxytune: base has the wrong shape");
  STD_TORCH_CHECK(top_logprobs >= 0 && top_logprobs <= PROXYTUNE_MAX_TOP,
                  "proxytune: top_logprobs must be in [0, 128], got ", top_logprobs);
  check_stream(noise_stream);
  proxytune_sample_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES);
  args.params = params_of(base.size(0), PTK_PARAM_VALUES);
  args.noise_stream = int32_t(noise_stream);
  args.num_top = int32_t(top_logprobs);
  if (attributed) args.attributed = values_of<int64_t>(*attributed, base.size(0), "attributed");
  return args;
}

inline proxytune_verify_args verify_args(PTK_VERIFY) {
  STD_TORCH_CHECK(base.dim() == 3, "proxytune: base has the wrong shape");
  STD_TORCH_CHECK(verify_mode == kVerifyCoupled || verify_mode == kVerifyRejection,
                  "proxytune: verify_mode must be 0 or 1, got ", verify_mode);
  const int64_t rows = base.size(0), positions = base.size(1);
  STD_TORCH_CHECK(positions >= 1 && draft_token_ids.dim() == 2 && draft_token_ids.size(0) == rows &&
                      draft_token_ids.size(1) == positions - 1,
                  "proxytune: draft_token_ids has the wrong dtype or shape");
  proxytune_verify_args args{};
  args.inputs = inputs_of(base, expert, anti, alpha, PTK_CONSTRAINT_VALUES);
  args.params = params_of(rows, PTK_PARAM_VALUES);
  args.num_drafts = positions - 1;
  args.mode = int32_t(verify_mode);
  args.draft_token_ids = values_of<int64_t>(draft_token_ids, rows * (positions - 1), "draft_token_ids");
  args.draft_token_ids_row_stride = positions - 1;
  if (draft_logits) {
    args.draft_logits = logits_of(*draft_logits, rows, positions - 1, vocab_size, "draft_logits");
  }
  return args;
}

struct DeleteTensor {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
using NewTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// A new tensor on the device of `like`, [rows] or [rows, columns]. Straight from the shim: going
// through the dispatcher costs as much again as the rest of a small call.
inline NewTensor empty(const Tensor& like, ScalarType type, int64_t rows, int64_t columns = -1) {
  int32_t dtype = aoti_torch_dtype_float32();
  if (type == ScalarType::Long) dtype = aoti_torch_dtype_int64();
  if (type == ScalarType::Int) dtype = aoti_torch_dtype_int32();
  if (type == ScalarType::BFloat16) dtype = aoti_torch_dtype_bfloat16();
  const int64_t sizes[] = {rows, columns}, strides[] = {columns < 0 ? 1 : columns, 1};
  const int32_t device_type =
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  const auto code = aoti_torch_empty_strided(columns < 0 ? 1 : 2, sizes, strides, dtype,
                                             device_type, like.get_device_index(), &handle);
  STD_TORCH_CHECK(code == 0, "proxytune: out of memory");
  return NewTensor(handle);
}

inline Tensor new_tensor(const Tensor& like, ScalarType type, int64_t rows, int64_t columns = -1) {
  return Tensor(empty(like, type, rows, columns).release());
}

template <typename Args, typename T, bool kOptional>
NewTensor allocate(const Result<T* Args::*, kOptional>& result, Args& args, const Tensor& like,
                   int64_t rows, const Columns& columns) {
  NewTensor made = empty(like, kTypeOf<T>, rows, result.columns ? columns[result.columns] : -1);
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(made.get(), &data));
  // An empty tensor's address may be anything.
  args.*result.field = columns[result.columns] ? static_cast<T*>(data) : nullptr;
  return made;
}

template <typename Args, typename T>
void attach(const Result<T* Args::*>& result, Args& args, const Tensor& given, int64_t rows,
            const Columns& columns) {
  args.*result.field = values_of<T>(given, rows * columns[result.columns], result.name);
}

template <typename Args, typename T>
void attach(const Result<T* Args::*, true>& result, Args& args, const MaybeTensor& given, int64_t rows,
            const Columns& columns) {
  const int64_t own = columns[result.columns];
  STD_TORCH_CHECK(given || own == 0, "proxytune: ", result.name, " must be given");
  if (own > 0) args.*result.field = values_of<T>(*given, rows * own, result.name);
}

template <size_t kCount>
using NewTensors = std::array<NewTensor, kCount>;

template <typename... Results, typename Args>
NewTensors<sizeof...(Results)> allocate(const std::tuple<Results...>& results, Args& args,
                                        const Tensor& like, int64_t rows, const Columns& columns) {
  return std::apply(
      [&](const Results&... each) {
        return NewTensors<sizeof...(Results)>{allocate(each, args, like, rows, columns)...};
      },
      results);
}

template <typename... Results, typename Args, typename... Tensors>
void attach(const std::tuple<Results...>& results, Args& args, int64_t rows, const Columns& columns,
            const Tensors&... given) {
  std::apply([&](const Results&... each) { (attach(each, args, given, rows, columns), ...); }, results);
}

// A function that returns new tensors, as torch calls it. They are handed over as they are: TORCH_BOX would
// make two more handles for each.
template <auto kFunction>
struct Boxed;
template <size_t kCount, typename... Args, NewTensors<kCount> (*kFunction)(Args...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
    STD_TORCH_CHECK(num_args == sizeof...(Args) && num_outputs == kCount,
                    "proxytune: the schema is another version's");
    const auto args = torch::stable::detail::unbox_to_tuple<std::remove_cvref_t<Args>...>(stack);
    NewTensors<kCount> results = std::apply(kFunction, args);
    for (size_t i = 0; i < kCount; ++i) stack[i] = torch::stable::detail::from(results[i].release());
  }
};

// The operators over a backend, which has
//   static void check_devices(const Tensor& base, const Others&... others);
//   static void sample(const proxytune_sample_args& args, const Tensor& base);
//   static void verify(const proxytune_verify_args& args, const Tensor& base);
// where base.size(0) is the number of rows.
template <typename Backend>
class Operators {
 public:
  static void implement(torch::stable::detail::StableLibrary& m) {
    implement(m, kSampleResults, kVerifyResults);
  }

 private:
  template <typename... SampleResults, typename... VerifyResults>
  static void implement(torch::stable::detail::StableLibrary& m, const std::tuple<SampleResults...>&,
                        const std::tuple<VerifyResults...>&) {
    m.impl("sample", &Boxed<&sample>::call);
    m.impl("sample_out", TORCH_BOX((&sample_out<SampleResults...>)));
    m.impl("verify", &Boxed<&verify>::call);
    m.impl("verify_out", TORCH_BOX((&verify_out<VerifyResults...>)));
  }

  static Columns sample_columns(int64_t top_logprobs, const MaybeTensor& attributed) {
    return {1, top_logprobs, attributed ? int64_t(PROXYTUNE_ATTRIBUTION) : 0};
  }

  static auto sample(PTK_SAMPLE) {
    Backend::check_devices(base, expert, anti, PTK_PARAM_VALUES, PTK_CONSTRAINT_TENSORS, attributed);
    proxytune_sample_args args = sample_args(PTK_SAMPLE_VALUES);
    auto results = allocate(kSampleResults, args, base, base.size(0), sample_columns(top_logprobs, attributed));
    Backend::sample(args, base);
    return results;
  }

  template <typename Result>
  struct Given {
    using Type = Tensor;
  };
  template <typename Field>
  struct Given<Result<Field, true>> {
    using Type = MaybeTensor;
  };
  template <typename Result>
  using ResultTensor = typename Given<Result>::Type;

  template <typename... Results>
  static void sample_out(PTK_SAMPLE, const ResultTensor<Results>&... results) {
    Backend::check_devices(base, expert, anti, PTK_PARAM_VALUES, PTK_CONSTRAINT_TENSORS, attributed, results...);
    proxytune_sample_args args = sample_args(PTK_SAMPLE_VALUES);
    const Columns columns = sample_columns(top_logprobs, attributed);
    attach(kSampleResults, args, base.size(0), columns, results...);
    Arguments(args, base.size(0)).write(kSampleResults, args, columns);
    Backend::sample(args, base);
  }

  // The drafts are copied where they are not contiguous.
  static auto verify(PTK_VERIFY) {
    Backend::check_devices(base, expert, anti, draft_token_ids, draft_logits, PTK_PARAM_VALUES,
                           PTK_CONSTRAINT_TENSORS);
    const Tensor drafts = torch::stable::contiguous(draft_token_ids);
    proxytune_verify_args args = verify_args(PTK_VERIFY_VALUES(drafts));
    auto results = allocate(kVerifyResults, args, base, base.size(0), {1, base.size(1), 0});
    Backend::verify(args, base);
    return results;
  }

  template <typename... Results>
  static void verify_out(PTK_VERIFY, const ResultTensor<Results>&... results) {
    Backend::check_devices(base, expert, anti, draft_token_ids, draft_logits, PTK_PARAM_VALUES,
                           PTK_CONSTRAINT_TENSORS, results...);
    const Tensor drafts = torch::stable::contiguous(draft_token_ids);
    proxytune_verify_args args = verify_args(PTK_VERIFY_VALUES(drafts));
    const Columns columns{1, base.size(1), 0};
    attach(kVerifyResults, args, base.size(0), columns, results...);
    Arguments(args, base.size(0)).write(kVerifyResults, args, columns);
    Backend::verify(args, base);
  }
};

}  // namespace ptk::binding
