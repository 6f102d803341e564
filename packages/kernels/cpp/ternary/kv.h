// Keys and values of a layer, kept for the tokens to come.
#pragma once

#include <cstdint>

namespace wf {

enum class KvType : int { f16, int8 };

// Memory is the caller's. A head's positions follow each other.
struct KvCache {
  KvType type;
  int64_t heads, capacity, head_dim;
  void *keys, *values;                // [heads, capacity, head_dim], uint16_t or int8_t
  float *key_scales, *value_scales;   // of int8, [heads, capacity]: multiplies; null for f16

  int64_t row(int64_t head, int64_t position) const { return head * capacity + position; }
};

// Keeps a key and a value, [head_dim] each. f16 is rounded half to even; int8 has a scale a vector, absmax / 127.
void store_kv(const KvCache& cache, int64_t head, int64_t position, const float* key, const float* value);

}  // namespace wf
