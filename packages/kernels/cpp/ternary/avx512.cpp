// AVX-512 with VNNI. A register holds a block; `vpdpbusd` multiplies one of its planes with four activations that all 16 rows share,
// so that sums never cross lanes.
#include <immintrin.h>

#include <cstring>

#include "ternary/chunks.h"

namespace wf {
namespace {

constexpr int64_t kFlushBlocks = 32'768;  // one token's plane 3 gains at most 4 * 128 * 127 a block: below 2^31
constexpr int kPrefetch = 2048;           // bytes ahead in each of the streams

// sum + codes (unsigned bytes) times x (signed bytes), four neighbours to a lane.
WF_INLINE __m512i dot(__m512i sum, __m512i codes, __m512i x) {
#ifdef __clang__
  return _mm512_dpbusd_epi32(sum, codes, x);
#else
  // gcc 12 copies every accumulator around the intrinsic, which halves the speed.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
#endif
}

WF_INLINE __m512i broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

WF_INLINE __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// Adds codes times x of P panels, `hop` bytes apart, and one token. Planes stay where they are in their bytes, which multiplies them by
// 1, 4, 16 and 64: a mask each and no shift, and one division, which is exact, at the end. At most kFlushBlocks blocks.
template <int P>
WF_INLINE void accumulate(const uint8_t* codes, int64_t hop, int64_t blocks, const int8_t* x, int64_t, __m512i (&sum)[P][1]) {
  __m512i planes[P][4];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) planes[p][k] = k == 0 ? sum[p][0] : _mm512_setzero_si512();
  }
  const __m512i masks[4] = {bytes(0x03), bytes(0x0c), bytes(0x30), bytes(0xc0)};
  for (int64_t block = 0; block < blocks; ++block) {
    const __m512i four[4] = {broadcast(x), broadcast(x + 4), broadcast(x + 8), broadcast(x + 12)};
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + p * hop + kPrefetch), _MM_HINT_T0);
      const __m512i block_codes = _mm512_load_si512(codes + p * hop);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) planes[p][k] = dot(planes[p][k], _mm512_and_si512(block_codes, masks[k]), four[k]);
    }
    codes += kBlockBytes;
    x += kBlockColumns;
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const __m512i low = _mm512_add_epi32(planes[p][0], _mm512_srai_epi32(planes[p][1], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(planes[p][2], 4), _mm512_srai_epi32(planes[p][3], 6));
    sum[p][0] = _mm512_add_epi32(low, high);
  }
}

// The same for T tokens, `stride` apart, which share what shifting and masking a plane costs.
template <int P, int T>
WF_INLINE void accumulate(const uint8_t* codes, int64_t hop, int64_t blocks, const int8_t* x, int64_t stride, __m512i (&sum)[P][T]) {
  const __m512i mask = bytes(0x03);
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i block_codes[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + p * hop + kPrefetch), _MM_HINT_T0);
      block_codes[p] = _mm512_load_si512(codes + p * hop);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      __m512i plane[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        plane[p] = _mm512_and_si512(block_codes[p], mask);
        block_codes[p] = _mm512_srli_epi32(block_codes[p], 2);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512i four = broadcast(x + t * stride + 4 * k);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum[p][t] = dot(sum[p][t], plane[p], four);
      }
    }
    codes += kBlockBytes;
    x += kBlockColumns;
  }
}

WF_INLINE __mmask16 rows_left(const TernaryMatrix& w, int64_t panel) {
  const int64_t rows = w.rows - panel * kPanelRows;
  return static_cast<__mmask16>(rows >= kPanelRows ? 0xffff : (1 << rows) - 1);
}

// T tokens from `token` on with the panels panel, panel + hop, ... (P of them).
template <Output kOutput, int P, int T>
WF_INLINE void tile(const Product& product, int64_t panel, int64_t hop, int64_t token) {
  const TernaryMatrix& w = product.w;
  const int64_t blocks = w.blocks(), groups = w.groups(), stride = product.x.stride;
  const uint8_t* codes = w.codes + panel * blocks * kBlockBytes;
  const int8_t* x = product.x.codes + token * stride;
  if constexpr (kOutput == Output::grouped) {
    __m512 sum[P][T];
    for (auto& row : sum) {
      for (auto& value : row) value = _mm512_setzero_ps();
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * kGroupBlocks, left = blocks - first;
      __m512i part[P][T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) part[p][t] = _mm512_set1_epi32(-product.x.sums[(token + t) * groups + group]);
      }
      accumulate(codes + first * kBlockBytes, hop * blocks * kBlockBytes, least(left, kGroupBlocks),
                 x + first * kBlockColumns, stride, part);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512 scale = _mm512_loadu_ps(w.group_scales(panel + p * hop, group));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[p][t] = _mm512_add_ps(sum[p][t], _mm512_mul_ps(_mm512_cvtepi32_ps(part[p][t]), scale));
      }
    }
    for (int p = 0; p < P; ++p) {
      const int64_t own = panel + p * hop;
      for (int t = 0; t < T; ++t) {
        float* y = result<float>(product, own, token + t);
        _mm512_mask_storeu_ps(y, rows_left(w, own), _mm512_mul_ps(sum[p][t], _mm512_set1_ps(product.x.scales[token + t])));
      }
    }
  } else {
    __m512i sum[P][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[p][t] = _mm512_set1_epi32(-product.totals[token + t]);
    }
    for (int64_t first = 0; first < blocks; first += kFlushBlocks) {
      const int64_t left = blocks - first;
      accumulate(codes + first * kBlockBytes, hop * blocks * kBlockBytes, least(left, kFlushBlocks),
                 x + first * kBlockColumns, stride, sum);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const int64_t own = panel + p * hop;
      const __mmask16 rows = rows_left(w, own);
      if constexpr (kOutput == Output::integer) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          int32_t* y = result<int32_t>(product, own, token + t);
          _mm512_mask_storeu_epi32(y, rows, sum[p][t]);
        }
      } else {
        const __m512 scale = w.granularity == Granularity::row ? _mm512_maskz_loadu_ps(rows, w.scales + own * kPanelRows)
                                                               : _mm512_set1_ps(w.scales[0]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          float* y = result<float>(product, own, token + t);
          const __m512 both = _mm512_mul_ps(_mm512_set1_ps(product.x.scales[token + t]), scale);
          _mm512_mask_storeu_ps(y, rows, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[p][t]), both));
        }
      }
    }
  }
}

template <Output kOutput, int P, int T>
[[gnu::noinline]] void tiles(const Product& product, int64_t begin, int64_t end, int64_t hop, int64_t token) {
  for (int64_t panel = begin; panel < end; ++panel) tile<kOutput, P, T>(product, panel, hop, token);
}

// The same, the number of tokens being known only now: T at most.
template <Output kOutput, int P, int T>
WF_INLINE void tiles_of(int64_t tokens, const Product& product, int64_t begin, int64_t end, int64_t hop, int64_t token) {
  if (tokens == T) {
    tiles<kOutput, P, T>(product, begin, end, hop, token);
  } else if constexpr (T > 1) {
    tiles_of<kOutput, P, T - 1>(tokens, product, begin, end, hop, token);
  }
}

// Panels [begin, end) in P streams: each is read from its part of the range on, far from the others, as a hardware prefetcher wants it.
template <Output kOutput, int P, int64_t T>
void panels(const Product& product, int64_t begin, int64_t end) {
  const int64_t part = (end - begin) / P, tokens = product.x.tokens;
  const int64_t tiles = ceil_div(tokens, kTileTokens);
  if (tiles == 1) {
    tiles_of<kOutput, P, T>(tokens, product, begin, begin + part, part, 0);
  } else {
    for (int64_t panel = begin; panel < begin + part; ++panel) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t token = tokens * i / tiles;
        tiles_of<kOutput, P, T>(tokens * (i + 1) / tiles - token, product, panel, panel + 1, part, token);
      }
    }
  }
  if constexpr (P > 1) panels<kOutput, P / 2, T>(product, begin + part * P, end);
}

template <Output kOutput, typename Value>
void run(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, Value* y, int64_t y_stride) {
  for_chunks(w, x, y, y_stride, [=](const Product& product) {
    // 32 registers: few tokens leave room for four panels, which share the loads of activations.
    if (product.x.tokens <= 5) {
      panels<kOutput, 4, 5>(product, begin, end);
    } else {
      panels<kOutput, 2, kTileTokens>(product, begin, end);
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

WF_INLINE __mmask16 columns_left(int64_t columns) { return static_cast<__mmask16>(columns >= 16 ? 0xffff : (1 << columns) - 1); }

bool quantize(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < columns; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(columns_left(columns - i), x + i));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t top = _mm512_reduce_max_epu32(largest);
  if (top >= 0x7f800000U) return false;
  float absmax;
  std::memcpy(&absmax, &top, 4);
  const float inverse = 1.0F / (absmax < 1e-5F ? 1e-5F : absmax) * 127.0F;
  *scale = 1.0F / inverse;
  const __m512 factor = _mm512_set1_ps(inverse);
  for (int64_t group = 0; group * kGroup < columns; ++group) {
    const int64_t end = least((group + 1) * kGroup, columns);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = group * kGroup; i < end; i += 16) {
      const __mmask16 mask = columns_left(end - i);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor));
      sum = _mm512_add_epi32(sum, q);
      _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, q);
    }
    sums[group] = _mm512_reduce_add_epi32(sum);
  }
  std::memset(codes + columns, 0, static_cast<size_t>(stride - columns));
  return true;
}

}  // namespace

const Kernels kAvx512{Isa::avx512, quantize, matmul, matmul_integer};

}  // namespace wf
