// The loop of low_rank.h, for each file that compiles it with its own flags: registers of 16 floats, which compilers cut as they need.
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "ternary/low_rank.h"

namespace wf {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

[[gnu::always_inline]] inline void widen(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }

// With instructions for it, and without: both are exact, also for what is subnormal in float16.
[[gnu::always_inline]] inline void widen(const uint16_t* from, Floats& to) {
#ifdef __AVX512F__
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  std::memcpy(&to, &wide, sizeof to);
#elif defined(__F16C__)
  for (int half = 0; half < 2; ++half) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * half)));
    std::memcpy(reinterpret_cast<float*>(&to) + 8 * half, &wide, sizeof wide);
  }
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits);
  const Bits moved = (bits & 0x8000U) << 16 | (bits & 0x7fffU) << 13;
  std::memcpy(&to, &moved, sizeof to);
  to *= 0x1p112F;  // the exponents' difference
#endif
}

[[gnu::always_inline]] inline void widen(const int8_t* from, Floats& to) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  to = __builtin_convertvector(bytes, Floats);
}

// T tokens, which share what widening costs. Four sums in turn, so that none waits for the one before.
template <int T, typename Value>
void panel_products(const Value* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride, float* out,
                    int64_t out_stride, bool add) {
  constexpr int kSums = 4;
  for (int64_t first = 0; first < outputs; first += kPanelRows) {
    Floats sums[T][kSums] = {};
    const Value* panel = panels + first * inputs;
    int64_t input = 0;
    for (; input + kSums <= inputs; input += kSums) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) {
        Floats w;
        widen(panel + (input + k) * kPanelRows, w);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums[t][k] += w * x[t * x_stride + input + k];
      }
    }
    for (; input < inputs; ++input) {
      Floats w;
      widen(panel + input * kPanelRows, w);
      for (int t = 0; t < T; ++t) sums[t][0] += w * x[t * x_stride + input];
    }
    const int64_t left = outputs - first < kPanelRows ? outputs - first : kPanelRows;
    for (int t = 0; t < T; ++t) {
      const Floats sum = (sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]);
      float* to = out + t * out_stride + first;
      if (!add) {
        std::memcpy(to, &sum, sizeof sum);
      } else if (left == kPanelRows) {
        Floats before;
        std::memcpy(&before, to, sizeof before);
        before += sum;
        std::memcpy(to, &before, sizeof before);
      } else {
        for (int64_t i = 0; i < left; ++i) to[i] += sum[i];
      }
    }
  }
}

template <typename Value>
void all_tokens(const Value* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride, int64_t tokens, float* out,
                int64_t out_stride, bool add) {
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) {
    panel_products<4>(panels, outputs, inputs, x + token * x_stride, x_stride, out + token * out_stride, out_stride, add);
  }
  for (; token < tokens; ++token) {
    panel_products<1>(panels, outputs, inputs, x + token * x_stride, x_stride, out + token * out_stride, out_stride, add);
  }
}

void either(AdapterType type, const void* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride, int64_t tokens,
            float* out, int64_t out_stride, bool add) {
  if (type == AdapterType::f16) {
    all_tokens(static_cast<const uint16_t*>(panels), outputs, inputs, x, x_stride, tokens, out, out_stride, add);
  } else if (type == AdapterType::f32) {
    all_tokens(static_cast<const float*>(panels), outputs, inputs, x, x_stride, tokens, out, out_stride, add);
  } else {
    all_tokens(static_cast<const int8_t*>(panels), outputs, inputs, x, x_stride, tokens, out, out_stride, add);
  }
}

}  // namespace
}  // namespace wf
