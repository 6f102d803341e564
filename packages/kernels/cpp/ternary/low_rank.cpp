#include "ternary/low_rank.h"

#include <algorithm>
#include <utility>

#include "ternary/low_rank_panels.h"
#include "ternary/pool.h"

namespace wf {
namespace {

// [outputs, inputs], strides in numbers, as panels.
template <typename T>
Buffer<std::byte> panels_of(const T* from, int64_t outputs, int64_t inputs, int64_t output_stride, int64_t input_stride) {
  const int64_t count = ceil_div(outputs, kPanelRows) * inputs * kPanelRows;
  auto memory = allocate<std::byte>(count * static_cast<int64_t>(sizeof(T)));
  T* to = reinterpret_cast<T*>(memory.get());
  for (int64_t first = 0; first < outputs; first += kPanelRows) {
    for (int64_t input = 0; input < inputs; ++input, to += kPanelRows) {
      for (int64_t i = 0; i < kPanelRows; ++i) {
        to[i] = first + i < outputs ? from[(first + i) * output_stride + input * input_stride] : T{0};
      }
    }
  }
  return memory;
}

PanelProduct panel_product_of([[maybe_unused]] const Kernels& kernels) {
#ifdef WF_X86
  if (kernels.isa == Isa::avx512 || kernels.isa == Isa::amx) return low_rank_avx512;
  if (kernels.isa == Isa::avx2 || kernels.isa == Isa::avxvnni) return low_rank_avx2;
#endif
  return low_rank_baseline;
}

// Work is counted in multiplications. A product of these is over in about 10 us, below which handing over brings nothing.
constexpr int64_t kLeastWork = 1 << 17;
constexpr int64_t kChunksAThread = 4;
static_assert(kChunksAThread * kMostThreads <= Job::kMostChunks);
constexpr int64_t kTileTokens = 4;  // that share what widening costs

int64_t bytes_of(AdapterType type) { return type == AdapterType::f16 ? 2 : type == AdapterType::f32 ? 4 : 1; }

// One of a correction's two products, Vᵀ x or U inner, cut into panels and, where these are few, into tokens.
class PanelJob final : public Job {
 public:
  // `x` [tokens, inputs, the rank padded to panels] is the job's; out has whole panels unless it is added to.
  PanelJob(PanelProduct product, std::shared_ptr<const LowRank> adapters, bool of_u, Buffer<float> x, int64_t tokens, float* out)
      : product_(product), adapters_(std::move(adapters)), of_u_(of_u), x_(std::move(x)), tokens_(tokens), out_(out) {
    const int64_t padded = adapters_->inner_stride();
    outputs_ = of_u ? adapters_->rows : adapters_->rank;
    inputs_ = of_u ? adapters_->rank : adapters_->columns;
    x_stride_ = of_u ? padded : inputs_;
    out_stride_ = of_u ? outputs_ : padded;
    const int64_t panels = ceil_div(outputs_, kPanelRows), tiles = ceil_div(tokens, kTileTokens);
    const int64_t wanted = std::clamp<int64_t>(outputs_ * inputs_ * tokens / kLeastWork, 1, kChunksAThread * wf::threads());
    panels_ = ceil_div(panels, std::min(panels, wanted));
    pieces_ = ceil_div(panels, panels_);
    tile_tokens_ = ceil_div(tiles, std::min(tiles, wanted / pieces_)) * kTileTokens;  // no more chunks than wanted
    chunks = pieces_ * ceil_div(tokens, tile_tokens_);
  }

  int64_t result_bytes(int64_t) const override { return tile_tokens_ * panels_ * kPanelRows * static_cast<int64_t>(sizeof(float)); }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    const Part part = part_of(chunk);
    const std::byte* panels = (of_u_ ? adapters_->u : adapters_->v).get() + part.first * inputs_ * bytes_of(adapters_->type);
    float* to = result == nullptr ? out_ + part.token * out_stride_ + part.first : reinterpret_cast<float*>(result);
    const int64_t stride = result == nullptr ? out_stride_ : panels_ * kPanelRows;
    product_(adapters_->type, panels, part.outputs, inputs_, x_.get() + part.token * x_stride_, x_stride_, part.tokens, to, stride,
             of_u_ && result == nullptr);
  }

  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    const Part part = part_of(chunk);
    const auto* from = reinterpret_cast<const float*>(result);
    for (int64_t token = part.token; token < part.token + part.tokens; ++token, from += panels_ * kPanelRows) {
      float* to = out_ + token * out_stride_ + part.first;
      for (int64_t i = 0; i < part.outputs; ++i) to[i] = of_u_ ? to[i] + from[i] : from[i];
    }
  }

 private:
  struct Part {
    int64_t first, outputs, token, tokens;
  };

  Part part_of(int64_t chunk) const {
    const int64_t first = chunk % pieces_ * panels_ * kPanelRows, token = chunk / pieces_ * tile_tokens_;
    return {first, std::min(outputs_ - first, panels_ * kPanelRows), token, std::min(tokens_ - token, tile_tokens_)};
  }

  PanelProduct product_;
  std::shared_ptr<const LowRank> adapters_;
  bool of_u_;
  Buffer<float> x_;
  int64_t tokens_, outputs_, inputs_, x_stride_, out_stride_;
  int64_t panels_, pieces_, tile_tokens_;  // panels of a chunk, chunks that have the same tokens, tokens of a chunk
  float* out_;
};

void scale(const LowRank& adapters, float* inner, int64_t tokens) {
  for (int64_t token = 0; token < tokens; ++token, inner += adapters.inner_stride()) {
    for (int64_t i = 0; i < adapters.rank; ++i) inner[i] *= adapters.scales[i];
  }
}

}  // namespace

LowRank::LowRank(AdapterType type_, const void* from_u, const void* from_v, const float* u_scales, const float* v_scales, int64_t rows_,
                 int64_t columns_, int64_t rank_)
    : scales(allocate<float>(rank_)), type(type_), rows(rows_), columns(columns_), rank(rank_) {
  const auto pack = [&](auto number) {
    using T = decltype(number);
    u = panels_of(static_cast<const T*>(from_u), rows, rank, rank, 1);
    v = panels_of(static_cast<const T*>(from_v), rank, columns, 1, rank);
  };
  if (type == AdapterType::f16) pack(uint16_t{});
  if (type == AdapterType::f32) pack(float{});
  if (type == AdapterType::i8) pack(int8_t{});
  for (int64_t i = 0; i < rank; ++i) {
    scales[i] = (u_scales == nullptr ? 1.0F : u_scales[i]) * (v_scales == nullptr ? 1.0F : v_scales[i]);
  }
}

void low_rank_baseline(AdapterType type, const void* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride,
                       int64_t tokens, float* out, int64_t out_stride, bool add) {
  either(type, panels, outputs, inputs, x, x_stride, tokens, out, out_stride, add);
}

void add_low_rank(const Kernels& kernels, const LowRank& adapters, const float* x, int64_t tokens, float* y) {
  const PanelProduct product = panel_product_of(kernels);
  const int64_t stride = adapters.inner_stride();
  const auto inner = allocate<float>(tokens * stride);
  product(adapters.type, adapters.v.get(), adapters.rank, adapters.columns, x, adapters.columns, tokens, inner.get(), stride, false);
  scale(adapters, inner.get(), tokens);
  product(adapters.type, adapters.u.get(), adapters.rows, adapters.rank, inner.get(), stride, tokens, y, adapters.rows, true);
}

void add_low_rank(const Kernels& kernels, const std::shared_ptr<const LowRank>& adapters, const float* x, int64_t tokens, float* y) {
  if (threads() == 1 || (adapters->rows + adapters->columns) * adapters->rank * tokens < 2 * kLeastWork) {
    add_low_rank(kernels, *adapters, x, tokens, y);
    return;
  }
  const PanelProduct product = panel_product_of(kernels);
  auto own = allocate<float>(tokens * adapters->columns), inner = allocate<float>(tokens * adapters->inner_stride());
  std::copy_n(x, tokens * adapters->columns, own.get());
  run(std::make_shared<PanelJob>(product, adapters, false, std::move(own), tokens, inner.get()));
  scale(*adapters, inner.get(), tokens);
  run(std::make_shared<PanelJob>(product, adapters, true, std::move(inner), tokens, y));
}

}  // namespace wf
