#include "runtime/ops.h"

#include <cmath>

namespace wf {

void rotate(float* x, int64_t count) {
  const int64_t size = count & -count;
  const float scale = 1.0F / std::sqrt(static_cast<float>(size));
  for (float* block = x; block < x + count; block += size) {
    for (int64_t half = 1; half < size; half *= 2) {
      for (int64_t first = 0; first < size; first += 2 * half) {
        for (int64_t i = first; i < first + half; ++i) {
          const float a = block[i], b = block[i + half];
          block[i] = a + b;
          block[i + half] = a - b;
        }
      }
    }
    for (int64_t i = 0; i < size; ++i) block[i] *= scale;
  }
}

void rope_neighbours(float* x, const float* cos, const float* sin, int64_t heads, int64_t width) {
  for (int64_t head = 0; head < heads; ++head, x += width) {
    for (int64_t i = 0; i < width / 2; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }
}

}  // namespace wf
