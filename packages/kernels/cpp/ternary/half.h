// IEEE half precision without instructions for it. For code that is compiled for every processor.
#pragma once

#include <bit>
#include <cstdint>

namespace wf {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000U) << 16, rest = half & 0x7fffU;
  if (rest >= 0x7c00U) return std::bit_cast<float>(sign | 0x7f800000U | (rest & 0x3ffU) << 13);
  if (rest >= 0x0400U) return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000U));
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(rest) * 0x1p-24F));
}

// Rounds half to even; what is too large becomes infinity.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), rest = bits & 0x7fffffffU;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000U);
  if (rest > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (rest >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);
  // Adding 1/2 leaves the multiples of 2^-24 that a half below 2^-14 is, rounded by the addition.
  if (rest < 0x38800000U) return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5F) - 0x3f000000U));
  return static_cast<uint16_t>(sign | (rest - 0x38000000U + 0xfffU + (rest >> 13 & 1U)) >> 13);
}

}  // namespace wf
