// The reference: what the other instruction sets are tested against. Sums are kept in double precision.
#include <algorithm>
#include <bit>
#include <cmath>

#include "ternary/floats.h"
#include "ternary/half.h"

namespace wf {
namespace {

void matmul_blocks(const BlockMatrix& w, const BlockActivations& activations, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const FloatActivations x(w, activations);
  // On the stack: threads of the pool run this, where memory that runs out would end the process.
  constexpr int64_t kColumns = 256;
  float weights[kColumns];
  double sums[kBlockTokens];
  for (int64_t row = begin * kPanelRows; row < std::min(end * kPanelRows, w.rows); ++row) {
    for (int64_t tile = 0; tile < token_tiles(x.tokens); ++tile) {
      const int64_t first = tile_begin(x.tokens, tile), tokens = tile_begin(x.tokens, tile + 1) - first;
      std::fill_n(sums, tokens, 0.0);
      for (int64_t column = 0; column < w.columns; column += kColumns) {
        const int64_t columns = std::min(kColumns, w.columns - column);
        unpack_columns(w, row, column, column + columns, weights);
        const float* inputs = x.x + first * w.columns + column * tokens;
        for (int64_t i = 0; i < columns; ++i) {
          for (int64_t token = 0; token < tokens; ++token) sums[token] += static_cast<double>(weights[i]) * static_cast<double>(*inputs++);
        }
      }
      for (int64_t token = 0; token < tokens; ++token) y[(first + token) * y_stride + row] = static_cast<float>(sums[token]);
    }
  }
}

void matmul_rows(RowType type, const uint8_t* rows, int64_t count, int64_t columns, const float* x, int64_t tokens, float* y,
                 int64_t y_stride) {
  const auto weight = [=](int64_t at) {
    if (type == RowType::f32) return reinterpret_cast<const float*>(rows)[at];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(rows)[at];
    return type == RowType::f16 ? half_to_float(bits) : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  };
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < count; ++row) {
      double sum = 0.0;
      for (int64_t i = 0; i < columns; ++i) sum += static_cast<double>(weight(row * columns + i)) * static_cast<double>(x[token * columns + i]);
      y[token * y_stride + row] = static_cast<float>(sum);
    }
  }
}

void rms_norm(const float* x, const float* weight, int64_t columns, float epsilon, float* y) {
  double squares = 0.0;
  for (int64_t i = 0; i < columns; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float factor = 1.0F / std::sqrt(static_cast<float>(squares / static_cast<double>(columns)) + epsilon);
  for (int64_t i = 0; i < columns; ++i) y[i] = x[i] * factor * (weight == nullptr ? 1.0F : weight[i]);
}

void rope(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim, int64_t half) {
  for (int64_t head = 0; head < heads; ++head, x += head_dim) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

double element(const KvCache& cache, const void* of, const float* scales, int64_t row, int64_t i) {
  const int64_t at = row * cache.head_dim + i;
  if (cache.type == KvType::f32) return static_cast<double>(static_cast<const float*>(of)[at]);
  if (cache.type == KvType::f16) return static_cast<double>(half_to_float(static_cast<const uint16_t*>(of)[at]));
  return static_cast<double>(static_cast<const int8_t*>(of)[at]) * static_cast<double>(scales[row]);
}

// Online softmax, of one position after the other. On the stack for the same reason: of some of a head's numbers at a time.
void attention(const KvCache& cache, int64_t kv_head, const float* q, int64_t group, int64_t first, int64_t last, float scale,
               float* out) {
  constexpr int64_t kNumbers = 256;
  const int64_t dim = cache.head_dim;
  double sums[kNumbers];
  for (int64_t head = 0; head < group; ++head, q += dim, out += dim) {
    for (int64_t begin = 0; begin < dim; begin += kNumbers) {
      const int64_t count = std::min(kNumbers, dim - begin);
      double largest = -HUGE_VAL, total = 0.0;
      std::fill_n(sums, count, 0.0);
      for (int64_t p = first; p < last; ++p) {
        const int64_t row = cache.row(kv_head, p);
        double score = 0.0;
        for (int64_t i = 0; i < dim; ++i) score += static_cast<double>(q[i]) * element(cache, cache.keys, cache.key_scales, row, i);
        score *= static_cast<double>(scale);
        if (score > largest) {
          const double earlier = std::exp(largest - score);
          total *= earlier;
          for (int64_t i = 0; i < count; ++i) sums[i] *= earlier;
          largest = score;
        }
        const double weight = std::exp(score - largest);
        total += weight;
        for (int64_t i = 0; i < count; ++i) sums[i] += weight * element(cache, cache.values, cache.value_scales, row, begin + i);
      }
      for (int64_t i = 0; i < count; ++i) out[begin + i] = last > first ? static_cast<float>(sums[i] / total) : 0.0F;
    }
  }
}

void activate(Activation kind, float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = gate[i];
    if (kind == Activation::relu2) {
      gate[i] = (x < 0.0F ? 0.0F : x) * (x < 0.0F ? 0.0F : x) * up[i];
    } else {
      const float inner = kind == Activation::silu ? x : kGeluInner * (x + kGeluCubic * x * x * x);
      gate[i] = x / (1.0F + std::exp(-inner)) * up[i];
    }
  }
}

float dot(const float* a, const float* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return static_cast<float>(sum);
}

void accumulate(float* y, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

}  // namespace

const FloatKernels kScalarFloats{float_bytes, arrange_floats, matmul_blocks, matmul_rows, rms_norm, rope, store_kv, attention, activate, dot, accumulate};

}  // namespace wf
