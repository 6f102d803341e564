// Eight float32 lanes of AVX2, FMA and F16C under the names that simd512.h gives sixteen. Included inside files of one instruction set.
#pragma once

#include <immintrin.h>

#include "ternary/chunks.h"

namespace wf {
namespace {

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;

WF_INLINE Floats zeros() { return _mm256_setzero_ps(); }
WF_INLINE Floats all(float value) { return _mm256_set1_ps(value); }
WF_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
WF_INLINE Floats load_halves(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
WF_INLINE Floats load_brains(const void* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
}
WF_INLINE void store_halves(void* p, Floats value) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
WF_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(least(count, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
WF_INLINE Floats load_some(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
WF_INLINE void store_some(float* p, Floats value, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), value); }
WF_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
WF_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
WF_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
WF_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
WF_INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
WF_INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
WF_INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
WF_INLINE float largest_of(Floats value) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
WF_INLINE Ints to_ints(Floats value) { return _mm256_cvtps_epi32(value); }
WF_INLINE Floats times_power_of_two(Floats value, Ints power) {
  const Ints factor = _mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(value, _mm256_castsi256_ps(factor));
}
WF_INLINE float sum_of(Floats value) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The sums of four registers, to `out`.
WF_INLINE void sums_of(const Floats (&of)[4], float* out) {
  const __m256 all_four = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all_four), _mm256_extractf128_ps(all_four, 1)));
}

WF_INLINE Ints widen_signed(const void* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
WF_INLINE Ints widen_unsigned(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
WF_INLINE Floats to_floats(Ints value) { return _mm256_cvtepi32_ps(value); }
WF_INLINE Ints low_nibble(Ints value) { return _mm256_and_si256(value, _mm256_set1_epi32(15)); }
WF_INLINE Ints right(Ints value, unsigned by) { return _mm256_srli_epi32(value, static_cast<int>(by)); }
WF_INLINE Ints left(Ints value, unsigned by) { return _mm256_slli_epi32(value, static_cast<int>(by)); }
// Byte k of each lane, less a whole number: 2^23 + byte is a float with the byte in its lowest bits.
WF_INLINE Floats byte_less(Ints four, int k, float less) {
  const Ints byte = _mm256_and_si256(_mm256_srli_epi32(four, 8 * k), _mm256_set1_epi32(0xff));
  const Ints bits = _mm256_or_si256(byte, _mm256_set1_epi32(0x4b000000));
  return _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p23F + less));
}
WF_INLINE Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
WF_INLINE Ints bits_of(Ints value, int mask) { return _mm256_and_si256(value, _mm256_set1_epi32(mask)); }
// a | (b & mask)
WF_INLINE Ints with_bits(Ints a, Ints b, int mask) { return _mm256_or_si256(a, _mm256_and_si256(b, _mm256_set1_epi32(mask))); }

}  // namespace
}  // namespace wf
