#include "runtime/head.h"

#include <algorithm>
#include <cmath>

#include "ternary/pool.h"

namespace wf {
namespace {

constexpr int64_t kChunkNumbers = 64 << 10;  // weights of a chunk, at least

RowType row_type(Type type) { return type == Type::f32 ? RowType::f32 : type == Type::f16 ? RowType::f16 : RowType::bf16; }

class HeadJob final : public Job {
 public:
  HeadJob(const FloatKernels& floats, std::shared_ptr<const Model> model, const float* hidden, int64_t tokens, float* logits)
      : floats_(floats), model_(std::move(model)), hidden_(hidden, hidden + tokens * model_->width), tokens_(tokens), logits_(logits) {
    const int64_t most = std::min<int64_t>(model_->vocabulary, kMostChunks);
    chunks = std::clamp<int64_t>(model_->vocabulary * model_->width / kChunkNumbers, 1, most);
  }

  // Logits [tokens, words].
  int64_t result_bytes(int64_t chunk) const override {
    return tokens_ * (begin(chunk + 1) - begin(chunk)) * static_cast<int64_t>(sizeof(float));
  }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    const int64_t first = begin(chunk), count = begin(chunk + 1) - first, width = model_->width;
    const RowType type = row_type(model_->head.type);
    const auto* rows = reinterpret_cast<const uint8_t*>(model_->head.data.data()) + first * width * bytes_of(type);
    float* out = result == nullptr ? logits_ + first : reinterpret_cast<float*>(result);
    floats_.matmul_rows(type, rows, count, width, hidden_.data(), tokens_, out, result == nullptr ? model_->vocabulary : count);
  }

  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    const auto* from = reinterpret_cast<const float*>(result);
    const int64_t count = begin(chunk + 1) - begin(chunk);
    for (int64_t token = 0; token < tokens_; ++token) {
      std::copy_n(from + token * count, count, logits_ + token * model_->vocabulary + begin(chunk));
    }
  }

 private:
  int64_t begin(int64_t chunk) const { return chunk * model_->vocabulary / chunks; }

  const FloatKernels& floats_;
  std::shared_ptr<const Model> model_;
  std::vector<float> hidden_;
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
