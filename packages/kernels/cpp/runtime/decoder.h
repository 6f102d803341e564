// Decoding: tokens in, logits out, for several sequences at once.
//
// A slot holds the keys and values of one sequence. A step appends tokens to some slots: a prompt, a part of one, one token each of many,
// or all of these together. What a token's logits are depends on its own sequence alone: not on the batch, on how a prompt is cut, or on
// the number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "runtime/cache.h"
#include "runtime/model.h"
#include "runtime/result.h"
#include "ternary/floats.h"

namespace wf {

struct DecoderOptions {
  int64_t slots = 1;
  int64_t context = 0;  // positions a slot holds; 0: as many as the model has
  KvType cache = KvType::f32;
  const Kernels* kernels = nullptr;  // null: the fastest
};

struct Sequence {
  int64_t slot;
  std::span<const int32_t> tokens;  // at least one
  // Whether these tokens see each other in both directions, as the blocks of a diffusion model do. At most kMostRows.
  bool bidirectional = false;
};

enum class Rows : int { none, last, all };  // which tokens of a sequence results are for

struct Stats {
  int64_t steps = 0, tokens = 0, nanoseconds = 0;
};

// One thread at a time may call; `cancel` may be called by any, any time.
class Decoder {
 public:
  static constexpr int64_t kMostRows = 256;  // tokens that pass a layer together

  ~Decoder();
  static Result<std::unique_ptr<Decoder>> create(std::shared_ptr<const Model> model, const DecoderOptions& options);

  // Appends tokens. Results, in the sequences' order: `logits` [rows, vocabulary] and, unless null, `hidden` [rows, width], what the head
  // reads. After an error or a cancellation every slot is as it was.
  Result<Stats> step(std::span<const Sequence> sequences, Rows rows, float* logits, float* hidden = nullptr);

  // Makes the step that runs, or else the next one, end with Kind::cancelled.
  void cancel() { cancelled_.store(true); }

  // Forgets a slot's positions from `length` on, which is at most its length.
  Result<int64_t> truncate(int64_t slot, int64_t length);
  // Lets slot `to` begin with the first `length` positions of slot `from`, instead of what it holds.
  Result<int64_t> copy(int64_t from, int64_t to, int64_t length);
  Result<int64_t> length(int64_t slot) const;

  const Model& model() const { return *model_; }
  int64_t slots() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t context() const { return context_; }
  const Stats& stats() const { return stats_; }

 private:
  struct Row;
  struct Scratch;
  Decoder(std::shared_ptr<const Model> model, const DecoderOptions& options, int64_t context);
  Scratch& scratch(int64_t rows);

  std::optional<Error> check(std::span<const Sequence> sequences) const;
  std::optional<Error> forward(std::span<const Row> rows, Scratch& s);
  std::optional<Error> attend(const Layer& layer, int64_t index, std::span<const Row> rows, Scratch& s);
  std::optional<Error> feed_forward(const Layer& layer, int64_t tokens, Scratch& s);
  std::optional<Error> apply(const std::vector<const Linear*>& layers, const float* x, int64_t tokens, const std::vector<float*>& y,
                             Scratch& s) const;

  std::shared_ptr<const Model> model_;
  const Kernels& kernels_;
  int64_t context_;
  const FloatKernels& floats_;
  std::shared_ptr<Cache> cache_;
  std::vector<int64_t> lengths_;
  bool local_rope_;  // whether a layer has it
  std::unique_ptr<Scratch> scratch_;
  std::atomic<bool> cancelled_{false};
  Stats stats_;
};

}  // namespace wf
