// The kernels of 256-bit registers. A register holds eight rows of a block. The file that includes this says in the anonymous namespace
//   dot(sum, codes, x)   adds unsigned bytes times signed ones, neighbours summed, to lanes of 16 or 32 bits,
//   widen(sum)           32-bit lanes of four neighbours each,
//   kFlushBlocks         blocks after which one token's sums must be widened; groups, at 8, always fit,
//   kSliceBlocks         the same for tiles.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "ternary/chunks.h"

namespace wf {
namespace {

constexpr int64_t kTile = 4;      // tokens: with both halves of a panel, eight of the 16 registers
constexpr int kPrefetch = 5120;  // bytes ahead in each of the streams: these are few, and memory's latency is long

WF_INLINE __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

WF_INLINE __m256i broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// The same where it is used: held over two panels it would be the 17th register, and gcc would spill a sum in its place.
WF_INLINE __m256i broadcast_here(const int8_t* x) {
#ifdef __clang__
  return broadcast(x);
#else
  __m256i four;
  __asm__ volatile("vpbroadcastd %1, %0" : "=x"(four) : "m"(*reinterpret_cast<const char(*)[4]>(x)));
  return four;
#endif
}

// Lanes of the half of a panel that exist.
WF_INLINE __m256i rows_of(const TernaryMatrix& w, int64_t panel, int half) {
  const int64_t rows = least(w.rows - panel * kPanelRows, kPanelRows) - 8 * half;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Writes one half of a panel for one token: `sum` is of integers or, Output::grouped, of floats that lack only the token's scale.
template <Output kOutput>
WF_INLINE void store(const Product& product, int64_t panel, int half, int64_t token, __m256i sum) {
  const TernaryMatrix& w = product.w;
  const __m256i rows = rows_of(w, panel, half);
  if constexpr (kOutput == Output::integer) {
    _mm256_maskstore_epi32(result<int32_t>(product, panel, token) + 8 * half, rows, sum);
  } else {
    const __m256 own = _mm256_set1_ps(product.x.scales[token]);
    float* y = result<float>(product, panel, token) + 8 * half;
    if constexpr (kOutput == Output::grouped) {
      _mm256_maskstore_ps(y, rows, _mm256_mul_ps(_mm256_castsi256_ps(sum), own));
    } else {
      const __m256 scale = w.granularity == Granularity::row
                               ? _mm256_maskload_ps(w.scales + panel * kPanelRows + 8 * half, rows)
                               : _mm256_set1_ps(w.scales[0]);
      _mm256_maskstore_ps(y, rows, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(own, scale)));
    }
  }
}

// sum + part, where `part` is of one group and lacks the subtraction of the activations' own sum.
WF_INLINE __m256i add_group(__m256i sum, __m256i part, int32_t activations, const float* scales) {
  const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(part, _mm256_set1_epi32(activations)));
  return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(sum), _mm256_mul_ps(value, _mm256_loadu_ps(scales))));
}

// One token with P panels, `hop` apart. Of the planes 0 and 2 as of 1 and 3, which keep a factor of 4, one sum is kept.
template <Output kOutput, int P>
[[gnu::noinline]] void vector(const Product& product, int64_t panel, int64_t hop) {
  constexpr int64_t kStep = kOutput == Output::grouped ? kGroupBlocks : kFlushBlocks;
  const TernaryMatrix& w = product.w;
  const int64_t blocks = w.blocks(), bytes = hop * blocks * kBlockBytes;
  const uint8_t* codes = w.codes + panel * blocks * kBlockBytes;
  const int8_t* x = product.x.codes;
  const __m256i low = _mm256_set1_epi8(0x03), high = _mm256_set1_epi8(0x0c);
  __m256i sum[P][2];
  for (auto& both : sum) both[0] = both[1] = _mm256_set1_epi32(kOutput == Output::grouped ? 0 : -product.totals[0]);
  for (int64_t first = 0; first < blocks; first += kStep) {
    __m256i one[P][2], four[P][2];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) one[p][0] = one[p][1] = four[p][0] = four[p][1] = _mm256_setzero_si256();
    for (int64_t block = least(blocks - first, kStep); block > 0; --block) {
      const __m256i x0 = broadcast(x), x1 = broadcast(x + 4), x2 = broadcast(x + 8);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + p * bytes + kPrefetch), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i c = load(codes + p * bytes + 32 * half), d = _mm256_srli_epi16(c, 4);
          one[p][half] = dot(one[p][half], _mm256_and_si256(c, low), x0);
          four[p][half] = dot(four[p][half], _mm256_and_si256(c, high), x1);
          one[p][half] = dot(one[p][half], _mm256_and_si256(d, low), x2);
          four[p][half] = dot(four[p][half], _mm256_and_si256(d, high), broadcast_here(x + 12));
        }
      }
      codes += kBlockBytes;
      x += kBlockColumns;
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i part = _mm256_add_epi32(widen(one[p][half]), _mm256_srai_epi32(widen(four[p][half]), 2));
        if constexpr (kOutput == Output::grouped) {
          const int64_t group = first / kGroupBlocks;
          sum[p][half] = add_group(sum[p][half], part, product.x.sums[group], w.group_scales(panel + p * hop, group) + 8 * half);
        } else {
          sum[p][half] = _mm256_add_epi32(sum[p][half], part);
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int half = 0; half < 2; ++half) store<kOutput>(product, panel + p * hop, half, 0, sum[p][half]);
  }
}

// Panels [begin, end) in P streams: each is read from its part of the range on, far from the others, as a hardware prefetcher wants it.
template <Output kOutput, int P>
void vectors(const Product& product, int64_t begin, int64_t end) {
  const int64_t part = (end - begin) / P;
  for (int64_t panel = begin; panel < begin + part; ++panel) vector<kOutput, P>(product, panel, part);
  if constexpr (P > 1) vectors<kOutput, P / 2>(product, begin + part * P, end);
}

// Adds the products of unpacked codes, four columns of 16 rows a step, with T tokens to sums[token][half].
template <Output kOutput, int T>
WF_INLINE void tile(const __m256i* unpacked, int64_t steps, const Product& product, int64_t first, int64_t panel, int64_t token,
                    __m256i* sums) {
  const int64_t stride = product.x.stride;
  const int8_t* x = product.x.codes + token * stride + first * kBlockColumns;
  __m256i part[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) part[t][0] = part[t][1] = _mm256_setzero_si256();
  for (int64_t step = 0; step < steps; ++step) {
    const __m256i upper = unpacked[2 * step], lower = unpacked[2 * step + 1];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256i four = broadcast(x + t * stride);
      part[t][0] = dot(part[t][0], upper, four);
      part[t][1] = dot(part[t][1], lower, four);
    }
    x += 4;
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i& sum = sums[2 * (token + t) + half];
      if constexpr (kOutput == Output::grouped) {
        const int64_t group = first / kGroupBlocks;
        sum = add_group(sum, widen(part[t][half]), product.x.sums[(token + t) * product.w.groups() + group],
                        product.w.group_scales(panel, group) + 8 * half);
      } else {
        sum = _mm256_add_epi32(sum, widen(part[t][half]));
      }
    }
  }
}

// Several tokens with one panel, a slice of which is unpacked once for all of them.
template <Output kOutput>
[[gnu::noinline]] void panel_of(const Product& product, int64_t panel) {
  constexpr int64_t kStep = kOutput == Output::grouped ? kGroupBlocks : kSliceBlocks;
  const TernaryMatrix& w = product.w;
  const int64_t blocks = w.blocks(), tokens = product.x.tokens;
  const uint8_t* codes = w.codes + panel * blocks * kBlockBytes;
  const __m256i mask = _mm256_set1_epi8(0x03);
  __m256i unpacked[kStep * 8], sums[2 * kChunkTokens];
  for (int64_t token = 0; token < tokens; ++token) {
    sums[2 * token] = sums[2 * token + 1] = _mm256_set1_epi32(kOutput == Output::grouped ? 0 : -product.totals[token]);
  }
  for (int64_t first = 0; first < blocks; first += kStep) {
    const int64_t here = least(blocks - first, kStep);
    for (int64_t block = 0; block < here; ++block) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
      for (int half = 0; half < 2; ++half) {
        const __m256i c = load(codes + 32 * half);
        __m256i* out = unpacked + 8 * block + half;
        out[0] = _mm256_and_si256(c, mask);
        out[2] = _mm256_and_si256(_mm256_srli_epi16(c, 2), mask);
        out[4] = _mm256_and_si256(_mm256_srli_epi16(c, 4), mask);
        out[6] = _mm256_and_si256(_mm256_srli_epi16(c, 6), mask);
      }
      codes += kBlockBytes;
    }
    int64_t token = 0;
    for (; token + kTile <= tokens; token += kTile) tile<kOutput, kTile>(unpacked, 4 * here, product, first, panel, token, sums);
    if (tokens - token == 3) tile<kOutput, 3>(unpacked, 4 * here, product, first, panel, token, sums);
    if (tokens - token == 2) tile<kOutput, 2>(unpacked, 4 * here, product, first, panel, token, sums);
    if (tokens - token == 1) tile<kOutput, 1>(unpacked, 4 * here, product, first, panel, token, sums);
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int half = 0; half < 2; ++half) store<kOutput>(product, panel, half, token, sums[2 * token + half]);
  }
}

template <Output kOutput, typename Value>
void run(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, Value* y, int64_t y_stride) {
  for_chunks(w, x, y, y_stride, [=](const Product& product) {
    if (product.x.tokens == 1) {
      vectors<kOutput, kStreams>(product, begin, end);
    } else {
      for (int64_t panel = begin; panel < end; ++panel) panel_of<kOutput>(product, panel);
    }
  });
}

void matmul(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (w.granularity == Granularity::group) {
    run<Output::grouped>(w, x, begin, end, y, y_stride);
  } else {
    run<Output::scaled>(w, x, begin, end, y, y_stride);
  }
}

void matmul_integer(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y, int64_t y_stride) {
  run<Output::integer>(w, x, begin, end, y, y_stride);
}

int32_t sum_of(__m256i lanes) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// The largest magnitude by its bits, whose order is that of the floats and puts infinity and NaN last.
uint32_t largest_bits(const float* x, int64_t columns) {
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  alignas(32) uint32_t lanes[9];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  for (int lane = 1; lane < 8; ++lane) lanes[0] = lanes[lane] > lanes[0] ? lanes[lane] : lanes[0];
  for (; i < columns; ++i) {
    std::memcpy(lanes + 8, x + i, 4);
    lanes[8] &= 0x7fffffffU;
    lanes[0] = lanes[8] > lanes[0] ? lanes[8] : lanes[0];
  }
  return lanes[0];
}

bool quantize(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums) {
  const uint32_t top = largest_bits(x, columns);
  if (top >= 0x7f800000U) return false;
  float absmax;
  std::memcpy(&absmax, &top, 4);
  const float inverse = 1.0F / (absmax < 1e-5F ? 1e-5F : absmax) * 127.0F;
  *scale = 1.0F / inverse;
  const __m256 factor = _mm256_set1_ps(inverse);
  for (int64_t group = 0; group * kGroup < columns; ++group) {
    const int64_t end = least((group + 1) * kGroup, columns);
    int64_t i = group * kGroup;
    __m256i sum = _mm256_setzero_si256();
    for (; i + 16 <= end; i += 16) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), factor));
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      const __m128i packed = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), packed);
    }
    sums[group] = sum_of(sum);
    for (; i < end; ++i) {
      codes[i] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(x[i] * inverse)));
      sums[group] += codes[i];
    }
  }
  std::memset(codes + columns, 0, static_cast<size_t>(stride - columns));
  return true;
}

}  // namespace
}  // namespace wf
