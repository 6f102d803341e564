// Norm, rotary embedding and attention for the lanes of simd512.h, simd256.h or simd128.h, one of which
// comes before.
#pragma once

#include <math.h>

#include "ternary/floats.h"

namespace wf {
namespace {

constexpr int kKeys = 64;       // positions whose weights are computed before their values are added
constexpr int kKeysTogether = 4;
constexpr bool kFewRegisters = kLanes == 8;             // AVX2 has 16, the others 32
constexpr int kGroupHeads = kFewRegisters ? 2 : 4;      // query heads that share a key on its way to floats
constexpr int kValuesTogether = 4;                      // registers of a head's numbers that share a weight

void rms_norm(const float* x, const float* weight, int64_t columns, float epsilon, float* y) {
  // Four sums, so that none waits for the last addition.
  Floats squares[4] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Floats some = load_floats(x + i + j * kLanes);
      squares[j] = fma(some, some, squares[j]);
    }
  }
  for (; i < columns; i += kLanes) {
    const Floats some = load_some(x + i, columns - i);
    squares[0] = fma(some, some, squares[0]);
  }
  const float sum = sum_of(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  const Floats factor = all(1.0F / sqrtf(sum / static_cast<float>(columns) + epsilon));
  for (i = 0; i < columns; i += kLanes) {
    const Floats normed = multiply(load_some(x + i, columns - i), factor);
    store_some(y + i, weight == nullptr ? normed : multiply(normed, load_some(weight + i, columns - i)), columns - i);
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim, int64_t half) {
  for (int64_t head = 0; head < heads; ++head, x += head_dim) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t left = half - i;
      const Floats a = load_some(x + i, left), b = load_some(x + i + half, left);
      const Floats c = load_some(cos + i, left), s = load_some(sin + i, left);
      store_some(x + i, subtract(multiply(a, c), multiply(b, s)), left);
      store_some(x + i + half, add(multiply(b, c), multiply(a, s)), left);
    }
  }
}

// e^x within 2 units in the last place; beyond +-87, where float32 ends, as there. By 2^n * e^r, |r| <= ln 2 / 2, and Taylor's polynomial.
WF_INLINE Floats exponential(Floats x) {
  x = smaller(all(87.0F), larger(all(-87.0F), x));  // in this order, in which x86 keeps a NaN
  const Ints n = to_ints(multiply(x, all(1.44269504F)));
  const Floats whole = to_floats(n);
  Floats r = fma(whole, all(-0.693359375F), x);  // ln 2 in two parts, of which the first times n is exact
  r = fma(whole, all(2.12194440e-4F), r);
  Floats sum = all(1.0F / 5040);
  sum = fma(sum, r, all(1.0F / 720));
  sum = fma(sum, r, all(1.0F / 120));
  sum = fma(sum, r, all(1.0F / 24));
  sum = fma(sum, r, all(1.0F / 6));
  sum = fma(sum, r, all(0.5F));
  sum = fma(sum, r, all(1.0F));
  return times_power_of_two(fma(sum, r, all(1.0F)), n);
}

void store(const KvCache& cache, int64_t head, int64_t position, const float* key, const float* value) {
  const int64_t dim = cache.head_dim, at = cache.row(head, position) * dim;
  if (cache.type != KvType::f16 || dim % kLanes != 0) return store_kv(cache, head, position, key, value);
  for (int64_t i = 0; i < dim; i += kLanes) {
    store_halves(static_cast<uint16_t*>(cache.keys) + at + i, load_floats(key + i));
    store_halves(static_cast<uint16_t*>(cache.values) + at + i, load_floats(value + i));
  }
}

template <KvType kType>
WF_INLINE Floats load_kv(const void* rows, int64_t at) {
  if constexpr (kType == KvType::f32) return load_floats(static_cast<const float*>(rows) + at);
  if constexpr (kType == KvType::f16) return load_halves(static_cast<const uint16_t*>(rows) + at);
  return to_floats(widen_signed(static_cast<const int8_t*>(rows) + at));
}

// What online softmax keeps of a head.
struct Running {
  float largest, total;
};

// Turns `count` scores into weights relative to the largest so far, rescales the total, and returns what earlier sums are to be
// multiplied with. Weights from `count` to kKeys are zero.
WF_INLINE float weigh(float* scores, int count, Running& running) {
  for (int j = count; j < kKeys; ++j) scores[j] = -INFINITY;
  Floats top = all(running.largest);
  for (int j = 0; j < kKeys; j += kLanes) top = larger(top, load_floats(scores + j));
  const float largest = largest_of(top);
  Floats total = zeros();
  for (int j = 0; j < kKeys; j += kLanes) {
    const Floats weight = exponential(subtract(load_floats(scores + j), all(largest)));
    store_some(scores + j, weight, count - j);
    total = add(total, j + kLanes <= count ? weight : load_some(scores + j, count - j));
  }
  alignas(64) float earlier[kLanes];
  store_some(earlier, exponential(all(running.largest - largest)), kLanes);
  running = {largest, running.total * earlier[0] + sum_of(total)};
  return earlier[0];
}

// out = out * earlier + the weighted sum of `count` values, of the numbers [i, i + V * kLanes) of each head.
template <KvType kType, int H, int V>
WF_INLINE void add_values(const KvCache& cache, int64_t row, int count, int64_t i, const float (&weights)[H][kKeys], const float (&earlier)[H],
                          float* out) {
  const int64_t dim = cache.head_dim;
  Floats sum[H][V];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[h][v] = multiply(load_floats(out + h * dim + i + v * kLanes), all(earlier[h]));
  }
  for (int j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Floats value = load_kv<kType>(cache.values, (row + j) * dim + i + v * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sum[h][v] = fma(all(weights[h][j]), value, sum[h][v]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_some(out + h * dim + i + v * kLanes, sum[h][v], kLanes);
  }
}

// H query heads, one after the other in `q` and `out`.
template <KvType kType, int H>
void attention_heads(const KvCache& cache, int64_t kv_head, const float* q, int64_t first, int64_t last, float scale, float* out) {
  const int64_t dim = cache.head_dim;
  alignas(64) float scores[H][kKeys];
  Running running[H];
  for (int h = 0; h < H; ++h) running[h] = {-INFINITY, 0.0F};
  for (int64_t i = 0; i < H * dim; i += kLanes) store_some(out + i, zeros(), H * dim - i);
  for (int64_t begin = first; begin < last; begin += kKeys) {
    const int count = static_cast<int>(least(last - begin, kKeys));
    const int64_t row = cache.row(kv_head, begin);
    // Four keys together, so that no addition waits for the one before; the last one stands in for those beyond the end.
    for (int j = 0; j < count; j += kKeysTogether) {
      Floats sum[H][kKeysTogether];
      int64_t at[kKeysTogether];
      for (int k = 0; k < kKeysTogether; ++k) {
        at[k] = (row + least(j + k, count - 1)) * dim;
        // Values come next, from elsewhere.
        const auto* value = static_cast<const uint8_t*>(cache.values) + at[k] * bytes_of(kType);
        for (int64_t line = 0; line < dim * bytes_of(kType); line += 64) __builtin_prefetch(value + line);
        for (int h = 0; h < H; ++h) sum[h][k] = zeros();
      }
      for (int64_t i = 0; i < dim; i += kLanes) {
        Floats query[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) query[h] = load_floats(q + h * dim + i);
#pragma GCC unroll 4
        for (int k = 0; k < kKeysTogether; ++k) {
          const Floats key = load_kv<kType>(cache.keys, at[k] + i);
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h) sum[h][k] = fma(query[h], key, sum[h][k]);
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sums_of(sum[h], scores[h] + j);
    }
    for (int h = 0; h < H; ++h) {
      for (int j = 0; j < count; ++j) scores[h][j] *= kType == KvType::int8 ? scale * cache.key_scales[row + j] : scale;
    }
    float earlier[H];
    for (int h = 0; h < H; ++h) {
      earlier[h] = weigh(scores[h], count, running[h]);
      if constexpr (kType == KvType::int8) {
        for (int j = 0; j < count; ++j) scores[h][j] *= cache.value_scales[row + j];
      }
    }
    int64_t i = 0;
    for (; i + kValuesTogether * kLanes <= dim; i += kValuesTogether * kLanes) {
      add_values<kType, H, kValuesTogether>(cache, row, count, i, scores, earlier, out);
    }
    for (; i < dim; i += kLanes) add_values<kType, H, 1>(cache, row, count, i, scores, earlier, out);
  }
  if (last <= first) return;
  for (int h = 0; h < H; ++h) {
    for (int64_t i = 0; i < dim; i += kLanes) {
      float* at = out + h * dim + i;
      store_some(at, multiply(load_floats(at), all(1.0F / running[h].total)), kLanes);
    }
  }
}

template <KvType kType>
void attention_of(const KvCache& cache, int64_t kv_head, const float* q, int64_t group, int64_t first, int64_t last, float scale,
                  float* out) {
  const int64_t dim = cache.head_dim;
  int64_t head = 0;
  for (; head + kGroupHeads <= group; head += kGroupHeads) {
    attention_heads<kType, kGroupHeads>(cache, kv_head, q + head * dim, first, last, scale, out + head * dim);
  }
  q += head * dim;
  out += head * dim;
  if (kGroupHeads > 3 && group - head == 3) attention_heads<kType, 3>(cache, kv_head, q, first, last, scale, out);
  if (kGroupHeads > 2 && group - head == 2) attention_heads<kType, 2>(cache, kv_head, q, first, last, scale, out);
  if (group - head == 1) attention_heads<kType, 1>(cache, kv_head, q, first, last, scale, out);
}

void attention(const KvCache& cache, int64_t kv_head, const float* q, int64_t group, int64_t first, int64_t last, float scale,
               float* out) {
  if (cache.head_dim % kLanes != 0) return kScalarFloats.attention(cache, kv_head, q, group, first, last, scale, out);
  if (cache.type == KvType::f32) return attention_of<KvType::f32>(cache, kv_head, q, group, first, last, scale, out);
  if (cache.type == KvType::f16) return attention_of<KvType::f16>(cache, kv_head, q, group, first, last, scale, out);
  attention_of<KvType::int8>(cache, kv_head, q, group, first, last, scale, out);
}

// x / (1 + e^-inner)
WF_INLINE Floats gated(Floats x, Floats inner) { return divide(x, add(all(1.0F), exponential(subtract(zeros(), inner)))); }

template <typename Function>
WF_INLINE void activate_by(float* gate, const float* up, int64_t count, Function function) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_some(gate + i, multiply(function(load_some(gate + i, count - i)), load_some(up + i, count - i)), count - i);
  }
}

void activate(Activation kind, float* gate, const float* up, int64_t count) {
  switch (kind) {
    case Activation::silu:
      return activate_by(gate, up, count, [](Floats x) { return gated(x, x); });
    case Activation::relu2:
      return activate_by(gate, up, count, [](Floats x) {
        const Floats positive = larger(zeros(), x);
        return multiply(positive, positive);
      });
    case Activation::gelu_tanh:
      return activate_by(gate, up, count, [](Floats x) {
        return gated(x, multiply(all(kGeluInner), fma(multiply(all(kGeluCubic), x), multiply(x, x), x)));
      });
  }
}

float dot(const float* a, const float* b, int64_t count) {
  Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = fma(load_floats(a + i + j * kLanes), load_floats(b + i + j * kLanes), sums[j]);
  }
  for (; i < count; i += kLanes) sums[0] = fma(load_some(a + i, count - i), load_some(b + i, count - i), sums[0]);
  return sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void accumulate(float* y, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store_some(y + i, add(load_some(y + i, count - i), load_some(x + i, count - i)), count - i);
}

}  // namespace
}  // namespace wf
