// Sixteen float32 lanes of AVX-512 under the names that simd256.h gives eight of AVX2, but for what only products of blocks need. Included inside files of one instruction set.
#pragma once

#include <immintrin.h>

#include "ternary/chunks.h"

namespace wf {
namespace {

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;

WF_INLINE Floats zeros() { return _mm512_setzero_ps(); }
WF_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
WF_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
WF_INLINE Floats load_halves(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
WF_INLINE Floats load_brains(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
}
WF_INLINE void store_halves(void* p, Floats value) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
WF_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }
WF_INLINE Floats load_some(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
WF_INLINE void store_some(float* p, Floats value, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), value); }
WF_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
WF_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
WF_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
WF_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
WF_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
WF_INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
WF_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
WF_INLINE float largest_of(Floats value) { return _mm512_reduce_max_ps(value); }
WF_INLINE Ints to_ints(Floats value) { return _mm512_cvtps_epi32(value); }
WF_INLINE Floats times_power_of_two(Floats value, Ints power) {
  const Ints factor = _mm512_slli_epi32(_mm512_add_epi32(power, _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(value, _mm512_castsi512_ps(factor));
}
WF_INLINE float sum_of(Floats value) { return _mm512_reduce_add_ps(value); }
// The sums of four registers, to `out`.
WF_INLINE void sums_of(const Floats (&of)[4], float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
  const __m512 all_four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all_four), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all_four), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

WF_INLINE Ints widen_signed(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
WF_INLINE Floats to_floats(Ints value) { return _mm512_cvtepi32_ps(value); }

}  // namespace
}  // namespace wf
