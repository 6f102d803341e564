#include "ternary/roofline.h"

#include "ternary/ternary.h"

#ifdef WF_X86
#include <immintrin.h>
#endif

namespace wf {
namespace {

constexpr int64_t kStreams = 8, kStep = 128;  // fewer streams read slower: 2 by 5 to 10% on a Xeon

#ifdef WF_X86

[[gnu::target("avx512f")]] uint64_t read512(const uint8_t* memory, int64_t part) {
  __m512i sum[kStreams] = {};
  for (int64_t i = 0; i < part; i += kStep) {
#pragma GCC unroll 8
    for (int j = 0; j < kStreams; ++j) {
      const uint8_t* at = memory + j * part + i;
      sum[j] = _mm512_or_si512(sum[j], _mm512_or_si512(_mm512_load_si512(at), _mm512_load_si512(at + 64)));
    }
  }
  for (int j = 1; j < kStreams; ++j) sum[0] = _mm512_or_si512(sum[0], sum[j]);
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(sum[0])));
}

[[gnu::target("avx2")]] uint64_t read256(const uint8_t* memory, int64_t part) {
  __m256i sum[kStreams] = {};
  for (int64_t i = 0; i < part; i += kStep) {
#pragma GCC unroll 8
    for (int j = 0; j < kStreams; ++j) {
      const auto* at = reinterpret_cast<const __m256i*>(memory + j * part + i);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[j] = _mm256_or_si256(sum[j], _mm256_load_si256(at + k));
    }
  }
  for (int j = 1; j < kStreams; ++j) sum[0] = _mm256_or_si256(sum[0], sum[j]);
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm256_castsi256_si128(sum[0])));
}

[[gnu::target("avx512f,avx512vnni")]] void dot512(int64_t rounds) {
  __m512i sum[16] = {}, codes = _mm512_set1_epi8(1), x = _mm512_set1_epi8(2);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum[j]) : "v"(codes), "v"(x));
  }
}

[[gnu::target("avx2,avxvnni")]] void dot256(int64_t rounds) {
  __m256i sum[13] = {}, codes = _mm256_set1_epi8(1), x = _mm256_set1_epi8(2);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 13
    for (int j = 0; j < 13; ++j) __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[j]) : "x"(codes), "x"(x));
  }
}

// A tile is 16 rows of 64 bytes.
[[gnu::target("amx-tile,amx-int8")]] void tiles(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, unused[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  __asm__ volatile("" : : "r"(&shapes) : "memory");  // gcc takes the instruction to read a pointer's bytes only
  _tile_loadconfig(&shapes);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_release();
}

#endif

uint64_t read_words(const uint8_t* memory, int64_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(memory);
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) sum |= words[i];
  return sum;
}

}  // namespace

uint64_t roofline_read(const uint8_t* memory, int64_t bytes) {
#ifdef WF_X86
  const int64_t part = bytes / (kStreams * kStep) * kStep, rest = bytes - kStreams * part;
  if (available(Isa::avx512)) return read512(memory, part) | read_words(memory + kStreams * part, rest);
  if (available(Isa::avx2)) return read256(memory, part) | read_words(memory + kStreams * part, rest);
#endif
  return read_words(memory, bytes);
}

int64_t roofline_dot(int64_t count) {
#ifdef WF_X86
  if (available(Isa::avx512)) return dot512(ceil_div(count, 16)), ceil_div(count, 16) * 16 * 64 * 2;
  if (available(Isa::avxvnni)) return dot256(ceil_div(count, 13)), ceil_div(count, 13) * 13 * 32 * 2;
#else
  static_cast<void>(count);
#endif
  return 0;
}

int64_t roofline_tiles(int64_t count) {
#ifdef WF_X86
  if (available(Isa::amx)) return tiles(ceil_div(count, 4)), ceil_div(count, 4) * 4 * 16 * 16 * 64 * 2;
#else
  static_cast<void>(count);
#endif
  return 0;
}

}  // namespace wf
