// The reference: what the other instruction sets are tested against. Sums are kept in double precision.
#include <algorithm>
#include <memory>

#include "ternary/floats.h"
#include "ternary/memory.h"

namespace wf {
namespace {

void matmul_blocks(const BlockMatrix& w, const FloatActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const auto weights = allocate<float>(w.columns);
  for (int64_t row = begin * kPanelRows; row < std::min(end * kPanelRows, w.rows); ++row) {
    unpack_row(w, row, weights.get());
    for (int64_t token = 0; token < x.tokens; ++token) {
      double sum = 0.0;
      for (int64_t i = 0; i < w.columns; ++i) sum += static_cast<double>(weights[i]) * static_cast<double>(x.x[token * x.stride + i]);
      y[token * y_stride + row] = static_cast<float>(sum);
    }
  }
}

}  // namespace

const FloatKernels kScalarFloats{matmul_blocks};

}  // namespace wf
