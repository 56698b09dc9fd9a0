/* What docs/llama_cpp.cpp uses of llama.h, declared here because the wheel of libllama has no headers.
 *
 * The structures of parameters are those of llama.cpp 0.6.0 in front, and longer than they are there:
 * a function that takes one by value reads no further than it goes, and one that returns one has room. */
#ifndef LLAMA_H
#define LLAMA_H

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct llama_model;
struct llama_context;
struct llama_vocab;
typedef struct llama_memory_i* llama_memory_t;
typedef int32_t llama_token, llama_pos, llama_seq_id;

enum ggml_log_level { GGML_LOG_LEVEL_NONE, GGML_LOG_LEVEL_ERROR = 4, GGML_LOG_LEVEL_CONT };

struct llama_model_params {
  void* fields[64];
};

struct llama_context_params {
  uint32_t n_ctx, n_batch, n_ubatch, n_seq_max;
  void* fields[64];
};

struct llama_batch {
  int32_t n_tokens;
  llama_token* token;
  float* embd;
  llama_pos* pos;
  int32_t* n_seq_id;
  llama_seq_id** seq_id;
  int8_t* logits;
};

void llama_log_set(void (*callback)(ggml_log_level, const char*, void*), void* data);
void llama_backend_init(void);
llama_model_params llama_model_default_params(void);
llama_context_params llama_context_default_params(void);
llama_model* llama_model_load_from_file(const char* path, llama_model_params params);
void llama_model_free(llama_model* model);
const llama_vocab* llama_model_get_vocab(const llama_model* model);
llama_context* llama_init_from_model(llama_model* model, llama_context_params params);
void llama_free(llama_context* context);
int32_t llama_decode(llama_context* context, llama_batch batch);
float* llama_get_logits(llama_context* context);
llama_memory_t llama_get_memory(const llama_context* context);
void llama_memory_seq_cp(llama_memory_t memory, llama_seq_id from, llama_seq_id to, llama_pos begin,
                         llama_pos end);
int32_t llama_vocab_n_tokens(const llama_vocab* vocab);
const char* llama_vocab_get_text(const llama_vocab* vocab, llama_token token);
bool llama_vocab_is_eog(const llama_vocab* vocab, llama_token token);
int32_t llama_tokenize(const llama_vocab* vocab, const char* text, int32_t text_size, llama_token* tokens,
                       int32_t room, bool add_special, bool parse_special);
int32_t llama_token_to_piece(const llama_vocab* vocab, llama_token token, char* piece, int32_t size,
                             int32_t lstrip, bool special);
}

#endif
