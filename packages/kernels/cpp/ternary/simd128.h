// Four float32 lanes of NEON under the names that simd256.h gives eight of AVX2. Included inside files of one instruction set.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "ternary/chunks.h"

namespace wf {
namespace {

using Floats = float32x4_t;
using Ints = int32x4_t;
constexpr int kLanes = 4;

WF_INLINE Floats zeros() { return vdupq_n_f32(0.0F); }
WF_INLINE Floats all(float value) { return vdupq_n_f32(value); }
WF_INLINE Floats load_floats(const float* p) { return vld1q_f32(p); }
WF_INLINE Floats load_halves(const void* p) {
  uint16x4_t halves;
  std::memcpy(&halves, p, 8);
  return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}
WF_INLINE Floats load_brains(const void* p) {
  uint16x4_t brains;
  std::memcpy(&brains, p, 8);
  return vreinterpretq_f32_u32(vshll_n_u16(brains, 16));
}
WF_INLINE void store_halves(void* p, Floats value) {
  const float16x4_t halves = vcvt_f16_f32(value);
  std::memcpy(p, &halves, 8);
}
WF_INLINE Floats load_some(const float* p, int64_t count) {
  if (count >= 4) return vld1q_f32(p);
  float lanes[4] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
WF_INLINE void store_some(float* p, Floats value, int64_t count) {
  if (count >= 4) return vst1q_f32(p, value);
  float lanes[4];
  vst1q_f32(lanes, value);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
WF_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
WF_INLINE Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
WF_INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
WF_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
WF_INLINE Floats larger(Floats a, Floats b) { return vmaxq_f32(a, b); }
WF_INLINE Floats smaller(Floats a, Floats b) { return vminq_f32(a, b); }
WF_INLINE Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
WF_INLINE float largest_of(Floats value) { return vmaxvq_f32(value); }
WF_INLINE float sum_of(Floats value) { return vaddvq_f32(value); }
// The sums of four registers, to `out`.
WF_INLINE void sums_of(const Floats (&of)[4], float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(of[0], of[1]), vpaddq_f32(of[2], of[3])));
}
WF_INLINE Ints to_ints(Floats value) { return vcvtnq_s32_f32(value); }
WF_INLINE Floats times_power_of_two(Floats value, Ints power) {
  return vmulq_f32(value, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(power, vdupq_n_s32(127)), 23)));
}

WF_INLINE Ints widen_signed(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
WF_INLINE Ints widen_unsigned(const void* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}
WF_INLINE Floats to_floats(Ints value) { return vcvtq_f32_s32(value); }
WF_INLINE Ints low_nibble(Ints value) { return vandq_s32(value, vdupq_n_s32(15)); }
// What comes in from above is of no use.
WF_INLINE Ints right(Ints value, unsigned by) { return vshlq_s32(value, vdupq_n_s32(-static_cast<int>(by))); }
WF_INLINE Ints left(Ints value, unsigned by) { return vshlq_s32(value, vdupq_n_s32(static_cast<int>(by))); }
// Byte k of each lane, less a whole number: 2^23 + byte is a float with the byte in its lowest bits.
WF_INLINE Floats byte_less(Ints four, int k, float less) {
  const Ints byte = vandq_s32(k == 0 ? four : right(four, static_cast<unsigned>(8 * k)), vdupq_n_s32(0xff));
  return vsubq_f32(vreinterpretq_f32_s32(vorrq_s32(byte, vdupq_n_s32(0x4b000000))), vdupq_n_f32(0x1p23F + less));
}
WF_INLINE Ints load_ints(const void* p) {
  int32x4_t value;
  std::memcpy(&value, p, 16);
  return value;
}
WF_INLINE Ints bits_of(Ints value, int mask) { return vandq_s32(value, vdupq_n_s32(mask)); }
// a | (b & mask)
WF_INLINE Ints with_bits(Ints a, Ints b, int mask) { return vorrq_s32(a, vandq_s32(b, vdupq_n_s32(mask))); }

}  // namespace
}  // namespace wf
