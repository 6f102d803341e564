#include "runtime/decoder.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <optional>

#include "runtime/attention.h"
#include "runtime/head.h"
#include "runtime/numbers.h"
#include "runtime/ops.h"

namespace wf {

// One token on its way through the layers.
struct Decoder::Row {
  int64_t slot, position;
  int64_t visible;  // positions of its slot that exist for it; causal: its own and those before
  int32_t token;
};

// Memory of a chunk of rows. Every buffer is [rows, ...].
struct Decoder::Scratch {
  int64_t rows;
  std::vector<float> x, normed, query, key, value, attended, gate, up, projected, prepared, turns, results;

  Scratch(const Model& m, int64_t rows_) : rows(rows_) {
    const int64_t inner = m.heads * m.head_width, kv = m.kv_heads * m.head_width, widest = std::max({m.width, inner, m.ffn});
    const auto size = [&](std::vector<float>& buffer, int64_t width) { buffer.resize(static_cast<size_t>(rows * width)); };
    for (auto* buffer : {&x, &normed, &projected, &results}) size(*buffer, m.width);
    for (auto* buffer : {&query, &attended}) size(*buffer, inner);
    for (auto* buffer : {&key, &value}) size(*buffer, kv);
    for (auto* buffer : {&gate, &up}) size(*buffer, m.ffn);
    size(prepared, widest);
    size(turns, 2 * m.head_width);  // cos, sin, and those of sliding layers
  }
};

namespace {

constexpr int64_t kKeptRows = 32;  // whose memory is kept between steps: a few megabytes

Error out_of(const char* what, int64_t value, const char* why) {
  return {Kind::argument, std::string(what) + " is " + std::to_string(value) + ": " + why};
}

Error cancellation() { return {Kind::cancelled, "the step was cancelled"}; }

Error not_finite(const char* what) {
  return {Kind::number, std::string(what) + " is not finite: the file's numbers are damaged or too large"};
}

// By exponents: in what is not finite they are all ones, and one more carries into the sign. Compilers make vectors of this loop.
bool finite(const float* x, int64_t count) {
  uint32_t carries = 0;
  for (int64_t i = 0; i < count; ++i) carries |= (std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU) + 0x00800000U;
  return carries >> 31 == 0;
}

void norm_rows(const FloatKernels& kernels, const Norm& norm, const float* x, int64_t rows, int64_t width, float* out) {
  if (!norm) {
    std::copy_n(x, rows * width, out);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) kernels.rms_norm(x + row * width, norm.gain.data(), width, norm.epsilon, out + row * width);
}

}  // namespace

Decoder::Decoder(std::shared_ptr<const Model> model, const DecoderOptions& options, int64_t context)
    : model_(std::move(model)),
      kernels_(options.kernels != nullptr ? *options.kernels : *kernels_of(best_isa())),
      context_(context),
      floats_(float_kernels(kernels_.isa)),
      cache_(std::make_shared<Cache>(options.cache, CacheShape{options.slots, static_cast<int64_t>(model_->layers.size()), model_->kv_heads, context,
                                                              model_->head_width})),
      lengths_(static_cast<size_t>(options.slots)),
      local_rope_(std::any_of(model_->layers.begin(), model_->layers.end(), [](const Layer& layer) { return layer.local_rope; })) {}

Decoder::~Decoder() = default;

// Of few rows it is kept for the next step.
Decoder::Scratch& Decoder::scratch(int64_t rows) {
  if (scratch_ == nullptr || scratch_->rows < rows) scratch_ = std::make_unique<Scratch>(*model_, rows);
  return *scratch_;
}

Result<std::unique_ptr<Decoder>> Decoder::create(std::shared_ptr<const Model> model, const DecoderOptions& options) {
  if (options.slots < 1 || options.slots > 4096) return out_of("the number of slots", options.slots, "it must be from 1 to 4096");
  const int64_t context = options.context == 0 ? model->context : options.context;
  if (context < 1 || context > model->context) {
    return out_of("the context", context, ("the model has from 1 to " + std::to_string(model->context) + " positions").c_str());
  }
  return std::unique_ptr<Decoder>(new Decoder(std::move(model), options, context));
}

std::optional<Error> Decoder::check(std::span<const Sequence> sequences) const {
  std::vector<bool> seen(lengths_.size());
  for (const Sequence& sequence : sequences) {
    const auto slot = static_cast<size_t>(sequence.slot);
    if (sequence.slot < 0 || slot >= lengths_.size()) return out_of("slot", sequence.slot, "there is no such slot");
    if (seen[slot]) return out_of("slot", sequence.slot, "it is in the step twice");
    seen[slot] = true;
    const auto count = static_cast<int64_t>(sequence.tokens.size());
    if (count == 0) return Error{Kind::argument, "a sequence has no tokens"};
    if (sequence.bidirectional && count > kMostRows) return out_of("the block's size", count, "at most 256 tokens see each other");
    if (count > context_ - lengths_[slot]) {
      return Error{Kind::context, std::to_string(lengths_[slot] + count) + " tokens do not fit the context of " +
                                      std::to_string(context_) + ": shorten the text or open the model with a larger context"};
    }
    for (const int32_t token : sequence.tokens) {
      if (token < 0 || token >= model_->vocabulary) {
        return out_of("a token", token, ("the model knows 0 to " + std::to_string(model_->vocabulary - 1)).c_str());
      }
    }
  }
  return {};
}

Result<Stats> Decoder::step(std::span<const Sequence> sequences, Rows wanted, float* logits, float* hidden) {
  const auto begin = std::chrono::steady_clock::now();
  if (const auto error = check(sequences)) return *error;
  // A cancellation that comes too late for this step is not meant for the next one.
  const struct Begun {
    std::atomic<bool>& cancelled;
    ~Begun() { cancelled.store(false); }
  } begun{cancelled_};
  // Rows in the sequences' order; a chunk ends where kMostRows are reached, or before a block that would be cut.
  std::vector<Row> rows;
  std::vector<int64_t> lengths;  // of the sequences' slots, after the step
  std::vector<size_t> ends;
  std::vector<bool> results;
  size_t first = 0;
  for (const Sequence& sequence : sequences) {
    const int64_t start = lengths_[static_cast<size_t>(sequence.slot)], count = static_cast<int64_t>(sequence.tokens.size());
    lengths.push_back(start + count);
    if (sequence.bidirectional && rows.size() - first + static_cast<size_t>(count) > kMostRows) ends.push_back(first = rows.size());
    for (int64_t i = 0; i < count; ++i) {
      if (rows.size() - first == kMostRows) ends.push_back(first = rows.size());
      rows.push_back({sequence.slot, start + i, sequence.bidirectional ? start + count : start + i + 1, sequence.tokens[static_cast<size_t>(i)]});
      results.push_back(wanted == Rows::all || (wanted == Rows::last && i + 1 == count));
    }
  }
  ends.push_back(rows.size());

  const int64_t width = model_->width, most = std::min<int64_t>(kMostRows, static_cast<int64_t>(rows.size()));
  const struct Kept {
    std::unique_ptr<Scratch>& scratch;
    ~Kept() {
      if (scratch != nullptr && scratch->rows > kKeptRows) scratch.reset();
    }
  } kept{scratch_};
  Scratch& s = scratch(most);
  float* const heads = s.results.data();  // what the head reads
  first = 0;
  for (const size_t end : ends) {
    if (end == first) continue;
    if (auto error = forward(std::span(rows).subspan(first, end - first), s)) return *error;
    int64_t found = 0;
    for (size_t row = first; row < end; ++row) {
      if (!results[row]) continue;
      norm_rows(floats_, model_->output_norm, s.x.data() + static_cast<int64_t>(row - first) * width, 1, width, heads + found++ * width);
    }
    if (!finite(heads, found * width)) return not_finite("what the head reads");
    if (cancelled_.load(std::memory_order_relaxed)) return cancellation();
    if (logits != nullptr) {
      multiply_head(model_, kernels_.isa, heads, found, logits);
      if (!finite(logits, found * model_->vocabulary)) return not_finite("a logit");
      logits += found * model_->vocabulary;
    }
    if (hidden != nullptr) hidden = std::copy_n(heads, found * width, hidden);
    first = end;
  }
  if (cancelled_.load(std::memory_order_relaxed)) return cancellation();  // that came during the last head
  for (size_t i = 0; i < sequences.size(); ++i) lengths_[static_cast<size_t>(sequences[i].slot)] = lengths[i];
  const auto spent = std::chrono::steady_clock::now() - begin;
  const Stats step{1, static_cast<int64_t>(rows.size()), std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count()};
  stats_ = {stats_.steps + 1, stats_.tokens + step.tokens, stats_.nanoseconds + step.nanoseconds};
  return step;
}

std::optional<Error> Decoder::forward(std::span<const Row> rows, Scratch& s) {
  const Model& m = *model_;
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t pairs = m.head_width / 2;
  for (int64_t i = 0; i < count; ++i) {
    float* x = s.x.data() + i * m.width;
    float_row(m.embedding, rows[static_cast<size_t>(i)].token, x);
    for (int64_t j = 0; j < m.width; ++j) x[j] *= m.embedding_scale;
    float* turns = s.turns.data() + i * 4 * pairs;
    const auto position = static_cast<float>(rows[static_cast<size_t>(i)].position);
    for (const auto* frequencies : {&m.frequencies, &m.local_frequencies}) {
      if (frequencies == &m.local_frequencies && !local_rope_) break;
      for (int64_t j = 0; j < pairs; ++j) {
        const float angle = position * (*frequencies)[static_cast<size_t>(j)];
        turns[j] = std::cos(angle);
        turns[pairs + j] = std::sin(angle);
      }
      turns += 2 * pairs;
    }
  }
  for (size_t i = 0; i < m.layers.size(); ++i) {
    if (cancelled_.load(std::memory_order_relaxed)) return cancellation();
    const Layer& layer = m.layers[i];
    if (auto error = attend(layer, static_cast<int64_t>(i), rows, s)) return error;
    if (auto error = feed_forward(layer, count, s)) return error;
  }
  return {};
}

std::optional<Error> Decoder::attend(const Layer& layer, int64_t index, std::span<const Row> rows, Scratch& s) {
  const Model& m = *model_;
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t inner = m.heads * m.head_width, kv = m.kv_heads * m.head_width, pairs = m.head_width / 2;
  norm_rows(floats_, layer.attention_norm, s.x.data(), count, m.width, s.normed.data());
  if (auto error = apply({&layer.query, &layer.key, &layer.value}, s.normed.data(), count, {s.query.data(), s.key.data(), s.value.data()}, s)) {
    return error;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = rows[static_cast<size_t>(i)];
    const float* turns = s.turns.data() + i * 4 * pairs + (layer.local_rope ? 2 * pairs : 0);
    const auto prepare = [&](float* heads, int64_t number, const Norm& norm) {
      if (norm) norm_rows(floats_, norm, heads, number, m.head_width, heads);
      if (m.neighbour_rope) {
        rope_neighbours(heads, turns, turns + pairs, number, m.head_width);
      } else {
        floats_.rope(heads, turns, turns + pairs, number, m.head_width, pairs);
      }
    };
    prepare(s.query.data() + i * inner, m.heads, layer.query_norm);
    prepare(s.key.data() + i * kv, m.kv_heads, layer.key_norm);
    cache_->write(floats_, row.slot, index, row.position, s.key.data() + i * kv, s.value.data() + i * kv);
  }
  std::vector<Attended> seen;
  for (const Row& row : rows) {
    const int64_t first = layer.window > 0 ? std::max<int64_t>(0, row.position - layer.window + 1) : 0;
    seen.push_back({row.slot, first, layer.window > 0 ? std::min(row.visible, row.position + layer.window) : row.visible});
  }
  wf::attend(floats_, cache_, index, std::move(seen), m.heads, m.attention_scale, s.query.data(), s.attended.data());
  if (layer.attention_sub_norm) norm_rows(floats_, layer.attention_sub_norm, s.attended.data(), count, inner, s.attended.data());
  if (auto error = apply({&layer.output}, s.attended.data(), count, {s.projected.data()}, s)) return error;
  if (layer.post_attention_norm) norm_rows(floats_, layer.post_attention_norm, s.projected.data(), count, m.width, s.projected.data());
  floats_.accumulate(s.x.data(), s.projected.data(), count * m.width);
  return {};
}

std::optional<Error> Decoder::feed_forward(const Layer& layer, int64_t tokens, Scratch& s) {
  const Model& m = *model_;
  norm_rows(floats_, layer.mlp_norm, s.x.data(), tokens, m.width, s.normed.data());
  if (auto error = apply({&layer.gate, &layer.up}, s.normed.data(), tokens, {s.gate.data(), s.up.data()}, s)) return error;
  floats_.activate(m.activation, s.gate.data(), s.up.data(), tokens * m.ffn);
  if (layer.mlp_sub_norm) norm_rows(floats_, layer.mlp_sub_norm, s.gate.data(), tokens, m.ffn, s.gate.data());
  if (auto error = apply({&layer.down}, s.gate.data(), tokens, {s.projected.data()}, s)) return error;
  if (layer.post_mlp_norm) norm_rows(floats_, layer.post_mlp_norm, s.projected.data(), tokens, m.width, s.projected.data());
  floats_.accumulate(s.x.data(), s.projected.data(), tokens * m.width);
  return {};
}

// Layers that read the same input: together where none changes it first.
std::optional<Error> Decoder::apply(const std::vector<const Linear*>& layers, const float* x, int64_t tokens, const std::vector<float*>& y,
                                    Scratch& s) const {
  const bool together = std::none_of(layers.begin(), layers.end(), [](const Linear* layer) { return layer->changes_input(); });
  if (!together && layers.size() > 1) {
    for (size_t i = 0; i < layers.size(); ++i) {
      if (auto error = apply({layers[i]}, x, tokens, {y[i]}, s)) return error;
    }
    return {};
  }
  const int64_t columns = layers[0]->columns();
  if (!together) {
    norm_rows(floats_, layers[0]->norm, x, tokens, columns, s.prepared.data());
    for (int64_t token = 0; layers[0]->rotated && token < tokens; ++token) rotate(s.prepared.data() + token * columns, columns);
    x = s.prepared.data();
  }
  std::vector<SharedMatrix> matrices;
  for (const Linear* layer : layers) matrices.push_back(layer->matrix);
  if (multiply(kernels_, matrices, x, tokens, y) >= 0) {
    return not_finite("a layer's input");
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const Linear& layer = *layers[i];
    for (int64_t token = 0; token < tokens && !layer.bias.empty(); ++token) {
      floats_.accumulate(y[i] + token * layer.rows(), layer.bias.data(), layer.rows());
    }
    if (layer.correction != nullptr) add_low_rank(kernels_, layer.correction, x, tokens, y[i]);
  }
  return {};
}

Result<int64_t> Decoder::length(int64_t slot) const {
  if (slot < 0 || slot >= slots()) return out_of("slot", slot, "there is no such slot");
  return lengths_[static_cast<size_t>(slot)];
}

Result<int64_t> Decoder::truncate(int64_t slot, int64_t length) {
  const auto now = this->length(slot);
  if (!now) return now.error();
  if (length < 0 || length > *now) return out_of("the length", length, ("the slot holds " + std::to_string(*now) + " tokens").c_str());
  return lengths_[static_cast<size_t>(slot)] = length;
}

Result<int64_t> Decoder::copy(int64_t from, int64_t to, int64_t length) {
  const auto now = this->length(from), other = this->length(to);
  if (!now || !other) return (now ? other : now).error();
  if (length < 0 || length > *now) return out_of("the length", length, ("the slot holds " + std::to_string(*now) + " tokens").c_str());
  if (length > context_) return out_of("the length", length, ("a slot holds at most " + std::to_string(context_) + " tokens").c_str());
  if (from != to) cache_->copy(from, to, length);
  return lengths_[static_cast<size_t>(to)] = length;
}

}  // namespace wf
