#include "capi/wf_engine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/decoder.h"
#include "runtime/sampler.h"
#include "ternary/pool.h"

struct wf_engine {
  std::unique_ptr<wf::Decoder> decoder;
};

namespace {

thread_local char last_error[1024] = "";

wf_status fail(wf_status status, const char* text) noexcept {
  std::strncpy(last_error, text, sizeof last_error - 1);
  return status;
}

wf_status fail(const wf::Error& error) noexcept {
  constexpr wf_status kStatuses[] = {WF_BAD_ARGUMENT, WF_BAD_FILE, WF_BAD_MODEL, WF_CONTEXT_FULL, WF_NOT_FINITE, WF_CANCELLED};
  return fail(kStatuses[static_cast<int>(error.kind)], error.text.c_str());
}

wf_status missing() noexcept { return fail(WF_BAD_ARGUMENT, "a pointer that is needed is null"); }

// Runs what may throw: only memory is expected to run out.
template <typename Call>
wf_status guarded(Call call) noexcept {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return fail(WF_NO_MEMORY, "there is not enough memory: use fewer slots or a smaller context");
  } catch (const std::length_error&) {
    return fail(WF_NO_MEMORY, "there is not enough memory: use fewer slots or a smaller context");
  } catch (const std::exception& error) {
    return fail(WF_INTERNAL, error.what());
  } catch (...) {
    return fail(WF_INTERNAL, "an unknown failure");
  }
}

template <typename T>
wf_status status_of(const wf::Result<T>& result) noexcept {
  return result ? WF_OK : fail(result.error());
}

}  // namespace

int32_t wf_version(void) { return WF_ENGINE_VERSION; }

const char* wf_error_text(void) { return last_error; }

wf_status wf_open(const char* path, const wf_options* options, wf_engine** engine) {
  if (path == nullptr || engine == nullptr) return missing();
  *engine = nullptr;
  return guarded([&] {
    if (const char* value = wf::bad_threads_variable()) {
      return fail(WF_BAD_ARGUMENT, ("WF_THREADS: from 1 to 64 threads are possible, not '" + wf::quoted(value) + "'").c_str());
    }
    wf::DecoderOptions wanted;
    if (options != nullptr) {
      wanted.slots = options->slots == 0 ? 1 : options->slots;
      wanted.context = options->context;
      if (options->cache < WF_CACHE_F32 || options->cache > WF_CACHE_INT8) return fail(WF_BAD_ARGUMENT, "the cache is of no known type");
      wanted.cache = static_cast<wf::KvType>(options->cache);
      if (options->isa != nullptr) {
        wanted.kernels = wf::kernels_named(options->isa);
        if (wanted.kernels == nullptr) return fail(WF_BAD_ARGUMENT, "this processor or this build has no such instruction set");
      }
    }
    auto model = wf::load_model(std::string(path));
    if (!model) return fail(model.error());
    auto decoder = wf::Decoder::create(*model, wanted);
    if (!decoder) return fail(decoder.error());
    *engine = new wf_engine{std::move(*decoder)};
    return WF_OK;
  });
}

void wf_close(wf_engine* engine) { delete engine; }

wf_status wf_about(const wf_engine* engine, wf_info* info) {
  if (engine == nullptr || info == nullptr) return missing();
  const wf::Decoder& decoder = *engine->decoder;
  const wf::Model& model = decoder.model();
  *info = {model.architecture.c_str(),
           static_cast<int64_t>(model.layers.size()),
           model.width,
           model.vocabulary,
           decoder.slots(),
           decoder.context(),
           model.diffusion.mask_token,
           model.diffusion.block_size,
           model.diffusion.token_shift ? 1 : 0};
  return WF_OK;
}

wf_status wf_step(wf_engine* engine, const wf_sequence* sequences, int64_t count, int32_t rows, float* logits, float* hidden) {
  if (engine == nullptr || (sequences == nullptr && count > 0)) return missing();
  if (count < 0 || rows < WF_ROWS_NONE || rows > WF_ROWS_ALL) return fail(WF_BAD_ARGUMENT, "count or rows is none that can be");
  return guarded([&] {
    std::vector<wf::Sequence> wanted;
    for (const wf_sequence* sequence = sequences; sequence < sequences + count; ++sequence) {
      if (sequence->count < 0 || (sequence->tokens == nullptr && sequence->count > 0)) return missing();
      wanted.push_back({sequence->slot, {sequence->tokens, static_cast<size_t>(sequence->count)}, sequence->bidirectional != 0});
    }
    return status_of(engine->decoder->step(wanted, static_cast<wf::Rows>(rows), logits, hidden));
  });
}

wf_status wf_step_text(wf_engine* engine, int64_t slot, const char* text, wf_tokenize tokenize, void* context, float* logits,
                       int64_t* count) {
  if (engine == nullptr || text == nullptr || tokenize == nullptr) return missing();
  return guarded([&] {
    const auto held = engine->decoder->length(slot);
    if (!held) return fail(held.error());
    const int64_t room = engine->decoder->context() - *held;
    // As many as texts have, not as the context has, which may be billions; a text that has more is asked for again.
    std::vector<int32_t> tokens(std::min(static_cast<size_t>(room), std::strlen(text) + 16));
    int64_t found = tokenize(context, text, tokens.data(), static_cast<int64_t>(tokens.size()));
    if (found > static_cast<int64_t>(tokens.size()) && found <= room) {
      const int64_t expected = found;
      tokens.resize(static_cast<size_t>(expected));
      found = tokenize(context, text, tokens.data(), expected);
      if (found > expected) found = -1;
    }
    if (found < 0) return fail(WF_BAD_ARGUMENT, "the tokenizer cannot tell the tokens of the text");
    if (found > room) return fail(WF_CONTEXT_FULL, "the text has more tokens than the slot has room for: shorten it");
    const wf::Sequence sequence{slot, {tokens.data(), static_cast<size_t>(found)}};
    const auto step = engine->decoder->step({&sequence, 1}, logits == nullptr ? wf::Rows::none : wf::Rows::last, logits);
    if (step && count != nullptr) *count = found;
    return status_of(step);
  });
}

wf_status wf_log_probabilities(float* logits, int64_t rows, int64_t count) {
  if (logits == nullptr && rows > 0) return missing();
  if (rows < 0 || count < 1) return fail(WF_BAD_ARGUMENT, "there are no logits");
  return guarded([&] {
    if (const auto error = wf::log_probabilities(logits, rows, count)) return fail(*error);
    return WF_OK;
  });
}

void wf_cancel(wf_engine* engine) {
  if (engine != nullptr) engine->decoder->cancel();
}

wf_status wf_length(const wf_engine* engine, int64_t slot, int64_t* length) {
  if (engine == nullptr || length == nullptr) return missing();
  return guarded([&] {
    const auto found = engine->decoder->length(slot);
    if (found) *length = *found;
    return status_of(found);
  });
}

wf_status wf_truncate(wf_engine* engine, int64_t slot, int64_t length) {
  if (engine == nullptr) return missing();
  return guarded([&] { return status_of(engine->decoder->truncate(slot, length)); });
}

wf_status wf_copy(wf_engine* engine, int64_t from, int64_t to, int64_t length) {
  if (engine == nullptr) return missing();
  return guarded([&] { return status_of(engine->decoder->copy(from, to, length)); });
}

wf_status wf_set_threads(int32_t count) {
  if (count < 1 || count > wf::kMostThreads) return fail(WF_BAD_ARGUMENT, "from 1 to 64 threads are possible");
  return guarded([&] {
    wf::set_threads(count);
    return WF_OK;
  });
}

wf_status wf_statistics(const wf_engine* engine, wf_stats* stats) {
  if (engine == nullptr || stats == nullptr) return missing();
  const wf::Stats& found = engine->decoder->stats();
  *stats = {found.steps, found.tokens, found.nanoseconds};
  return WF_OK;
}

wf_status wf_sample(const float* logits, int64_t count, const wf_sampler* sampler, uint64_t index, int64_t* token) {
  if (logits == nullptr || sampler == nullptr || token == nullptr) return missing();
  return guarded([&] {
    const auto drawn = wf::sample(logits, count, {sampler->temperature, sampler->top_k, sampler->top_p, sampler->seed}, index);
    if (drawn) *token = *drawn;
    return status_of(drawn);
  });
}
