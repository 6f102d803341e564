#include "ternary/kv.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ternary/half.h"

namespace wf {
namespace {

void store(const KvCache& cache, int64_t row, void* into, float* scales, const float* x) {
  if (cache.type == KvType::f32) {
    std::copy_n(x, cache.head_dim, static_cast<float*>(into) + row * cache.head_dim);
    return;
  }
  if (cache.type == KvType::f16) {
    std::transform(x, x + cache.head_dim, static_cast<uint16_t*>(into) + row * cache.head_dim, float_to_half);
    return;
  }
  float largest = 0.0F;
  bool finite = true;
  for (int64_t i = 0; i < cache.head_dim; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    finite = finite && std::isfinite(x[i]);
  }
  if (!finite) {  // no code stands for such a value: the scale does
    std::fill_n(static_cast<int8_t*>(into) + row * cache.head_dim, cache.head_dim, int8_t{0});
    scales[row] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  // Below, the inverse is beyond float32.
  const float inverse = largest > 127.0F / std::numeric_limits<float>::max() ? 127.0F / largest : 0.0F;
  scales[row] = largest / 127.0F;
  std::transform(x, x + cache.head_dim, static_cast<int8_t*>(into) + row * cache.head_dim,
                 [inverse](float value) { return static_cast<int8_t>(std::nearbyintf(value * inverse)); });
}

}  // namespace

void store_kv(const KvCache& cache, int64_t head, int64_t position, const float* key, const float* value) {
  store(cache, cache.row(head, position), cache.keys, cache.key_scales, key);
  store(cache, cache.row(head, position), cache.values, cache.value_scales, value);
}

}  // namespace wf
