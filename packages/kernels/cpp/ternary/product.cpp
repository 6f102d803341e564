#include "ternary/product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ternary/pool.h"

namespace wf {
namespace {

// Work is counted in bytes of weights that one token's product reads: about 25 to a nanosecond. More tokens cost arithmetic.
constexpr int64_t kTokensForABlock = 4;
constexpr int64_t kLeastChunk = 128 << 10;    // a new chunk starts without prefetching, which costs half a microsecond
constexpr int64_t kStreams = 4;                // kernels read as many panels at once
constexpr int64_t kParallelWork = 256 << 10;  // below, from the caches, handing over costs a tenth of the product and brings nothing

int64_t work_of(const TernaryMatrix& w, int64_t tokens) { return w.bytes() * (kTokensForABlock + tokens - 1) / kTokensForABlock; }

// The rows of panels [begin, end) as a matrix of their own.
TernaryMatrix slice(const TernaryMatrix& w, int64_t begin, int64_t end) {
  TernaryMatrix part = w;
  const int64_t first = begin * kPanelRows;
  part.codes += begin * w.blocks() * kBlockBytes;
  if (w.granularity == Granularity::row) part.scales += first;
  if (w.granularity == Granularity::group) part.scales += first * w.groups();
  part.rows = std::min(end * kPanelRows, w.rows) - first;
  return part;
}

void product(const Kernels& kernels, const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t stride) {
  kernels.matmul(w, x, begin, end, y, stride);
}

void product(const Kernels& kernels, const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y,
             int64_t stride) {
  kernels.matmul_integer(w, x, begin, end, y, stride);
}

template <typename T>
class ProductJob final : public Job {
 public:
  ProductJob(const Kernels& kernels, const std::vector<SharedMatrix>& matrices, std::shared_ptr<const OwnedActivations> x,
             const std::vector<T*>& y)
      : kernels_(kernels), matrices_(matrices), x_(std::move(x)), y_(y) {
    parts_.reserve(16);
    for (size_t i = 0; i < matrices.size(); ++i) add(i, kMostChunks - static_cast<int64_t>(matrices.size() - 1 - i));
  }

  int64_t result_bytes(int64_t chunk) const override {
    const Part& part = parts_[static_cast<size_t>(chunk)];
    return (part.end - part.begin) * kPanelRows * x_->view.tokens * static_cast<int64_t>(sizeof(T));
  }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    const auto& [matrix, begin, end] = parts_[static_cast<size_t>(chunk)];
    const TernaryMatrix& w = matrices_[matrix]->view;
    if (result == nullptr) {
      product(kernels_, w, x_->view, begin, end, y_[matrix], w.rows);
    } else {
      const TernaryMatrix rows = slice(w, begin, end);
      product(kernels_, rows, x_->view, 0, rows.panels(), reinterpret_cast<T*>(result), rows.rows);
    }
  }

  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    const auto& [matrix, begin, end] = parts_[static_cast<size_t>(chunk)];
    const TernaryMatrix& w = matrices_[matrix]->view;
    const int64_t rows = slice(w, begin, end).rows;
    const size_t bytes = static_cast<size_t>(rows) * sizeof(T);
    for (int64_t token = 0; token < x_->view.tokens; ++token) {
      std::memcpy(y_[matrix] + token * w.rows + begin * kPanelRows, result + static_cast<size_t>(token) * bytes, bytes);
    }
  }

 private:
  // Cuts a matrix into chunks: half of what is left is cut in as many as there are threads, again and again, so that chunks are long,
  // but the last ones short, and threads finish together.
  void add(size_t matrix, int64_t most) {
    const TernaryMatrix& w = matrices_[matrix]->view;
    const int64_t panels = w.panels(), a_round = threads();
    const int64_t least = std::clamp<int64_t>(panels * kLeastChunk / work_of(w, x_->view.tokens), 1, panels);
    for (int64_t begin = 0, in_round = 0, size = 0; begin < panels; ++in_round) {
      if (in_round % a_round == 0) size = ceil_div(std::max(least, (panels - begin) / (2 * a_round)), kStreams) * kStreams;
      const int64_t left = panels - begin;
      const int64_t end = chunks == most - 1 || left < size + least / 2 ? panels : begin + size;
      parts_.push_back({matrix, begin, end});
      ++chunks;
      begin = end;
    }
  }

  struct Part {
    size_t matrix;
    int64_t begin, end;  // panels
  };
  const Kernels& kernels_;
  std::vector<SharedMatrix> matrices_;
  std::shared_ptr<const OwnedActivations> x_;
  std::vector<T*> y_;
  std::vector<Part> parts_;
};

template <typename T>
int64_t multiply_as(const Kernels& kernels, const std::vector<SharedMatrix>& matrices, const float* x, int64_t tokens,
                    const std::vector<T*>& y) {
  if (matrices.empty() || tokens == 0) return -1;
  int64_t work = 0;
  for (const auto& matrix : matrices) work += work_of(matrix->view, tokens);
  const int64_t columns = matrices[0]->view.columns;
  if (work < kParallelWork || threads() == 1 || static_cast<int64_t>(matrices.size()) > Job::kMostChunks) {
    const OwnedActivations quantized(kernels, x, tokens, columns);
    for (size_t i = 0; i < matrices.size(); ++i) {
      const TernaryMatrix& w = matrices[i]->view;
      product(kernels, w, quantized.view, 0, w.panels(), y[i], w.rows);
    }
    return quantized.bad;
  }
  const auto quantized = std::make_shared<const OwnedActivations>(kernels, x, tokens, columns);
  run(std::make_shared<ProductJob<T>>(kernels, matrices, quantized, y));
  return quantized->bad;
}

}  // namespace

OwnedActivations::OwnedActivations(const Kernels& kernels, const float* x, int64_t tokens, int64_t columns) {
  // An odd number of cache lines, so that several tokens' same columns do not share a set of the first-level cache.
  const int64_t stride = (ceil_div(columns, 64) | 1) * 64, groups = ceil_div(columns, kGroup);
  memory_.reset(new std::byte[static_cast<size_t>(63 + tokens * (stride + 4 + 4 * groups))]);
  const auto aligned = (reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64;
  auto* codes = reinterpret_cast<int8_t*>(aligned);
  auto* scales = reinterpret_cast<float*>(codes + tokens * stride);
  auto* sums = reinterpret_cast<int32_t*>(scales + tokens);
  for (int64_t token = 0; token < tokens; ++token) {
    int8_t* of_token = codes + token * stride;
    if (!kernels.quantize(x + token * columns, columns, stride, of_token, scales + token, sums + token * groups)) {
      std::memset(of_token, 0, static_cast<size_t>(stride));
      std::fill_n(sums + token * groups, groups, 0);
      scales[token] = std::numeric_limits<float>::quiet_NaN();
      if (bad < 0) bad = token;
    }
  }
  view = {codes, scales, sums, tokens, stride};
}

int64_t multiply(const Kernels& kernels, const std::vector<SharedMatrix>& matrices, const float* x, int64_t tokens,
                 const std::vector<float*>& y) {
  return multiply_as(kernels, matrices, x, tokens, y);
}

int64_t multiply_integer(const Kernels& kernels, const std::vector<SharedMatrix>& matrices, const float* x, int64_t tokens,
                         const std::vector<int32_t*>& y) {
  return multiply_as(kernels, matrices, x, tokens, y);
}

}  // namespace wf
