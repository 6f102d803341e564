/* The C API from C: c_api CALL FILE ... prints what Python compares, or how many checks hold, and ends with 1 where one does not.
 *
 *   logits FILE TOKEN ...   the logits after some tokens, as hexadecimal floats
 *   errors FILE             every mistake is a code with a sentence, and changes nothing
 *   cancel FILE             in the middle of a long step, anywhere in a short one, and before one
 *   memory FILE             every allocation of every call fails once
 *   attention FILE          the same in a step with attention on the pool's threads, of the scalar kernels
 *   limit FILE              the same with RLIMIT_AS, where no allocation is singled out
 *
 * With WF_THREADS above 1 the pool must have started a thread. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "wf_engine.h"

/* --------------------------------------------------------------------------------------------- allocations that fail */

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_memalign(size_t, size_t);

static atomic_long allocations;      /* since the last call of fail_from */
static atomic_long fails = -1;       /* the allocation that fails; -1: none */
static atomic_int fails_ever_after;  /* whether all later ones do, too */

static wf_engine* _Atomic to_cancel; /* whose step `stepping` is in: instead of failing, an allocation cancels it */
static pthread_t stepping;

#ifndef __SANITIZE_THREAD__ /* whose own functions these would replace: there no allocation fails */
static int refused(void) {
  wf_engine* engine = atomic_load(&to_cancel);
  if (engine != NULL) {
    if (pthread_equal(pthread_self(), stepping) && atomic_fetch_add(&allocations, 1) == atomic_load(&fails)) wf_cancel(engine);
    return 0;
  }
  const long now = atomic_fetch_add(&allocations, 1), at = atomic_load(&fails);
  return at >= 0 && (now == at || (now > at && atomic_load(&fails_ever_after)));
}

void* malloc(size_t size) { return refused() ? (errno = ENOMEM, NULL) : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return refused() ? (errno = ENOMEM, NULL) : __libc_calloc(count, size); }
void* aligned_alloc(size_t alignment, size_t size) { return refused() ? (errno = ENOMEM, NULL) : __libc_memalign(alignment, size); }
#endif

static void fail_from(long allocation, int ever_after) {
  atomic_store(&fails_ever_after, ever_after);
  atomic_store(&allocations, 0);
  atomic_store(&fails, allocation);
}

/* ------------------------------------------------------------------------------------------------------------ checks */

static long held; /* checks */

#define CHECK(holds)                                                                                    \
  do {                                                                                                  \
    if (holds) {                                                                                        \
      ++held;                                                                                           \
    } else {                                                                                            \
      fail_from(-1, 0);                                                                                 \
      fprintf(stderr, "line %d: %s does not hold (%s)\n", __LINE__, #holds, wf_error_text());          \
      exit(1);                                                                                          \
    }                                                                                                   \
  } while (0)

enum { SLOTS = 32, LONG = 96 };
static float logits[2][1 << 16];
static int32_t text[LONG];
static wf_info info;

static wf_engine* open_with(const char* path, const char* isa) {
  const wf_options options = {SLOTS, 0, WF_CACHE_F32, isa};
  wf_engine* engine = NULL;
  CHECK(wf_version() == WF_ENGINE_VERSION);
  CHECK(wf_open(path, &options, &engine) == WF_OK);
  CHECK(wf_about(engine, &info) == WF_OK && info.slots == SLOTS && info.context >= LONG + 8 && info.vocabulary <= 1 << 16);
  for (int i = 0; i < LONG; ++i) text[i] = (int32_t)((i * 37 + 11) % info.vocabulary);
  return engine;
}

static wf_engine* open_engine(const char* path) { return open_with(path, NULL); }

static int64_t length(const wf_engine* engine, int64_t slot) {
  int64_t found = -1;
  CHECK(wf_length(engine, slot, &found) == WF_OK);
  return found;
}

static wf_status step(wf_engine* engine, int64_t slot, const int32_t* tokens, int64_t count, float* out) {
  const wf_sequence sequence = {slot, tokens, count, 0};
  return wf_step(engine, &sequence, 1, WF_ROWS_LAST, out, NULL);
}

/* Some slots get a long text each. */
static wf_status long_steps(wf_engine* engine, int64_t slots) {
  wf_sequence sequences[SLOTS];
  for (int64_t i = 0; i < slots; ++i) sequences[i] = (wf_sequence){i, text, LONG, 0};
  return wf_step(engine, sequences, slots, WF_ROWS_NONE, NULL, NULL);
}

/* Every slot does: thousands of rows. */
static wf_status long_step(wf_engine* engine) { return long_steps(engine, SLOTS); }

/* The engine computes what it did before something went wrong, which `logits[0]` has. */
static void works_as_before(wf_engine* engine) {
  CHECK(wf_truncate(engine, 1, 0) == WF_OK);
  CHECK(step(engine, 1, text, 9, logits[1]) == WF_OK);
  CHECK(memcmp(logits[0], logits[1], (size_t)info.vocabulary * sizeof(float)) == 0);
  CHECK(wf_truncate(engine, 1, 0) == WF_OK);
}

/* ------------------------------------------------------------------------------------------------------------- calls */

static int print_logits(const char* path, int count, char** tokens) {
  wf_engine* engine = open_engine(path);
  for (int i = 0; i < count; ++i) text[i] = atoi(tokens[i]);
  CHECK(step(engine, 3, text, count, logits[0]) == WF_OK);
  for (int64_t i = 0; i < info.vocabulary; ++i) printf("%a\n", (double)logits[0][i]);
  CHECK(wf_log_probabilities(logits[0], 1, info.vocabulary) == WF_OK);
  for (int64_t i = 0; i < info.vocabulary; ++i) printf("%a\n", (double)logits[0][i]);
  wf_close(engine);
  return 0;
}

static int64_t most_room; /* that a tokenizer was given */

/* The letters of a text, an asterisk is 20 of them; a space cannot be told. */
static int64_t letters(void* context, const char* given, int32_t* tokens, int64_t capacity) {
  ++*(int*)context;
  if (capacity > most_room) most_room = capacity;
  if (given[0] == '*') {
    for (int64_t i = 0; i < capacity && i < 20; ++i) tokens[i] = (int32_t)i;
    return 20;
  }
  const int64_t count = (int64_t)strlen(given);
  for (int64_t i = 0; i < count; ++i) {
    if (given[i] == ' ') return -1;
    if (i < capacity) tokens[i] = given[i];
  }
  return count;
}

static void is_refused(wf_engine* engine, wf_status found, wf_status expected, const char* says) {
  CHECK(found == expected);
  CHECK(strstr(wf_error_text(), says) != NULL && strchr(wf_error_text(), '\n') == NULL);
  CHECK(engine == NULL || (length(engine, 0) == 2 && length(engine, 1) == 0));
}

static int errors(const char* path) {
  wf_engine *engine = open_engine(path), *other = engine;
  const int32_t bad[] = {-1, (int32_t)info.vocabulary};
  const wf_sequence twice[] = {{0, text, 1, 0}, {0, text, 1, 0}}, none = {0, NULL, 0, 0}, negative = {0, text, -1, 0}, null = {0, NULL, 1, 0};
  const wf_sampler cold = {-1.0F, 0, 1.0F, 0};
  int64_t token = 0;
  int calls = 0;
  CHECK(step(engine, 0, text, 2, logits[0]) == WF_OK);
  CHECK(step(engine, 2, text, 9, logits[0]) == WF_OK);

  is_refused(engine, wf_open(NULL, NULL, &other), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_open(path, NULL, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_open("/nowhere", NULL, &other), WF_BAD_FILE, "/nowhere cannot be read");
  CHECK(other == NULL);
  is_refused(engine, wf_open("/dev/null", NULL, &other), WF_BAD_FILE, "it is no file");
  const wf_options wrong[] = {{-1, 0, 0, NULL}, {5000, 0, 0, NULL}, {1, -1, 0, NULL}, {1, 1LL << 40, 0, NULL}, {1, 0, 3, NULL}, {1, 0, -1, NULL}, {1, 0, 0, "sse9"}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) is_refused(engine, wf_open(path, &wrong[i], &other), WF_BAD_ARGUMENT, " ");
  const char* threads[] = {"0", "65", "x", "2x", "-1", " 2", "1e1", "99999999999999999999"};
  for (size_t i = 0; i < sizeof threads / sizeof *threads; ++i) {
    setenv("WF_THREADS", threads[i], 1);
    is_refused(engine, wf_open(path, NULL, &other), WF_BAD_ARGUMENT, "WF_THREADS: from 1 to 64 threads are possible, not '");
    CHECK(strstr(wf_error_text(), threads[i]) != NULL);
  }
  setenv("WF_THREADS", "", 1);
  CHECK(wf_open(path, NULL, &other) == WF_OK);
  wf_close(other);
  is_refused(engine, wf_set_threads(0), WF_BAD_ARGUMENT, "1 to 64");
  is_refused(engine, wf_set_threads(65), WF_BAD_ARGUMENT, "1 to 64");

  is_refused(engine, wf_about(engine, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_step(NULL, twice, 1, 0, NULL, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_step(engine, NULL, 1, 0, NULL, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_step(engine, &null, 1, 0, NULL, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_step(engine, &negative, 1, 0, NULL, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_step(engine, twice, -1, 0, NULL, NULL), WF_BAD_ARGUMENT, "count");
  is_refused(engine, wf_step(engine, twice, 1, 3, NULL, NULL), WF_BAD_ARGUMENT, "rows");
  is_refused(engine, wf_step(engine, twice, 2, 0, NULL, NULL), WF_BAD_ARGUMENT, "twice");
  is_refused(engine, wf_step(engine, &none, 1, 0, NULL, NULL), WF_BAD_ARGUMENT, "no tokens");
  for (int i = 0; i < 2; ++i) is_refused(engine, step(engine, 0, &bad[i], 1, NULL), WF_BAD_ARGUMENT, "a token is");
  for (int i = 0; i < 2; ++i) is_refused(engine, step(engine, i == 0 ? -1 : SLOTS, text, 1, NULL), WF_BAD_ARGUMENT, "no such slot");
  int32_t* huge = calloc((size_t)info.context, sizeof *huge);
  is_refused(engine, step(engine, 0, huge, info.context, NULL), WF_CONTEXT_FULL, "do not fit the context");
  free(huge);
  is_refused(engine, wf_length(engine, -1, &token), WF_BAD_ARGUMENT, "no such slot");
  is_refused(engine, wf_length(engine, 0, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_truncate(engine, 0, 3), WF_BAD_ARGUMENT, "holds 2 tokens");
  is_refused(engine, wf_truncate(NULL, 0, 0), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_copy(engine, 0, 1, 3), WF_BAD_ARGUMENT, "holds 2 tokens");
  is_refused(engine, wf_copy(engine, 0, SLOTS, 1), WF_BAD_ARGUMENT, "no such slot");
  is_refused(engine, wf_statistics(engine, NULL), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_sample(logits[0], info.vocabulary, &cold, 0, &token), WF_BAD_ARGUMENT, "temperature");
  is_refused(engine, wf_sample(logits[0], info.vocabulary, NULL, 0, &token), WF_BAD_ARGUMENT, "null");
  is_refused(engine, wf_log_probabilities(logits[0], 1, 0), WF_BAD_ARGUMENT, "no logits");
  is_refused(engine, wf_log_probabilities(NULL, 1, 2), WF_BAD_ARGUMENT, "null");
  float infinite[] = {1.0F, 1.0F / 0.0F};
  is_refused(engine, wf_log_probabilities(infinite, 1, 2), WF_NOT_FINITE, "not finite");
  float later[] = {1.0F, 2.0F, 1.0F, 0.0F / 0.0F};
  is_refused(engine, wf_log_probabilities(later, 2, 2), WF_NOT_FINITE, "not finite");
  CHECK(later[0] == 1.0F && later[1] == 2.0F && later[2] == 1.0F);

  is_refused(engine, wf_step_text(engine, 0, "a b", letters, &calls, NULL, NULL), WF_BAD_ARGUMENT, "tokenizer");
  is_refused(engine, wf_step_text(engine, 0, "", letters, &calls, NULL, NULL), WF_BAD_ARGUMENT, "no tokens");
  is_refused(engine, wf_step_text(engine, SLOTS, "a", letters, &calls, NULL, NULL), WF_BAD_ARGUMENT, "no such slot");
  is_refused(engine, wf_step_text(engine, 0, "a", NULL, NULL, NULL, NULL), WF_BAD_ARGUMENT, "null");
  char* endless = malloc((size_t)info.context + 1);
  memset(endless, 'a', (size_t)info.context);
  endless[info.context] = 0;
  is_refused(engine, wf_step_text(engine, 0, endless, letters, &calls, NULL, NULL), WF_CONTEXT_FULL, "more tokens");
  free(endless);
  CHECK(calls == 3);
  int64_t count = 0;
  const int32_t same[] = {'h', 'e', 'y'};
  CHECK(wf_step_text(engine, 4, "hey", letters, &calls, logits[1], &count) == WF_OK && count == 3 && length(engine, 4) == 3);
  CHECK(step(engine, 5, same, 3, logits[0]) == WF_OK);
  CHECK(memcmp(logits[0], logits[1], (size_t)info.vocabulary * sizeof(float)) == 0);

  /* Room for the tokens that texts have, however long the context is, and then for those that this one has. */
  most_room = 0;
  CHECK(wf_step_text(engine, 6, "hey", letters, &calls, NULL, &count) == WF_OK && calls == 5 && most_room < 30);
  CHECK(wf_truncate(engine, 6, 0) == WF_OK);
  CHECK(wf_step_text(engine, 6, "*", letters, &calls, NULL, &count) == WF_OK && calls == 7 && count == 20 && length(engine, 6) == 20);

  CHECK(step(engine, 2, text, 0, NULL) != WF_OK && length(engine, 2) == 9);
  wf_stats stats;
  CHECK(wf_statistics(engine, &stats) == WF_OK && stats.steps == 6 && stats.tokens == 2 + 9 + 3 + 3 + 3 + 20 && stats.nanoseconds > 0);
  CHECK(step(engine, 1, text, 9, logits[0]) == WF_OK);
  works_as_before(engine);
  wf_close(engine);
  wf_close(NULL);
  wf_cancel(NULL);
  return 0;
}

static atomic_int over;

static void* disturb(void* engine) {
  const struct timespec pause = {0, 2000000};
  while (!atomic_load(&over)) {
    nanosleep(&pause, NULL);
    wf_cancel(engine);
  }
  return NULL;
}

static int cancel(const char* path) {
  wf_engine* engine = open_engine(path);
  pthread_t other;
  CHECK(step(engine, 1, text, 9, logits[0]) == WF_OK);
  CHECK(wf_truncate(engine, 1, 0) == WF_OK);
  CHECK(step(engine, 0, text, 2, logits[1]) == WF_OK);
  wf_stats before, after;
  CHECK(wf_statistics(engine, &before) == WF_OK);

  CHECK(pthread_create(&other, NULL, disturb, engine) == 0);
  CHECK(long_step(engine) == WF_CANCELLED && strstr(wf_error_text(), "cancelled") != NULL);
  atomic_store(&over, 1);
  pthread_join(other, NULL);
  for (int64_t slot = 0; slot < SLOTS; ++slot) CHECK(length(engine, slot) == (slot == 0 ? 2 : 0));
  CHECK(wf_statistics(engine, &after) == WF_OK && memcmp(&before, &after, sizeof before) == 0);

  wf_cancel(engine); /* perhaps the second one that came too late for the step: the next one ends, once */
  CHECK(step(engine, 0, text, 3, logits[1]) == WF_CANCELLED && length(engine, 0) == 2);
  works_as_before(engine);
  stepping = pthread_self();
  for (long allocation = 0, made = 1; allocation < made; ++allocation) { /* also those of the product with the head, which is last */
    fail_from(allocation, 0);
    atomic_store(&to_cancel, engine);
    const wf_status status = step(engine, 0, text, 9, logits[1]);
    atomic_store(&to_cancel, NULL);
    made = atomic_load(&allocations);
    fail_from(-1, 0);
    CHECK(made > allocation ? status == WF_CANCELLED && length(engine, 0) == 2 : status == WF_OK);
    CHECK(wf_truncate(engine, 0, 2) == WF_OK);
  }
  works_as_before(engine);
  CHECK(long_step(engine) == WF_OK);
  for (int64_t slot = 0; slot < SLOTS; ++slot) CHECK(length(engine, slot) == LONG + (slot == 0 ? 2 : 0));
  works_as_before(engine);
  wf_close(engine);
  return 0;
}

/* A call of its own for each number, on a slot that holds two tokens. */
static wf_status call(int number, const char* path, wf_engine* engine, wf_engine** opened) {
  const wf_sampler sampler = {0.8F, 5, 0.9F, 7};
  int64_t token = 0;
  int calls = 0;
  switch (number) {
    case 0:
      return wf_open(path, NULL, opened);
    case 1:
      return step(engine, 0, text, 9, logits[1]);
    case 2:
      return wf_step_text(engine, 0, "hello", letters, &calls, logits[1], NULL);
    case 3:
      return wf_sample(logits[0], info.vocabulary, &sampler, 3, &token);
    case 4:
      return wf_truncate(engine, 0, 3); /* which the slot does not hold: an error without memory for its sentence */
    default:
      return wf_copy(engine, 0, 1, 1);
  }
}

static int memory(const char* path) {
  wf_engine *engine = open_engine(path), *opened = NULL;
  long failed = 0;
  CHECK(step(engine, 1, text, 9, logits[0]) == WF_OK);
  for (int number = 0; number < 6; ++number) {
    for (int ever_after = 0; ever_after < 2; ++ever_after) {
      for (long allocation = 0;; ++allocation) {
        CHECK(wf_truncate(engine, 0, 0) == WF_OK && wf_truncate(engine, 1, 0) == WF_OK && step(engine, 0, text, 2, NULL) == WF_OK);
        fail_from(allocation, ever_after);
        const wf_status status = call(number, path, engine, &opened);
        const long made = atomic_load(&allocations);
        fail_from(-1, 0);
        if (status == WF_NO_MEMORY) {
          CHECK(strstr(wf_error_text(), "not enough memory") != NULL);
          CHECK(opened == NULL && length(engine, 0) == 2 && length(engine, 1) == 0);
          ++failed;
        } else {
          CHECK(status == (number == 4 ? WF_BAD_ARGUMENT : WF_OK));
          wf_close(opened);
          opened = NULL;
        }
        if (made <= allocation) break;
        CHECK(allocation < 100000);
      }
      works_as_before(engine);
    }
  }
  CHECK(failed > 100);
  wf_close(engine);
  return 0;
}

static int attention(const char* path) {
  enum { TEXTS = 3, TIMES = 16 }; /* more than 256 rows, with work enough for the pool */
  wf_engine* engine = open_with(path, "scalar");
  CHECK(step(engine, 1, text, 9, logits[0]) == WF_OK);
  CHECK(wf_truncate(engine, 1, 0) == WF_OK);
  fail_from(-1, 0);
  CHECK(long_steps(engine, TEXTS) == WF_OK);
  const long made = atomic_load(&allocations), stride = made / TIMES + 1;
  for (long allocation = 0; allocation < made; allocation += stride) {
    for (int64_t slot = 0; slot < TEXTS; ++slot) CHECK(wf_truncate(engine, slot, 0) == WF_OK);
    fail_from(allocation, 0);
    const wf_status status = long_steps(engine, TEXTS);
    fail_from(-1, 0);
    CHECK(status == WF_NO_MEMORY || status == WF_OK);
    for (int64_t slot = 0; slot < TEXTS; ++slot) CHECK(length(engine, slot) == (status == WF_OK ? LONG : 0));
  }
  works_as_before(engine);
  wf_close(engine);
  return 0;
}

static int limit(const char* path) {
  wf_engine *engine = open_engine(path), *opened = NULL;
  struct rlimit before, tight;
  long pages = 0;
  CHECK(step(engine, 1, text, 9, logits[0]) == WF_OK);
  CHECK(wf_truncate(engine, 1, 0) == WF_OK);
  FILE* file = fopen("/proc/self/statm", "r");
  CHECK(file != NULL && fscanf(file, "%ld", &pages) == 1 && fclose(file) == 0);
  CHECK(getrlimit(RLIMIT_AS, &before) == 0);
  tight = before;
  tight.rlim_cur = (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE) + (64 << 10);
  CHECK(setrlimit(RLIMIT_AS, &tight) == 0);
  const wf_options wide = {4096, 0, WF_CACHE_F32, NULL};
  CHECK(wf_open(path, &wide, &opened) == WF_NO_MEMORY && opened == NULL);
  CHECK(long_step(engine) == WF_NO_MEMORY);
  for (int64_t slot = 0; slot < SLOTS; ++slot) CHECK(length(engine, slot) == 0);
  CHECK(setrlimit(RLIMIT_AS, &before) == 0);
  works_as_before(engine);
  CHECK(long_step(engine) == WF_OK);
  CHECK(wf_open(path, NULL, &opened) == WF_OK);
  wf_close(opened);
  wf_close(engine);
  return 0;
}

static int run(const char* name, const char* path, int count, char** tokens) {
  if (strcmp(name, "logits") == 0) return print_logits(path, count, tokens);
  if (strcmp(name, "errors") == 0) return errors(path);
  if (strcmp(name, "cancel") == 0) return cancel(path);
  if (strcmp(name, "memory") == 0) return memory(path);
  if (strcmp(name, "attention") == 0) return attention(path);
  return strcmp(name, "limit") == 0 ? limit(path) : 2;
}

static int running_threads(void) {
  DIR* tasks = opendir("/proc/self/task");
  CHECK(tasks != NULL);
  int count = 0;
  for (const struct dirent* task; (task = readdir(tasks)) != NULL;) count += task->d_name[0] != '.';
  closedir(tasks);
  return count;
}

int main(int count, char** arguments) {
  if (count < 3) return 2;
  const char* threads = getenv("WF_THREADS");
  const int wanted = threads == NULL ? 0 : atoi(threads); /* before a call changes the variable */
  const int result = run(arguments[1], arguments[2], count - 3, arguments + 3);
  if (wanted > 0) CHECK(running_threads() == wanted);
  if (result == 0 && strcmp(arguments[1], "logits") != 0) printf("%ld checks hold\n", held);
  return result;
}
