#include "runtime/ops.h"

#include <algorithm>
#include <cmath>

namespace wf {

float dot(const float* a, const float* b, int64_t count) {
  constexpr int kLanes = 16;  // independent sums, which a compiler may keep in vectors
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += a[i] * b[i];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

void rms_norm(const float* x, const float* gain, float epsilon, int64_t count, float* out) {
  const float inverse = 1.0F / std::sqrt(dot(x, x, count) / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * inverse * gain[i];
}

void activate(Activation kind, float* gate, const float* up, int64_t count) {
  switch (kind) {
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0F + std::exp(-gate[i])) * up[i];
      return;
    case Activation::relu2:
      for (int64_t i = 0; i < count; ++i) {
        const float positive = std::max(gate[i], 0.0F);
        gate[i] = positive * positive * up[i];
      }
      return;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < count; ++i) {
        const float x = gate[i], inner = 0.7978845608028654F * (x + 0.044715F * x * x * x);
        gate[i] = 0.5F * x * (1.0F + std::tanh(inner)) * up[i];
      }
      return;
  }
}

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

void rope(float* head, int64_t width, const float* cos, const float* sin, bool neighbours) {
  const int64_t pairs = width / 2, step = neighbours ? 2 : 1, apart = neighbours ? 1 : pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    float &first = head[i * step], &second = head[i * step + apart];
    const float a = first, b = second;
    first = a * cos[i] - b * sin[i];
    second = b * cos[i] + a * sin[i];
  }
}

void softmax(float* scores, int64_t count) {
  const float largest = *std::max_element(scores, scores + count);
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = std::exp(scores[i] - largest);
    sum += scores[i];
  }
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
}

void add_scaled(float* y, const float* x, float alpha, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += alpha * x[i];
}

}  // namespace wf
