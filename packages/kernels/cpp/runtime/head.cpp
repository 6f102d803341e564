#include "runtime/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/numbers.h"
#include "ternary/pool.h"

namespace wf {
namespace {

constexpr int64_t kChunkNumbers = 64 << 10;  // weights of a chunk, at least

class HeadJob final : public Job {
 public:
  HeadJob(const FloatKernels& floats, std::shared_ptr<const Model> model, const float* hidden, int64_t tokens, float* logits)
      : floats_(floats), model_(std::move(model)), hidden_(hidden, hidden + tokens * model_->width), own_row_(static_cast<size_t>(model_->width)),
        tokens_(tokens), logits_(logits) {
    const int64_t most = std::min<int64_t>(model_->vocabulary, kMostChunks);
    chunks = std::clamp<int64_t>(model_->vocabulary * model_->width / kChunkNumbers, 1, most);
  }

  // A row of floats, then the logits [tokens, words].
  int64_t result_bytes(int64_t chunk) const override {
    return (model_->width + tokens_ * (begin(chunk + 1) - begin(chunk))) * static_cast<int64_t>(sizeof(float));
  }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    if (result == nullptr) {  // the caller, of whom there is one
      words(chunk, own_row_.data(), logits_ + begin(chunk), model_->vocabulary);
    } else {
      auto* row = reinterpret_cast<float*>(result);
      words(chunk, row, row + model_->width, begin(chunk + 1) - begin(chunk));
    }
  }

  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    const float* from = reinterpret_cast<const float*>(result) + model_->width;
    const int64_t count = begin(chunk + 1) - begin(chunk);
    for (int64_t token = 0; token < tokens_; ++token) {
      std::copy_n(from + token * count, count, logits_ + token * model_->vocabulary + begin(chunk));
    }
  }

 private:
  int64_t begin(int64_t chunk) const { return chunk * model_->vocabulary / chunks; }

  void words(int64_t chunk, float* row, float* out, int64_t stride) const noexcept {
    for (int64_t word = begin(chunk); word < begin(chunk + 1); ++word, ++out) {
      float_row(model_->head, word, row);
      for (int64_t token = 0; token < tokens_; ++token) {
        out[token * stride] = floats_.dot(row, hidden_.data() + token * model_->width, model_->width);
      }
    }
  }

  const FloatKernels& floats_;
  std::shared_ptr<const Model> model_;
  std::vector<float> hidden_;
  mutable std::vector<float> own_row_;
  int64_t tokens_;
  float* logits_;
};

}  // namespace

void multiply_head(const std::shared_ptr<const Model>& model, Isa isa, const float* hidden, int64_t tokens, float* logits) {
  if (tokens == 0) return;
  if (model->head_blocks != nullptr) {
    multiply_blocks(isa, model->head_blocks, hidden, tokens, logits);
  } else {
    run(std::make_shared<HeadJob>(float_kernels(isa), model, hidden, tokens, logits));
  }
  const float cap = model->logit_cap;
  if (cap > 0) std::transform(logits, logits + tokens * model->vocabulary, logits, [=](float x) { return std::tanh(x / cap) * cap; });
}

}  // namespace wf
