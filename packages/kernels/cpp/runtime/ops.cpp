#include "runtime/ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace wf {
namespace {

// e^x within 2 units in the last place, in a form that compilers put into vectors: x = n ln 2 + r, a polynomial in r (Cephes), and n
// added to the exponent. Beyond +-87 as at +-87.
float exponential(float x) {
  constexpr float kRound = 0x1.8p23F;  // adding it leaves a whole number in the lowest bits
  x = std::min(std::max(x, -87.0F), 87.0F);
  const float shifted = x * 1.44269504F + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

}  // namespace

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

void activate(Activation kind, float* gate, const float* up, int64_t count) {
  switch (kind) {
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0F + exponential(-gate[i])) * up[i];
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
    scores[i] = exponential(scores[i] - largest);
    sum += scores[i];
  }
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
}

void add_scaled(float* y, const float* x, float alpha, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += alpha * x[i];
}

}  // namespace wf
