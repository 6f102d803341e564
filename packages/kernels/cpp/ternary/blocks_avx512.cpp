// Products of digits (blocks_digits.h) by `vpdpbusd`.
#include <cstring>

#include "ternary/blocks_digits.h"

namespace wf {
namespace {

constexpr int kDigitTokens = 8;  // that share unpacked codes: 24 sums, which leaves registers for the codes
constexpr int kDigitPrefetch = 2048;
constexpr float kLargest = 127 * 65536 + 127 * 256 + 127;  // that three balanced digits hold

// sum + codes times four digits that all rows share
WF_INLINE __m512i dot(__m512i sum, __m512i codes, const int8_t* x) {
#ifdef __clang__
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
#else
  // gcc 12 copies every accumulator around the intrinsic.
  using Four = int32_t __attribute__((may_alias));
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
  return sum;
#endif
}

// T tokens with the panels panel, panel + hop, ... (P of them).
template <typename Type, int P, int T>
[[gnu::noinline]] void digit_tile(const BlockMatrix& w, const DigitActivations& x, int64_t panel, int64_t hop, int64_t token, float* y,
                                  int64_t y_stride) {
  const int64_t blocks = w.columns / (Type::kGroups * Type::kColumns), bytes = blocks * Type::kBytes;
  constexpr int kToken = 3 * Type::kColumns;  // bytes of a token's digits of a group
  const uint8_t* data = w.data + panel * bytes;
  const int8_t* digits = x.digits + token * kToken;
  const DigitGroup* groups = x.groups + token;
  __m512 sum[P][T];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[p][t] = _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int group = 0; group < Type::kGroups; ++group) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = data + p * hop * bytes + block * Type::kBytes;
        for (int line = 0; line < Type::kBytes / Type::kGroups; line += 64) {
          __builtin_prefetch(at + group * (Type::kBytes / Type::kGroups) + line + kDigitPrefetch);
        }
        __m512i part[T][3];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 3
          for (int d = 0; d < 3; ++d) part[t][d] = Type::kZero == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(groups[t].begin[d]);
        }
        Type::template codes<false>(at, group, [&](int i, __m512i codes) {
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
#pragma GCC unroll 3
            for (int d = 0; d < 3; ++d) part[t][d] = dot(part[t][d], codes, digits + t * kToken + d * Type::kColumns + 4 * i);
          }
        });
        const __m512 scale = Type::scale(at, group);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          sum[p][t] = Type::add_least(at, gain(sum[p][t], scale, part[t][0], part[t][1], part[t][2], groups[t]), groups[t]);
        }
      }
      digits += x.tokens * kToken;
      groups += x.tokens;
    }
  }
  for (int p = 0; p < P; ++p) {
    const int64_t row = (panel + p * hop) * kPanelRows;
    for (int t = 0; t < T; ++t) _mm512_mask_storeu_ps(y + (token + t) * y_stride + row, rows_from(w, row), sum[p][t]);
  }
}

// The same, the number of tokens being known only now: T at most.
template <typename Type, int P, int T>
WF_INLINE void digit_tile_of(int64_t tokens, const BlockMatrix& w, const DigitActivations& x, int64_t panel, int64_t hop, int64_t token, float* y,
                             int64_t y_stride) {
  if (tokens == T) {
    digit_tile<Type, P, T>(w, x, panel, hop, token, y, y_stride);
  } else if constexpr (T > 1) {
    digit_tile_of<Type, P, T - 1>(tokens, w, x, panel, hop, token, y, y_stride);
  }
}

// T tokens at most, with panels in P streams, far from each other: what few tokens need is memory.
template <typename Type, int P, int T>
int64_t digit_streams(const BlockMatrix& w, const DigitActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const int64_t part = (end - begin) / P;
  for (int64_t panel = begin; panel < begin + part; ++panel) digit_tile_of<Type, P, T>(x.tokens, w, x, panel, part, 0, y, y_stride);
  return begin + part * P;
}

template <typename Type>
void digit_panels(const BlockMatrix& w, const DigitActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (x.tokens == 1) begin = digit_streams<Type, 4, 1>(w, x, begin, end, y, y_stride);
  if (x.tokens == 2 || x.tokens == 3) begin = digit_streams<Type, 4, 3>(w, x, begin, end, y, y_stride);
  const int64_t tiles = ceil_div(x.tokens, kDigitTokens);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t token = x.tokens * i / tiles;
      digit_tile_of<Type, 1, kDigitTokens>(x.tokens * (i + 1) / tiles - token, w, x, panel, 0, token, y, y_stride);
    }
  }
}

// The power of two that makes whole numbers of a group's activations, and zero where they are.
float factor_of(const float* x, int64_t columns) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < columns; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  const float top = _mm512_reduce_max_ps(largest);
  uint32_t bits;
  std::memcpy(&bits, &top, 4);
  if (bits == 0) return 0.0F;
  // The largest is in [2^e, 2^(e + 1)), and 2^(22 - e) makes it one in [2^22, 2^23). Where it is below 2^-104, no float is large enough.
  const auto exponent = static_cast<int32_t>(bits >> 23) - 127;
  bits = static_cast<uint32_t>(127 + 22 - (exponent < -104 ? -104 : exponent)) << 23;
  float factor;
  std::memcpy(&factor, &bits, 4);
  return top * factor > kLargest ? 0.5F * factor : factor;
}

}  // namespace

int64_t digit_bytes(const BlockMatrix& w, int64_t tokens) {
  return tokens * 3 * w.columns + (tokens * w.groups() + kDigitGroupsBeyond) * static_cast<int64_t>(sizeof(DigitGroup));
}

void arrange_digits(const BlockMatrix& w, const float* x, int64_t tokens, void* out) {
  const DigitActivations made(w, {out, tokens});
  auto* digits = const_cast<int8_t*>(made.digits);
  auto* groups = const_cast<DigitGroup*>(made.groups);
  const int64_t columns = w.group_columns();
  const int zero = w.type == BlockType::q8_0 ? Q8Digits::kZero : w.type == BlockType::q6_k ? Q6Digits::kZero : Q4Digits::kZero;
  const __m512i half = _mm512_set1_epi32(128);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t group = 0; group < w.groups(); ++group) {
      const float* from = x + token * w.columns + group * columns;
      const float factor = factor_of(from, columns);
      int8_t* to = digits + (group * tokens + token) * 3 * columns;
      __m512i of_high = _mm512_setzero_si512(), of_middle = of_high, of_low = of_high;
      for (int64_t i = 0; i < columns; i += 16) {
        const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(factor)));
        const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(number, half), 8), high = _mm512_srai_epi32(_mm512_add_epi32(above, half), 8);
        const __m512i middle = _mm512_sub_epi32(above, _mm512_slli_epi32(high, 8)), low = _mm512_sub_epi32(number, _mm512_slli_epi32(above, 8));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + columns + i), _mm512_cvtepi32_epi8(middle));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * columns + i), _mm512_cvtepi32_epi8(low));
        of_high = _mm512_add_epi32(of_high, high);
        of_middle = _mm512_add_epi32(of_middle, middle);
        of_low = _mm512_add_epi32(of_low, low);
      }
      const int32_t all[3] = {_mm512_reduce_add_epi32(of_high), _mm512_reduce_add_epi32(of_middle), _mm512_reduce_add_epi32(of_low)};
      const int32_t sum = all[0] * 65536 + all[1] * 256 + all[2];  // at most 32 * 2^23
      const float scale = factor > 0.0F ? 1.0F / factor : 0.0F;
      groups[group * tokens + token] = {{-zero * all[0], -zero * all[1], -zero * all[2]}, scale, scale * static_cast<float>(sum)};
    }
  }
}

void matmul_digits(const BlockMatrix& w, const BlockActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const DigitActivations digits(w, x);
  switch (w.type) {
    case BlockType::q8_0:
      return digit_panels<Q8Digits>(w, digits, begin, end, y, y_stride);
    case BlockType::q6_k:
      return digit_panels<Q6Digits>(w, digits, begin, end, y, y_stride);
    case BlockType::q4_1:
      return digit_panels<Q4Digits>(w, digits, begin, end, y, y_stride);
  }
}

}  // namespace wf
