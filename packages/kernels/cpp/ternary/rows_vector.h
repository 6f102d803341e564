// Products with rows of floats of two or four bytes, for the lanes of simd512.h, simd256.h or simd128.h, one of which comes before.
#pragma once

#include <string.h>

#include "ternary/floats.h"

namespace wf {
namespace {

constexpr int kRowsTogether = 4;                 // rows that share an activation
constexpr int kRowTokens = kLanes == 8 ? 2 : 4;  // tokens that share a weight; AVX2 has 16 registers

template <RowType kType>
WF_INLINE Floats load_row(const uint8_t* row, int64_t i) {
  if constexpr (kType == RowType::f32) return load_floats(reinterpret_cast<const float*>(row) + i);
  if constexpr (kType == RowType::f16) return load_halves(row + 2 * i);
  return load_brains(row + 2 * i);
}

// The last columns, which fill no register.
template <RowType kType>
WF_INLINE Floats load_rest(const uint8_t* row, int64_t i, int64_t columns) {
  alignas(64) uint8_t rest[kLanes * bytes_of(kType)] = {};
  memcpy(rest, row + i * bytes_of(kType), static_cast<size_t>((columns - i) * bytes_of(kType)));
  return load_row<kType>(rest, 0);
}

// R rows with T tokens. The order of a sum is the same for all R and T.
template <RowType kType, int R, int T>
void row_tile(const uint8_t* rows, int64_t columns, const float* x, float* y, int64_t y_stride) {
  const int64_t bytes = columns * bytes_of(kType), whole = columns / kLanes * kLanes;
  Floats sum[R][T];
  for (auto& row : sum) {
    for (auto& value : row) value = zeros();
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    Floats inputs[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) inputs[t] = load_floats(x + t * columns + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats weights = load_row<kType>(rows + r * bytes, i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[r][t] = fma(weights, inputs[t], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      if (whole < columns) {
        const Floats inputs = load_some(x + t * columns + whole, columns - whole);
        sum[r][t] = fma(load_rest<kType>(rows + r * bytes, whole, columns), inputs, sum[r][t]);
      }
      y[t * y_stride + r] = sum_of(sum[r][t]);
    }
  }
}

template <RowType kType, int T>
void row_tokens(const uint8_t* rows, int64_t count, int64_t columns, const float* x, int64_t tokens, float* y, int64_t y_stride) {
  const int64_t bytes = columns * bytes_of(kType);
  for (; tokens >= T; tokens -= T, x += T * columns, y += T * y_stride) {
    int64_t row = 0;
    for (; row + kRowsTogether <= count; row += kRowsTogether) row_tile<kType, kRowsTogether, T>(rows + row * bytes, columns, x, y + row, y_stride);
    for (; row < count; ++row) row_tile<kType, 1, T>(rows + row * bytes, columns, x, y + row, y_stride);
  }
  if constexpr (T > 1) row_tokens<kType, T - 1>(rows, count, columns, x, tokens, y, y_stride);
}

void matmul_rows(RowType type, const uint8_t* rows, int64_t count, int64_t columns, const float* x, int64_t tokens, float* y,
                 int64_t y_stride) {
  // Rows by groups that stay in the first-level cache while tokens pass.
  constexpr int64_t kGroupBytes = 16 << 10;
  const int64_t bytes = columns * bytes_of(type);
  const int64_t group = kGroupBytes / bytes < kRowsTogether ? kRowsTogether : kGroupBytes / bytes / kRowsTogether * kRowsTogether;
  for (int64_t row = 0; row < count; row += group, rows += group * bytes, y += group) {
    const int64_t some = least(count - row, group);
    switch (type) {
      case RowType::f32:
        row_tokens<RowType::f32, kRowTokens>(rows, some, columns, x, tokens, y, y_stride);
        break;
      case RowType::f16:
        row_tokens<RowType::f16, kRowTokens>(rows, some, columns, x, tokens, y, y_stride);
        break;
      case RowType::bf16:
        row_tokens<RowType::bf16, kRowTokens>(rows, some, columns, x, tokens, y, y_stride);
        break;
    }
  }
}

}  // namespace
}  // namespace wf
