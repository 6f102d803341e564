// The reference: what the other instruction sets are tested against.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ternary/ternary.h"

namespace wf {
namespace {

bool quantize(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums) {
  // The largest magnitude by its bits, whose order is that of the floats and puts infinity and NaN last.
  uint32_t largest = 0;
  for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU);
  if (largest >= 0x7f800000U) return false;
  const float inverse = 1.0F / std::max(std::bit_cast<float>(largest), 1e-5F) * 127.0F;
  *scale = 1.0F / inverse;
  std::memset(codes + columns, 0, static_cast<size_t>(stride - columns));
  for (int64_t group = 0; group * kGroup < columns; ++group) {
    int32_t sum = 0;
    for (int64_t i = group * kGroup; i < std::min(columns, (group + 1) * kGroup); ++i) {
      codes[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
      sum += codes[i];
    }
    sums[group] = sum;
  }
  return true;
}

// The integer sum of one row's codes [first, last) with one token's.
int32_t dot(const TernaryMatrix& w, int64_t row, const int8_t* x, int64_t first, int64_t last) {
  const uint8_t* codes = w.codes + row / kPanelRows * w.blocks() * kBlockBytes + row % kPanelRows * 4;
  int32_t sum = 0;
  for (int64_t column = first; column < last; ++column) {
    const int64_t inside = column % kBlockColumns;
    const uint8_t byte = codes[column / kBlockColumns * kBlockBytes + inside % 4];
    sum += ((byte >> inside / 4 * 2 & 3) - 1) * x[column];
  }
  return sum;
}

void matmul(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  for (int64_t token = 0; token < x.tokens; ++token) {
    const int8_t* codes = x.codes + token * x.stride;
    for (int64_t row = begin * kPanelRows; row < std::min(end * kPanelRows, w.rows); ++row) {
      float& out = y[token * y_stride + row];
      if (w.granularity == Granularity::group) {
        float sum = 0.0F;
        for (int64_t group = 0; group < w.groups(); ++group) {
          const int32_t part = dot(w, row, codes, group * kGroup, std::min(w.columns, (group + 1) * kGroup));
          sum += static_cast<float>(part) * w.group_scales(row / kPanelRows, group)[row % kPanelRows];
        }
        out = sum * x.scales[token];
      } else {
        const float scale = w.scales[w.granularity == Granularity::row ? row : 0];
        out = static_cast<float>(dot(w, row, codes, 0, w.columns)) * (x.scales[token] * scale);
      }
    }
  }
}

void matmul_integer(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y, int64_t y_stride) {
  for (int64_t token = 0; token < x.tokens; ++token) {
    for (int64_t row = begin * kPanelRows; row < std::min(end * kPanelRows, w.rows); ++row) {
      y[token * y_stride + row] = dot(w, row, x.codes + token * x.stride, 0, w.columns);
    }
  }
}

}  // namespace

const Kernels kScalar{Isa::scalar, quantize, matmul, matmul_integer};

}  // namespace wf
