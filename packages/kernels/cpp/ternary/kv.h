// Keys and values of a layer, kept for the tokens to come.
#pragma once

#include <cstdint>

namespace wf {

// f32 is what training computes with; f16 is rounded half to even; int8 has a scale a vector, absmax / 127.
enum class KvType : int { f32, f16, int8 };

// Memory is the caller's. A head's positions follow each other.
struct KvCache {
  KvType type;
  int64_t heads, capacity, head_dim;
  void *keys, *values;                // [heads, capacity, head_dim], float, uint16_t or int8_t
  float *key_scales, *value_scales;   // of int8, [heads, capacity]: multiplies; else unused

  int64_t row(int64_t head, int64_t position) const { return head * capacity + position; }
};

constexpr int64_t bytes_of(KvType type) { return type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1; }

// Keeps a key and a value, [head_dim] each.
void store_kv(const KvCache& cache, int64_t head, int64_t position, const float* key, const float* value);

}  // namespace wf
