/* The decoder runtime as a C library.
 *
 * Every function that can fail returns a wf_status; wf_error_text() says in one sentence what was wrong. No exception leaves a function
 * and none aborts: after any error, out of memory and cancellation included, the engine is as it was before the call. One thread at a
 * time may use an engine, except for wf_cancel, which any may call, any time.
 *
 * Tokens are numbers: the tokenizer of a file is the caller's, which wf_step_text calls. Products run on as many threads as the
 * environment variable WF_THREADS says, else OMP_NUM_THREADS, else the process has processors; results do not depend on it. */
#ifndef WF_ENGINE_H
#define WF_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define WF_API __attribute__((visibility("default")))
#else
#define WF_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header; another one means that programs have to be compiled anew. */
#define WF_ENGINE_VERSION 1

typedef struct wf_engine wf_engine;

typedef enum wf_status {
  WF_OK = 0,
  WF_BAD_ARGUMENT = 1, /* a slot, token, option or pointer that cannot be */
  WF_BAD_FILE = 2,     /* the file cannot be read, or is no usable GGUF file */
  WF_BAD_MODEL = 3,    /* the file holds a model that the decoder does not run */
  WF_CONTEXT_FULL = 4, /* more tokens than a slot has room for */
  WF_NOT_FINITE = 5,   /* a NaN or an infinity inside the model */
  WF_CANCELLED = 6,
  WF_NO_MEMORY = 7,
  WF_INTERNAL = 8
} wf_status;

/* What keys and values are kept in: f32 is exact, f16 takes half of the memory, int8 a quarter. */
typedef enum wf_cache { WF_CACHE_F32 = 0, WF_CACHE_F16 = 1, WF_CACHE_INT8 = 2 } wf_cache;

/* Zeros ask for the defaults. */
typedef struct wf_options {
  int64_t slots;   /* sequences that are held at once; 0: one */
  int64_t context; /* positions of each; 0: as many as the model has */
  int32_t cache;   /* a wf_cache */
  const char* isa; /* an instruction set, such as "avx512" or "scalar"; null: the fastest one */
} wf_options;

typedef struct wf_info {
  const char* architecture; /* general.architecture; lives as long as the engine */
  int64_t layers, width, vocabulary;
  int64_t slots, context;
  int64_t mask_token; /* of a diffusion model, else -1 */
  int64_t block_size; /* of a diffusion model with blocks, else 0 */
  int32_t token_shift;
} wf_info;

/* Tokens to append to a slot. */
typedef struct wf_sequence {
  int64_t slot;
  const int32_t* tokens;
  int64_t count;         /* at least 1 */
  int32_t bidirectional; /* not 0: these tokens, at most 256, see each other in both directions */
} wf_sequence;

typedef enum wf_rows { WF_ROWS_NONE = 0, WF_ROWS_LAST = 1, WF_ROWS_ALL = 2 } wf_rows;

typedef struct wf_stats {
  int64_t steps, tokens, nanoseconds;
} wf_stats;

typedef struct wf_sampler {
  float temperature; /* 0: the largest logit */
  int64_t top_k;     /* 0: all tokens */
  float top_p;       /* above 0, at most 1 */
  uint64_t seed;
} wf_sampler;

/* WF_ENGINE_VERSION of the library: compare it with the header's. */
WF_API int32_t wf_version(void);

/* What was wrong in this thread's last call that failed. */
WF_API const char* wf_error_text(void);

/* Opens a GGUF file; `options` may be null. A WF_THREADS that is no number from 1 to 64 is an error. */
WF_API wf_status wf_open(const char* path, const wf_options* options, wf_engine** engine);
WF_API void wf_close(wf_engine* engine);
WF_API wf_status wf_about(const wf_engine* engine, wf_info* info);

/* Appends tokens to slots, each of which may appear once. Results are float32, in the sequences' order, of every sequence's last token
 * or of all tokens: `logits` [rows, vocabulary] and `hidden` [rows, width], what the head reads; either may be null. */
WF_API wf_status wf_step(wf_engine* engine, const wf_sequence* sequences, int64_t count, int32_t rows, float* logits, float* hidden);

/* A tokenizer of the caller's: writes at most `capacity` tokens of a text to `tokens`, and returns how many the text has, which may be
 * more, or a negative number if it has none that can be told. It is called again, with room, where a text has more tokens than bytes. */
typedef int64_t (*wf_tokenize)(void* context, const char* text, int32_t* tokens, int64_t capacity);

/* Appends the tokens of a text to a slot; `logits` [vocabulary] of the last one and `count` of tokens may be null. */
WF_API wf_status wf_step_text(wf_engine* engine, int64_t slot, const char* text, wf_tokenize tokenize, void* context, float* logits,
                              int64_t* count);

/* Turns logits [rows, count] into logarithms of probabilities, in place; none is changed if one is not finite. */
WF_API wf_status wf_log_probabilities(float* logits, int64_t rows, int64_t count);

/* Makes the step that runs, or else the next one, return WF_CANCELLED. A step looks before each layer, before each product with the head
 * and after the last one: it ends when what it computes just then (of at most 256 tokens) is done. */
WF_API void wf_cancel(wf_engine* engine);

/* How many tokens a slot holds. */
WF_API wf_status wf_length(const wf_engine* engine, int64_t slot, int64_t* length);
/* Forgets a slot's tokens from `length` on. */
WF_API wf_status wf_truncate(wf_engine* engine, int64_t slot, int64_t length);
/* Lets a slot begin with the first `length` tokens of another one, instead of what it holds. */
WF_API wf_status wf_copy(wf_engine* engine, int64_t from, int64_t to, int64_t length);

/* Lets products of the whole process run on 1 to 64 threads from here on. */
WF_API wf_status wf_set_threads(int32_t count);

/* Since the engine was opened. */
WF_API wf_status wf_statistics(const wf_engine* engine, wf_stats* stats);

/* Chooses a token; the draw depends on the seed and on `index`, the number of the draw, alone. */
WF_API wf_status wf_sample(const float* logits, int64_t count, const wf_sampler* sampler, uint64_t index, int64_t* token);

#ifdef __cplusplus
}
#endif

#endif
