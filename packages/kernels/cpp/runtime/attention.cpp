#include "runtime/attention.h"

#include <algorithm>
#include <cstring>

#include "ternary/pool.h"

namespace wf {
namespace {

constexpr int64_t kParallelWork = 4 << 20;  // numbers of keys and values times query heads: about 100 µs, which pay for waking a thread
constexpr int64_t kChunksAThread = 8;

// A unit of work is a token's heads that share a head of keys and values.
//
// A worker that comes late may read positions that are being overwritten by a later step: of the numbers that it makes of them, the pool
// lets nothing through (pool.h). The cache's memory is there as long as the job.
class AttentionJob final : public Job {
 public:
  AttentionJob(const FloatKernels& kernels, std::shared_ptr<const Cache> cache, int64_t layer, std::vector<Attended> tokens, int64_t heads,
               float scale, const float* queries, float* out)
      : kernels_(kernels), cache_(std::move(cache)), tokens_(std::move(tokens)), layer_(layer), scale_(scale), out_(out) {
    const CacheShape& shape = cache_->shape();
    kv_heads_ = shape.heads;
    group_ = heads / shape.heads;
    size_ = group_ * shape.head_width;
    units_ = static_cast<int64_t>(tokens_.size()) * kv_heads_;
    queries_.assign(queries, queries + units_ * size_);
    chunks = std::min({units_, kMostChunks, kChunksAThread * threads()});
  }

  int64_t result_bytes(int64_t chunk) const override { return (begin(chunk + 1) - begin(chunk)) * size_ * static_cast<int64_t>(sizeof(float)); }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    float* out = result == nullptr ? out_ + begin(chunk) * size_ : reinterpret_cast<float*>(result);
    for (int64_t unit = begin(chunk); unit < begin(chunk + 1); ++unit, out += size_) {
      const Attended& token = tokens_[static_cast<size_t>(unit / kv_heads_)];
      const KvCache view = cache_->view(token.slot, layer_);
      kernels_.attention(view, unit % kv_heads_, queries_.data() + unit * size_, group_, token.first, token.end, scale_, out);
    }
  }

  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    std::memcpy(out_ + begin(chunk) * size_, result, static_cast<size_t>(result_bytes(chunk)));
  }

 private:
  int64_t begin(int64_t chunk) const { return chunk * units_ / chunks; }

  const FloatKernels& kernels_;
  std::shared_ptr<const Cache> cache_;
  std::vector<Attended> tokens_;
  std::vector<float> queries_;
  int64_t layer_, kv_heads_, group_, size_, units_;
  float scale_;
  float* out_;
};

// Asks for the first keys that a head is going to read, of which hardware learns only when it sees the second or third.
void prefetch_keys(const KvCache& cache, int64_t head, const Attended& token) {
  constexpr int64_t kMostBytes = 8 << 10;
  const int64_t bytes = cache.head_dim * bytes_of(cache.type);
  const auto* keys = static_cast<const std::byte*>(cache.keys) + cache.row(head, token.first) * bytes;
  for (int64_t line = 0; line < std::min((token.end - token.first) * bytes, kMostBytes); line += 64) __builtin_prefetch(keys + line);
}

}  // namespace

void attend(const FloatKernels& kernels, const std::shared_ptr<const Cache>& cache, int64_t layer, std::vector<Attended> tokens, int64_t heads,
            float scale, const float* queries, float* out) {
  const CacheShape& shape = cache->shape();
  int64_t work = 0;
  for (const Attended& token : tokens) work += 2 * (token.end - token.first) * heads * shape.head_width;
  if (threads() > 1 && work >= kParallelWork) {
    run(std::make_shared<AttentionJob>(kernels, cache, layer, std::move(tokens), heads, scale, queries, out));
    return;
  }
  const int64_t group = heads / shape.heads, size = group * shape.head_width;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const Attended& token = tokens[i];
    const KvCache view = cache->view(token.slot, layer);
    for (int64_t kv = 0; kv < shape.heads; ++kv, queries += size, out += size) {
      if (kv + 1 < shape.heads) {
        prefetch_keys(view, kv + 1, token);
      } else if (i + 1 < tokens.size() && tokens[i + 1].slot != token.slot) {
        prefetch_keys(cache->view(tokens[i + 1].slot, layer), 0, tokens[i + 1]);
      }
      kernels.attention(view, kv, queries, group, token.first, token.end, scale, out);
    }
  }
}

}  // namespace wf
