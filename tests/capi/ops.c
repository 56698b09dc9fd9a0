/* Calls every operator of the C API on one case from a file, and prints what each wrote.
 *
 *   ops CASE THREADS own|given     values as hexadecimal bit patterns, one row a line
 *   ops errors                     return value and message of calls that must be refused
 *
 * CASE: int64 rows, positions, width, vocab_size, dtype, then the arrays of `read_case` in order,
 * each behind its size in bytes (int64); size 0 stands for NULL.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proxytune.h"

enum { MAX_THREADS = 16, NUM_TOP = 9 };

typedef struct {
  int64_t rows, positions, width, vocab_size, dtype;
  proxytune_inputs inputs;
  proxytune_params params;
  const int64_t *token_ids, *draft_token_ids;
  proxytune_logits draft_logits;
} test_case;

static void fail(const char* what) {
  fprintf(stderr, "ops: %s\n", what);
  exit(2);
}

static void check(int code) {
  if (code != PROXYTUNE_OK) fail(proxytune_error(code));
}

/* Memory that main frees. Every array is an allocation of its own size, so that a checker sees a
 * read past it; workspaces need more than malloc's alignment. */
static struct { void* memory[64]; size_t count; } kept;

static void* keep(void* memory) {
  if (!memory || kept.count == sizeof kept.memory / sizeof *kept.memory) fail("out of memory");
  return kept.memory[kept.count++] = memory;
}

#define ARRAY(n, type) ((type*)keep(malloc((size_t)(n) * sizeof(type))))

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* The case. */

static void* read_array(FILE* file) {
  int64_t size;
  if (fread(&size, sizeof size, 1, file) != 1) fail("the case ends early");
  if (size == 0) return NULL;
  void* data = ARRAY(size, char);
  if (fread(data, 1, (size_t)size, file) != (size_t)size) fail("the case ends early");
  return data;
}

static proxytune_logits read_logits(FILE* file, const test_case* c, int64_t positions) {
  const proxytune_logits logits = {read_array(file), positions * c->width, c->width,
                                   (int32_t)c->dtype};
  return logits;
}

static test_case read_case(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) fail("the case can't be opened");
  test_case c = {0};
  if (fread(&c, sizeof(int64_t), 5, file) != 5) fail("the case ends early");
  proxytune_inputs* in = &c.inputs;
  in->vocab_size = c.vocab_size;
  in->base = read_logits(file, &c, c.positions);
  in->expert = read_logits(file, &c, c.positions);
  in->anti = read_logits(file, &c, c.positions);
  in->alpha = read_array(file);
  in->bias = read_array(file);
  in->bias_position_stride = c.vocab_size;
  in->bias_row_stride = c.positions * c.vocab_size;
  in->allowed = read_array(file);
  in->allowed_position_stride = (c.vocab_size + 31) / 32;
  in->allowed_row_stride = c.positions * in->allowed_position_stride;
  in->edits = read_array(file);
  in->penalties = read_array(file);
  in->num_edits = in->edits ? 20 : 0;
  in->edits_position_stride = 20;
  in->edits_row_stride = c.positions * 20;
  c.params.temperature = read_array(file);
  c.params.top_k = read_array(file);
  c.params.top_p = read_array(file);
  c.params.min_p = read_array(file);
  c.params.filter_order = read_array(file);
  c.params.seed = read_array(file);
  c.params.position = read_array(file);
  c.token_ids = read_array(file);
  c.draft_token_ids = read_array(file);
  c.draft_logits = read_logits(file, &c, c.positions - 1);
  if (fgetc(file) != EOF) fail("the case has something after its end");
  fclose(file);
  return c;
}

/* The caller's threads. */

typedef struct {
  void (*body)(void*, int64_t);
  void* context;
  int64_t chunk;
} work;

static void* run_work(void* argument) {
  work* w = argument;
  w->body(w->context, w->chunk);
  return NULL;
}

static void run_chunks(void* pool, int64_t chunks, void (*body)(void*, int64_t), void* context) {
  pthread_t threads[MAX_THREADS];
  work parts[MAX_THREADS];
  (void)pool;
  if (chunks > MAX_THREADS) fail("more chunks than threads were offered");
  for (int64_t i = 0; i < chunks; ++i) {
    parts[i] = (work){body, context, i};
    if (pthread_create(&threads[i], NULL, run_work, &parts[i])) fail("no thread could be started");
  }
  for (int64_t i = 0; i < chunks; ++i) pthread_join(threads[i], NULL);
}

typedef struct {
  const proxytune_sample_args* args;
  int64_t rows, threads;
  size_t workspace_size;
} rows_work;

/* One thread's share of the rows, in a workspace of its own. */
static void sample_rows(void* context, int64_t thread) {
  const rows_work* w = context;
  void* workspace = aligned_alloc(64, w->workspace_size);
  if (!workspace) fail("out of memory");
  check(proxytune_cpu_sample(w->args, thread * w->rows / w->threads,
                             (thread + 1) * w->rows / w->threads, workspace, w->workspace_size,
                             NULL));
  free(workspace);
}

/* The operators. */

static void print_sample(const char* label, const proxytune_sample_args* a, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    printf("%s %" PRId64 " %08" PRIx32 " %08" PRIx32 " %" PRId32 " %" PRId32 "\n", label,
           a->token_ids[r], bits_of(a->logprobs[r]), bits_of(a->raw_logprobs[r]), a->num_kept[r],
           a->status[r]);
    printf("top");
    for (int64_t i = r * a->num_top; i < (r + 1) * a->num_top; ++i) {
      printf(" %" PRId64 " %08" PRIx32, a->top_token_ids[i], bits_of(a->top_logprobs[i]));
    }
    printf("\n");
  }
}

static void sample(const test_case* c, void* workspace, size_t size, const proxytune_parallel* parallel) {
  const int64_t n = c->rows, num_top = n * NUM_TOP;
  proxytune_sample_args a = {.inputs = c->inputs,
                             .params = c->params,
                             .noise_stream = PROXYTUNE_STREAM_SAMPLE,
                             .token_ids = ARRAY(n, int64_t)};
  check(proxytune_cpu_sample(&a, 0, c->rows, workspace, size, parallel));
  for (int64_t r = 0; r < c->rows; ++r) printf("ids %" PRId64 "\n", a.token_ids[r]);
  a.logprobs = ARRAY(n, float);
  a.raw_logprobs = ARRAY(n, float);
  a.num_kept = ARRAY(n, int32_t);
  a.status = ARRAY(n, int32_t);
  a.num_top = NUM_TOP;
  check(proxytune_cpu_sample(&a, 0, c->rows, workspace, size, parallel)); /* with nowhere to put them */
  a.top_token_ids = ARRAY(num_top, int64_t);
  a.top_logprobs = ARRAY(num_top, float);
  check(proxytune_cpu_sample(&a, 0, c->rows, workspace, size, parallel));
  print_sample("sample", &a, c->rows);

  const int64_t threads = parallel ? parallel->chunks : 1;
  rows_work over = {&a, c->rows, threads, proxytune_cpu_workspace_size(c->vocab_size, 0)};
  memset(a.token_ids, 0, (size_t)n * sizeof *a.token_ids);
  memset(a.top_token_ids, 0, (size_t)num_top * sizeof *a.top_token_ids);
  memset(a.top_logprobs, 0, (size_t)num_top * sizeof *a.top_logprobs);
  run_chunks(NULL, threads, sample_rows, &over);
  print_sample("rows", &a, c->rows);

  a.params = (proxytune_params){0};
  a.inputs.alpha = NULL;
  a.noise_stream = PROXYTUNE_STREAM_DRAFT;
  check(proxytune_cpu_sample(&a, 0, c->rows, workspace, size, parallel));
  print_sample("defaults", &a, c->rows);
}

static void combine(const test_case* c) {
  const proxytune_combine_args a = {c->inputs, ARRAY(c->rows * c->vocab_size, float), c->vocab_size};
  check(proxytune_cpu_combine(&a, 0, c->rows));
  for (int64_t r = 0; r < c->rows; ++r) {
    printf("combine");
    for (int64_t i = 0; i < c->vocab_size; ++i) {
      printf(" %08" PRIx32, bits_of(a.x[r * c->vocab_size + i]));
    }
    printf("\n");
  }
}

static void score(const test_case* c, void* workspace, size_t size, const proxytune_parallel* parallel) {
  const int64_t n = c->rows * c->positions;
  proxytune_score_args a = {.inputs = c->inputs,
                            .positions = c->positions,
                            .token_ids = c->token_ids,
                            .token_ids_row_stride = c->positions,
                            .logprobs = ARRAY(n, float)};
  a.inputs.bias = NULL; /* scores are of the combined logits alone */
  a.inputs.allowed = NULL;
  a.inputs.num_edits = 0;
  /* In two calls: positions are as independent as rows. */
  check(proxytune_cpu_score(&a, 0, n / 2, workspace, size, parallel));
  check(proxytune_cpu_score(&a, n / 2, n, workspace, size, parallel));
  for (int64_t i = 0; i < n; ++i) printf("score %08" PRIx32 "\n", bits_of(a.logprobs[i]));
}

static void verify(const test_case* c, int32_t mode, void* workspace, size_t size,
                   const proxytune_parallel* parallel) {
  const int64_t n = c->rows * c->positions;
  proxytune_verify_args a = {.inputs = c->inputs,
                             .params = c->params,
                             .num_drafts = c->positions - 1,
                             .mode = mode,
                             .draft_token_ids = c->draft_token_ids,
                             .draft_token_ids_row_stride = c->positions - 1,
                             .token_ids = ARRAY(n, int64_t),
                             .num_accepted = ARRAY(c->rows, int32_t)};
  if (mode == PROXYTUNE_VERIFY_REJECTION) a.draft_logits = c->draft_logits;
  check(proxytune_cpu_verify(&a, 0, c->rows, workspace, size, parallel)); /* with nowhere to put the rest */
  a.logprobs = ARRAY(n, float);
  a.raw_logprobs = ARRAY(n, float);
  a.status = ARRAY(c->rows, int32_t);
  check(proxytune_cpu_verify(&a, 0, c->rows, workspace, size, parallel));
  for (int64_t r = 0; r < c->rows; ++r) {
    printf("%s %" PRId32 " %" PRId32, mode == PROXYTUNE_VERIFY_COUPLED ? "coupled" : "rejection",
           a.num_accepted[r], a.status[r]);
    for (int64_t j = 0; j < c->positions; ++j) {
      const int64_t i = r * c->positions + j;
      printf(" %" PRId64 " %08" PRIx32 " %08" PRIx32, a.token_ids[i], bits_of(a.logprobs[i]),
             bits_of(a.raw_logprobs[i]));
    }
    printf("\n");
  }
}

/* Calls that must be refused. */

static void refused(const char* what, int code) {
  printf("%s %d %s\n", what, code, proxytune_error(code));
}

static void errors(void) {
  const float logits[4] = {0, 1, 2, 3};
  float head[3] = {7, 7, 7};
  int64_t token = 7;
  int32_t accepted = 7;
  const proxytune_sample_args good = {
      .inputs = {.vocab_size = 4, .base = {logits, 4, 0, PROXYTUNE_F32}}, .token_ids = &token};
  proxytune_sample_args a;
/* A call with a good one's arguments but for one change. */
#define REFUSED(name, change) \
  (a = good, change, refused(name, proxytune_cpu_sample(&a, 0, 1, NULL, 0, NULL)))
  REFUSED("good", (void)0);
  REFUSED("no-base", a.inputs.base.data = NULL);
  REFUSED("no-anti", a.inputs.expert = a.inputs.base);
  REFUSED("no-vocabulary", a.inputs.vocab_size = 0);
  REFUSED("wide-vocabulary", a.inputs.vocab_size = (1 << 19) + 1);
  REFUSED("dtype", a.inputs.base.dtype = 3);
  REFUSED("stream", a.noise_stream = 5);
  REFUSED("negative-top", a.num_top = -1);
  REFUSED("wide-top", a.num_top = PROXYTUNE_MAX_TOP + 1);
  REFUSED("no-token-ids", a.token_ids = NULL);
#undef REFUSED
  refused("no-arguments", proxytune_cpu_sample(NULL, 0, 1, NULL, 0, NULL));
  refused("begin", proxytune_cpu_sample(&good, -1, 1, NULL, 0, NULL));
  const size_t size = proxytune_cpu_workspace_size(4, 0);
  char* memory = keep(aligned_alloc(64, size + 64));
  refused("small-workspace", proxytune_cpu_sample(&good, 0, 1, memory, size - 1, NULL));
  refused("unaligned-workspace", proxytune_cpu_sample(&good, 0, 1, memory + 32, size + 32, NULL));
  refused("good-workspace", proxytune_cpu_sample(&good, 0, 1, memory, size, NULL));
  const proxytune_parallel no_run = {NULL, NULL, 2};
  refused("no-run", proxytune_cpu_sample(&good, 0, 1, memory, size, &no_run));
  refused("no-rows", proxytune_cpu_sample(&good, 1, 1, NULL, 0, NULL));

  proxytune_verify_args v = {
      .inputs = good.inputs, .token_ids = &token, .num_accepted = &accepted, .mode = 2};
  refused("mode", proxytune_cpu_verify(&v, 0, 1, NULL, 0, NULL));
  v.mode = PROXYTUNE_VERIFY_REJECTION; /* which needs two rows, also where no row has a draft */
  refused("small-verify-workspace", proxytune_cpu_verify(&v, 0, 1, memory, size, NULL));
  v.num_drafts = 1;
  refused("no-drafts", proxytune_cpu_verify(&v, 0, 1, NULL, 0, NULL));
  v.draft_token_ids = &token;
  refused("no-draft-logits", proxytune_cpu_verify(&v, 0, 1, NULL, 0, NULL));
  const proxytune_score_args s = {.inputs = good.inputs, .token_ids = &token};
  refused("no-logprobs", proxytune_cpu_score(&s, 0, 1, NULL, 0, NULL));
  const proxytune_combine_args x = {.inputs = good.inputs};
  refused("no-x", proxytune_cpu_combine(&x, 0, 1));
  proxytune_head_logits_args h = {
      .rows = 1, .size = 2, .hidden = logits, .weight = {.data = logits, .row_stride = 2}};
  refused("no-head-logits", proxytune_cpu_head_logits(&h, 0, 2));
  h.logits = head;
  h.weight.dtype = 3;
  refused("weight-dtype", proxytune_cpu_head_logits(&h, 0, 2));
  h.weight.dtype = PROXYTUNE_F32;
  refused("good-head", proxytune_cpu_head_logits(&h, 0, 2));
  h.logits = head + 2;
  refused("good-tokens", proxytune_cpu_head_logits(&h, 1, 2));
  refused("isa", proxytune_cpu_set_isa("none"));
  refused("unknown-code", 99);
  printf("head %g,%g,%g\n", head[0], head[1], head[2]); /* (0, 1) by (0, 1), (2, 3), (2, 3) */
  printf("workspace %zu %zu\n", proxytune_cpu_workspace_size(0, 0),
         proxytune_cpu_workspace_size((1 << 19) + 1, 1));
}

int main(int argc, char** argv) {
  if (argc == 2 && strcmp(argv[1], "errors") == 0) {
    errors();
    while (kept.count > 0) free(kept.memory[--kept.count]);
    return 0;
  }
  if (argc != 4) fail("usage: ops CASE THREADS own|given, or ops errors");
  test_case c = read_case(argv[1]);
  const int threads = atoi(argv[2]);
  if (threads < 1 || threads > MAX_THREADS) fail("THREADS must be 1 to 16");
  const proxytune_parallel pool = {run_chunks, NULL, threads};
  const proxytune_parallel* parallel = threads > 1 ? &pool : NULL;
  void* workspace = NULL;
  const size_t size = proxytune_cpu_workspace_size(c.vocab_size, 1);
  if (strcmp(argv[3], "given") == 0) workspace = keep(aligned_alloc(64, size));
  const char* isa = proxytune_cpu_isa();
  if (!isa) fail(proxytune_error(PROXYTUNE_ERROR_ISA));
  printf("isa %s\n", isa);
  sample(&c, workspace, size, parallel);
  combine(&c);
  score(&c, workspace, size, parallel);
  verify(&c, PROXYTUNE_VERIFY_COUPLED, workspace, size, parallel);
  verify(&c, PROXYTUNE_VERIFY_REJECTION, workspace, size, parallel);
  while (kept.count > 0) free(kept.memory[--kept.count]);
  return 0;
}
