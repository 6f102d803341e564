#include "ternary/blocks_product.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ternary/floats.h"
#include "ternary/parallel.h"
#include "ternary/pool.h"

namespace wf {
namespace {

constexpr int64_t kLeastWork = 128 << 10;  // bytes of weights times tokens: less is not worth a chunk of its own
constexpr int64_t kChunksAThread = 8;
constexpr int64_t kPackPiece = 4 << 20;  // bytes that a thread packs before it asks for more

class BlockJob final : public Job {
 public:
  BlockJob(const FloatKernels& kernels, SharedBlocks matrix, const float* x, int64_t tokens, float* y)
      : kernels_(kernels), matrix_(std::move(matrix)), y_(y) {
    const BlockMatrix& w = matrix_->view;
    memory_ = allocate<std::byte>(kernels.arranged_bytes(w, tokens));
    kernels.arrange(w, x, tokens, memory_.get());
    x_ = {memory_.get(), tokens};
    const int64_t most = std::clamp<int64_t>(w.bytes() * tokens / kLeastWork, 1, std::min(kMostChunks, kChunksAThread * wf::threads()));
    size_ = ceil_div(w.panels(), std::min(most, w.panels()));
    chunks = ceil_div(w.panels(), size_);
  }

  int64_t result_bytes(int64_t chunk) const override {
    return rows_of(chunk).rows * x_.tokens * static_cast<int64_t>(sizeof(float));
  }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    const BlockMatrix part = rows_of(chunk);
    float* y = result == nullptr ? y_ + chunk * size_ * kPanelRows : reinterpret_cast<float*>(result);
    kernels_.matmul_blocks(part, x_, 0, part.panels(), y, result == nullptr ? matrix_->view.rows : part.rows);
  }

  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    const size_t bytes = static_cast<size_t>(rows_of(chunk).rows) * sizeof(float);
    for (int64_t token = 0; token < x_.tokens; ++token) {
      std::memcpy(y_ + token * matrix_->view.rows + chunk * size_ * kPanelRows, result + static_cast<size_t>(token) * bytes, bytes);
    }
  }

 private:
  // A chunk's panels as a matrix of their own.
  BlockMatrix rows_of(int64_t chunk) const {
    BlockMatrix part = matrix_->view;
    part.data += chunk * size_ * part.panel_bytes();
    part.rows = std::min(part.rows - chunk * size_ * kPanelRows, size_ * kPanelRows);
    return part;
  }

  const FloatKernels& kernels_;
  SharedBlocks matrix_;
  Buffer<std::byte> memory_;  // of x_
  BlockActivations x_{};
  float* y_;
  int64_t size_;  // panels a chunk
};

}  // namespace

OwnedBlocks::OwnedBlocks(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t columns)
    : view{nullptr, rows, columns, type} {
  data = allocate<uint8_t>(view.bytes());
  const int64_t piece = std::max<int64_t>(1, kPackPiece / std::max<int64_t>(1, view.panel_bytes()));
  in_pieces(view.panels(), piece, [&](int64_t begin, int64_t end) { pack_panels(view, rows_data, begin, end, data.get()); });
  view.data = data.get();
}

int64_t multiply_blocks(Isa isa, const SharedBlocks& matrix, const float* x, int64_t tokens, float* y) {
  const int64_t columns = matrix->view.columns;
  const auto* bad = std::find_if_not(x, x + tokens * columns, [](float value) { return std::isfinite(value); });
  if (bad != x + tokens * columns) return (bad - x) / columns;
  if (tokens > 0) run(std::make_shared<BlockJob>(float_kernels(isa), matrix, x, tokens, y));
  return -1;
}

}  // namespace wf
