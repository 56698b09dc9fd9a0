/* proxytune: C API of the CPU and the CUDA kernels, for engines that already hold the three logits.
 *
 * Plain pointers and strides, no Python, no torch, no allocation unless asked, no threads. On the CPU
 * every call works on rows [begin, end) of its arguments, so a caller spreads rows over its own
 * threads, each with a workspace of its own. On a GPU a call launches one kernel on a stream.
 * The numbers are those of docs/contracts.md.
 *
 * Strides count elements. A per-row parameter that is NULL has its default for all rows.
 * All structs: zero them first; fields left 0 or NULL are off.
 */
#ifndef PROXYTUNE_H
#define PROXYTUNE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PROXYTUNE_API __attribute__((visibility("default")))
#else
#define PROXYTUNE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { PROXYTUNE_F32 = 0, PROXYTUNE_F16 = 1, PROXYTUNE_BF16 = 2 };
enum { PROXYTUNE_ORDER_VLLM = 0, PROXYTUNE_ORDER_HF = 1, PROXYTUNE_ORDER_JOINT = 2 };
enum { PROXYTUNE_STREAM_SAMPLE = 0, PROXYTUNE_STREAM_DRAFT = 1 };
enum { PROXYTUNE_VERIFY_COUPLED = 0, PROXYTUNE_VERIFY_REJECTION = 1 };
enum { PROXYTUNE_MAX_TOP = 128 };

/* Bits of a row's status. */
enum {
  PROXYTUNE_STATUS_NAN = 1,          /* NaN was masked */
  PROXYTUNE_STATUS_POSITIVE_INF = 2, /* only +inf tokens were kept */
  PROXYTUNE_STATUS_EMPTY = 4,        /* nothing was left: token -1 */
  PROXYTUNE_STATUS_BAD_PARAMS = 8    /* a parameter out of range: token -1 */
};

/* What is said of a row's steering, one float each: probabilities of a token at temperature 1, its rank in the
 * base (1 the likeliest), whether the likeliest token of all changed (1 or 0), the KL divergence in nats. */
enum {
  PROXYTUNE_ATTRIBUTION_BASE = 0,
  PROXYTUNE_ATTRIBUTION_EXPERT = 1,
  PROXYTUNE_ATTRIBUTION_ANTI = 2,
  PROXYTUNE_ATTRIBUTION_PROXY = 3,
  PROXYTUNE_ATTRIBUTION_BASE_RANK = 4,
  PROXYTUNE_ATTRIBUTION_CHANGED = 5,
  PROXYTUNE_ATTRIBUTION_KL = 6,
  PROXYTUNE_ATTRIBUTION = 7 /* how many they are */
};

/* Return values. */
enum {
  PROXYTUNE_OK = 0,
  PROXYTUNE_ERROR_ARGUMENT = 1, /* a pointer missing, a size or code out of range, or a workspace that
                                   is too small or not aligned */
  PROXYTUNE_ERROR_ISA = 2,      /* no such instruction set, or not on this processor */
  PROXYTUNE_ERROR_MEMORY = 3,   /* the workspace could not be allocated */
  PROXYTUNE_ERROR_DEVICE = 4,   /* no code for the device */
  PROXYTUNE_ERROR_SHAPE = 5,    /* a row that the device can't hold on chip */
  PROXYTUNE_ERROR_EDITS = 6,    /* edits on a GPU */
  PROXYTUNE_ERROR_CUDA = 1000   /* and above: this plus CUDA's own cudaError_t */
};

/* Logits [rows, positions, V_role]; the last dimension is contiguous. data NULL: no such role. */
typedef struct {
  const void* data;
  int64_t row_stride;
  int64_t position_stride; /* unused where there is one position */
  int32_t dtype;           /* PROXYTUNE_F32, _F16, _BF16 */
} proxytune_logits;

/* What a row's penalties and bias do to one token (docs/contracts.md, Edits). */
typedef struct {
  int32_t id;        /* unlike all others of its row; -1 for none */
  int32_t count;     /* how often the output has it */
  int32_t in_prompt; /* whether the prompt has it */
  float bias;
} proxytune_edit;

/* What is combined, shared by all calls. */
typedef struct {
  int64_t vocab_size;       /* agreed width, in [1, 2^19]; what lies past it is never read */
  proxytune_logits base;
  proxytune_logits expert;  /* expert and anti: both, or neither for the base alone */
  proxytune_logits anti;
  const float* alpha;       /* [rows], default 1 */
  const float* bias;        /* [rows, positions, vocab_size], added to the combined logits */
  int64_t bias_row_stride, bias_position_stride;
  const uint32_t* allowed;  /* [rows, positions, ceil(vocab_size / 32)], bit i & 31 of word i >> 5 */
  int64_t allowed_row_stride, allowed_position_stride;
  const proxytune_edit* edits; /* [rows, positions, num_edits]; not for proxytune_cpu_score, nor on a GPU */
  int64_t num_edits, edits_row_stride, edits_position_stride;
  const float* penalties;      /* [rows, 3]: repetition, presence, frequency; default 1, 0, 0 */
} proxytune_inputs;

/* One value per row. */
typedef struct {
  const float* temperature;    /* default 1; 0 is greedy */
  const int32_t* top_k;        /* default 0; 0 or -1 is off */
  const float* top_p;          /* default 1 = off; in (0, 1] */
  const float* min_p;          /* default 0 = off; in [0, 1] */
  const int32_t* filter_order; /* default PROXYTUNE_ORDER_VLLM */
  const int64_t* seed;         /* default 0; the 64-bit key of the request's noise */
  const int64_t* position;     /* default 0; index of the output token */
} proxytune_params;

typedef struct {
  proxytune_inputs inputs;
  proxytune_params params;
  int32_t noise_stream; /* PROXYTUNE_STREAM_SAMPLE or _DRAFT */
  int64_t* token_ids;  /* [rows], required; the others may be NULL */
  float* logprobs;
  float* raw_logprobs;
  int32_t* num_kept;
  int32_t* status;
  /* The likeliest tokens, whatever the filters keep: [rows, num_top], contiguous, likeliest first,
   * lower id first among equals; -1 and NaN where a row has fewer. Either may be NULL. */
  int32_t num_top;        /* at most PROXYTUNE_MAX_TOP; 0 is off */
  int64_t* top_token_ids;
  float* top_logprobs;    /* as raw_logprobs */
  /* What steering did: [rows, PROXYTUNE_ATTRIBUTION], contiguous, or NULL. On the CPU only. */
  float* attribution;
  const int64_t* attributed; /* [rows], the tokens that it is of; NULL or -1: the one drawn */
} proxytune_sample_args;

typedef struct {
  proxytune_inputs inputs;
  float* x; /* [rows, vocab_size] */
  int64_t x_row_stride;
} proxytune_combine_args;

/* A role's logits from its final hidden states, for proxytune_cpu_head_logits. */
typedef struct {
  const float* hidden;      /* [rows, size] */
  int64_t hidden_row_stride;
  int64_t rows, size;
  proxytune_logits weight;  /* [tokens, size]; row_stride: from one token to the next */
  float* logits;            /* [rows, end - begin] */
  int64_t logits_row_stride;
} proxytune_head_logits_args;

typedef struct {
  proxytune_inputs inputs;
  int64_t positions;
  const int64_t* token_ids; /* [rows, positions] */
  int64_t token_ids_row_stride;
  float* logprobs;          /* [rows, positions], contiguous */
} proxytune_score_args;

typedef struct {
  proxytune_inputs inputs;          /* logits at num_drafts + 1 positions */
  proxytune_params params;          /* position: that of the first drafted token */
  int64_t num_drafts;
  int32_t mode;                     /* in both, a row without drafts gets what sample draws */
  const int64_t* draft_token_ids;   /* [rows, num_drafts]; -1 from where a row has no more */
  int64_t draft_token_ids_row_stride;
  proxytune_logits draft_logits;    /* [rows, num_drafts, V_draft]; rejection only */
  int64_t* token_ids;               /* [rows, num_drafts + 1], contiguous; -1 past the last */
  int32_t* num_accepted;            /* [rows] */
  float* logprobs;                  /* [rows, num_drafts + 1], or NULL; NaN where the token is -1 */
  float* raw_logprobs;              /* [rows, num_drafts + 1], or NULL; NaN where the token is -1 */
  int32_t* status;                  /* [rows], or NULL */
} proxytune_verify_args;

/* The caller's threads, to share the work of one row: run(pool, n, body, context) calls
 * body(context, i) for i in [0, n), in any order, on any threads, and returns when all have. Worth it
 * where there are fewer rows than threads; results do not depend on it. */
typedef struct {
  void (*run)(void* pool, int64_t chunks, void (*body)(void* context, int64_t chunk), void* context);
  void* pool;
  int chunks; /* number of threads */
} proxytune_parallel;

/* Bytes of workspace one thread needs: one fp32 row and its summaries (two rows for rejection).
 * 0 where vocab_size is out of range. */
PROXYTUNE_API size_t proxytune_cpu_workspace_size(int64_t vocab_size, int rejection);

/* workspace: 64-byte aligned, of workspace_size bytes, at least proxytune_cpu_workspace_size's; or NULL
 * to allocate one for the call. parallel: NULL for one thread. */
PROXYTUNE_API int proxytune_cpu_sample(const proxytune_sample_args* args, int64_t begin, int64_t end,
                                       void* workspace, size_t workspace_size,
                                       const proxytune_parallel* parallel);
/* begin and end count row * positions + position: positions are as independent as rows. */
PROXYTUNE_API int proxytune_cpu_score(const proxytune_score_args* args, int64_t begin, int64_t end,
                                      void* workspace, size_t workspace_size,
                                      const proxytune_parallel* parallel);
PROXYTUNE_API int proxytune_cpu_verify(const proxytune_verify_args* args, int64_t begin, int64_t end,
                                       void* workspace, size_t workspace_size,
                                       const proxytune_parallel* parallel);
PROXYTUNE_API int proxytune_cpu_combine(const proxytune_combine_args* args, int64_t begin,
                                        int64_t end);
/* Products of all rows with the weights of tokens [begin, end), fp32: the same bits whatever the
 * rows, the range or the instruction set. Bias, scale and soft cap are the caller's. */
PROXYTUNE_API int proxytune_cpu_head_logits(const proxytune_head_logits_args* args, int64_t begin,
                                            int64_t end);

/* Instruction set in use: "avx512", "avx2", "neon" or "scalar"; NULL where PROXYTUNE_FORCE_ISA names one
 * that can't run here. Setting NULL chooses the widest. */
PROXYTUNE_API const char* proxytune_cpu_isa(void);
PROXYTUNE_API int proxytune_cpu_set_isa(const char* name);

/* One sentence on a return value. */
PROXYTUNE_API const char* proxytune_error(int code);

/* The CUDA half: compute capability 9.0 and later, in a library of its own.
 *
 * All pointers in the structs are of device memory, of the device that is current and that the
 * stream belongs to. The structs themselves are copied: they may go as soon as a call returns.
 * Nothing is allocated and nothing waits for the device; a later call of CUDA reports what goes wrong
 * there. A CUDA graph can hold the calls; the first one for a device, which loads the code, must
 * not be in a capture. stream: a cudaStream_t; NULL is the default one. */

/* Whether a device, by its number, can run the kernels, and the widest rows that it can hold on
 * chip: max_vocab_size is in host memory. rejection: 1 for verify in that mode, which holds the
 * drafter's row too, else 0. */
PROXYTUNE_API int proxytune_cuda_supported(int device, int rejection, int64_t* max_vocab_size);

/* rows: below 2^27. */
PROXYTUNE_API int proxytune_cuda_sample(const proxytune_sample_args* args, int64_t rows,
                                        void* stream);

/* Bytes of workspace that verify needs; 0 where it would need none or an argument is out of range. */
PROXYTUNE_API size_t proxytune_cuda_workspace_size(int64_t rows, int64_t num_drafts);

/* workspace: device memory, 4-byte aligned, of workspace_size bytes, at least
 * proxytune_cuda_workspace_size's, its first 4 * rows bytes zero; a call leaves them zero. Calls that
 * may overlap need one each. rows * (num_drafts + 1): below 2^27. */
PROXYTUNE_API int proxytune_cuda_verify(const proxytune_verify_args* args, int64_t rows,
                                        void* workspace, size_t workspace_size, void* stream);

/* One sentence on a return value of the CUDA half. */
PROXYTUNE_API const char* proxytune_cuda_error(int code);

#ifdef __cplusplus
}
#endif

#endif
