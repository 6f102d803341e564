// Products of blocks.h in whole numbers, for AVX-512: activations of 24 bits in three signed bytes, each of which is multiplied exactly.
// Included by files of that instruction set, each of which makes the sums in its own way and gets the same.
//
// A group's activations are 2^-k (65536 high + 256 middle + low), k being the largest at which all fit: what is within a factor of 2 of
// the largest is exact, and nothing is further off than 2^-23 of the largest. That is what sums of float32 cost, too, but takes a third
// of the instructions: a register holds 64 codes, where it holds 16 floats.
#pragma once

#include <immintrin.h>

#include "ternary/blocks.h"
#include "ternary/chunks.h"

namespace wf {

// Of a token's group.
struct DigitGroup {
  int32_t begin[3];  // minus the code of zero times the sum of the digits: where sums of codes as they lie begin
  float scale, sum;  // 2^-k, and the sum of the activations
};

constexpr int64_t kDigitGroupsBeyond = 15;

// A matrix's activations as digits.
struct DigitActivations {
  const int8_t* digits;      // [groups, tokens, 3, columns of a group]: high, middle, low
  const DigitGroup* groups;  // [groups, tokens], and as many beyond as a tile of tokens may read for nothing
  int64_t tokens;

  DigitActivations(const BlockMatrix& w, const BlockActivations& x)
      : digits(static_cast<const int8_t*>(x.data)),
        groups(reinterpret_cast<const DigitGroup*>(digits + 3 * w.columns * x.tokens)),
        tokens(x.tokens) {}
};

// As FloatKernels has them.
int64_t digit_bytes(const BlockMatrix& w, int64_t tokens);
void arrange_digits(const BlockMatrix& w, const float* x, int64_t tokens, void* out);
void matmul_digits(const BlockMatrix& w, const BlockActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride);
void matmul_digits_in_tiles(const BlockMatrix& w, const BlockActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride);

namespace {

WF_INLINE __m512 halves_at(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
WF_INLINE __m512i bytes_of_all(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// Four columns of 16 rows, [4][16], as [16][4].
WF_INLINE __m512i neighbours(const uint8_t* p) {
  const __m512i rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i inside = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(rows, _mm512_loadu_si512(p)), inside);
}

// `sum` and what it gains from a group of weights of `scale`, whose sums of codes times digits these are: whole numbers below 2^31 first,
// then floats, in the same order wherever the sums come from.
WF_INLINE __m512 gain(__m512 sum, __m512 scale, __m512i high, __m512i middle, __m512i low, const DigitGroup& x) {
  const __m512i rest = _mm512_add_epi32(_mm512_slli_epi32(middle, 8), low);
  const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0F), _mm512_cvtepi32_ps(rest));
  return _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.scale)), whole, sum);
}

// Each type: `codes` calls use(i, codes) for the i-th four columns of a group, of 16 rows, as unsigned bytes whose zero is kZero, or as
// signed ones (not of Q6_K, for which nobody asks); `scale` makes a group's factor, and `add_least` adds what the types' least weights make of a token's activations.
struct Q8Digits {
  static constexpr int kGroups = 1, kColumns = 32, kBytes = 544, kZero = 128;
  WF_INLINE static __m512 scale(const uint8_t* block, int) { return halves_at(block); }
  WF_INLINE static __m512 add_least(const uint8_t*, __m512 sum, const DigitGroup&) { return sum; }
  template <bool kSigned, typename Use>
  WF_INLINE static void codes(const uint8_t* block, int, Use use) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i four = neighbours(block + 32 + 64 * i);
      use(i, kSigned ? four : _mm512_xor_si512(four, bytes_of_all(0x80)));
    }
  }
};

struct Q4Digits {
  static constexpr int kGroups = 1, kColumns = 32, kBytes = 320, kZero = 0;
  WF_INLINE static __m512 scale(const uint8_t* block, int) { return halves_at(block); }
  WF_INLINE static __m512 add_least(const uint8_t* block, __m512 sum, const DigitGroup& x) {
    return _mm512_fmadd_ps(halves_at(block + 32), _mm512_set1_ps(x.sum), sum);
  }
  template <bool kSigned, typename Use>
  WF_INLINE static void codes(const uint8_t* block, int, Use use) {
    const __m512i nibble = bytes_of_all(0x0f);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i both = neighbours(block + 64 + 64 * i);
      use(i, _mm512_and_si512(both, nibble));
      use(i + 4, _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble));
    }
  }
};

struct Q6Digits {
  static constexpr int kGroups = 16, kColumns = 16, kBytes = 3392, kZero = 32;
  WF_INLINE static __m512 scale(const uint8_t* block, int group) {
    const __m512i factor = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 32 + 16 * group)));
    return _mm512_mul_ps(halves_at(block), _mm512_cvtepi32_ps(factor));
  }
  WF_INLINE static __m512 add_least(const uint8_t*, __m512 sum, const DigitGroup&) { return sum; }
  template <bool kSigned, typename Use>
    requires(!kSigned)
  WF_INLINE static void codes(const uint8_t* block, int group, Use use) {
    const uint8_t* at = block + 320 + 192 * group;
    const __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64), high = _mm512_loadu_si512(at + 128);
    const __m512i nibble = bytes_of_all(0x0f), pair = bytes_of_all(0x30);
    const auto both = [&](__m512i low, __m512i upper) {
      return _mm512_ternarylogic_epi32(_mm512_and_si512(low, nibble), upper, pair, 0xf8);  // a | (b & c)
    };
    use(0, both(first, _mm512_slli_epi32(high, 4)));
    use(1, both(second, _mm512_slli_epi32(high, 2)));
    use(2, both(_mm512_srli_epi32(first, 4), high));
    use(3, both(_mm512_srli_epi32(second, 4), _mm512_srli_epi32(high, 2)));
  }
};

WF_INLINE __mmask16 rows_from(const BlockMatrix& w, int64_t row) {
  return static_cast<__mmask16>((1U << least(w.rows - row, kPanelRows)) - 1);
}

}  // namespace
}  // namespace wf
