// AVX-512 with AMX: a tile of 16 tokens times 64 columns of 16 rows an instruction, eight times as many products as `vpdpbusd` makes.
//
// Four blocks of weights, unpacked into 16 planes of 64 bytes (ternary.h), are a tile as they are: a row of it has four neighbouring
// columns of 16 rows. A tile of activations is 64 columns of 16 tokens where they lie. Sums are integers, so that they are those of
// every other set. What tiles do not pay for, few tokens and a scale a group, is left to AVX-512.
#include "ternary/amx.h"

namespace wf {
namespace {

constexpr int64_t kStepBlocks = 4;  // 64 columns
constexpr int kPrefetch = 2048;     // bytes ahead in each of the streams
constexpr int64_t kCodesBytes = 256 << 10;  // of weights that stay in the second-level cache while tokens pass
constexpr int64_t kLeastTokens = 4;  // fewer are left to AVX-512: a tile takes the same time whatever it holds

// Unpacked weights of a step. Two of them take turns: a tile cannot be loaded before its rows have reached the cache.
template <int P>
struct alignas(64) Planes {
  uint8_t of[2][P][kTileLines][kTileBytes];
};

// Unpacks up to four blocks. Where the last step has fewer, the other planes hold anything: their activations are zero.
WF_INLINE void unpack_step(const uint8_t* codes, int64_t blocks, uint8_t (&planes)[kTileLines][kTileBytes]) {
  const __m512i mask = _mm512_set1_epi8(3);
#pragma GCC unroll 4
  for (int b = 0; b < kStepBlocks; ++b) {
    if (b >= blocks) return;
    _mm_prefetch(reinterpret_cast<const char*>(codes + b * kBlockBytes + kPrefetch), _MM_HINT_T0);
    const __m512i block = _mm512_load_si512(codes + b * kBlockBytes);
    _mm512_store_si512(planes[4 * b], _mm512_and_si512(block, mask));
    _mm512_store_si512(planes[4 * b + 1], _mm512_and_si512(_mm512_srli_epi32(block, 2), mask));
    _mm512_store_si512(planes[4 * b + 2], _mm512_and_si512(_mm512_srli_epi32(block, 4), mask));
    _mm512_store_si512(planes[4 * b + 3], _mm512_and_si512(_mm512_srli_epi32(block, 6), mask));
  }
}

WF_INLINE __mmask16 rows_left(const TernaryMatrix& w, int64_t panel) {
  return static_cast<__mmask16>((1U << least(w.rows - panel * kPanelRows, kPanelRows)) - 1);
}

// The results of a tile of sums: `tokens` from `token` on, 16 rows.
template <Output kOutput>
void finish(const Product& product, int64_t panel, int64_t token, int64_t tokens, const int32_t (&sums)[kTileLines][16]) {
  const TernaryMatrix& w = product.w;
  const __mmask16 rows = rows_left(w, panel);
  const __m512 scale = w.granularity == Granularity::row ? _mm512_maskz_loadu_ps(rows, w.scales + panel * kPanelRows)
                                                         : _mm512_set1_ps(w.scales[0]);
  for (int64_t t = 0; t < tokens; ++t) {
    const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums[t]), _mm512_set1_epi32(product.totals[token + t]));
    if constexpr (kOutput == Output::integer) {
      _mm512_mask_storeu_epi32(result<int32_t>(product, panel, token + t), rows, sum);
    } else {
      const __m512 both = _mm512_mul_ps(_mm512_set1_ps(product.x.scales[token + t]), scale);
      _mm512_mask_storeu_ps(result<float>(product, panel, token + t), rows, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), both));
    }
  }
}

// P panels, `hop` apart, with T tiles of `tokens` tokens, the first from `first` on and the second from `second` on. Sums are in the
// tiles 2p + t or p, activations in 4 + t, weights in the last ones.
template <Output kOutput, int P, int T>
void tile(const Product& product, int64_t panel, int64_t hop, int64_t tokens, int64_t first, int64_t second) {
  const TernaryMatrix& w = product.w;
  const int64_t blocks = w.blocks(), stride = product.x.stride, hop_bytes = hop * blocks * kBlockBytes;
  const uint8_t* codes = w.codes + panel * blocks * kBlockBytes;
  const int8_t *x = product.x.codes + first * stride, *other = product.x.codes + second * stride;
  Planes<P> planes;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  const auto unpack = [&](int64_t block, int turn) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) unpack_step(codes + p * hop_bytes + block * kBlockBytes, blocks - block, planes.of[turn][p]);
  };
  unpack(0, 0);
  for (int64_t block = 0, turn = 0; block < blocks; block += kStepBlocks, turn ^= 1) {
    if (block + kStepBlocks < blocks) unpack(block + kStepBlocks, static_cast<int>(turn ^ 1));
    const auto& of = planes.of[turn];
    tile_load<4>(x + block * kBlockColumns, stride);
    if constexpr (T == 2) {
      tile_load<5>(other + block * kBlockColumns, stride);
      tile_load<6>(of[0], kTileBytes);
      tile_dot_unsigned<0, 4, 6>();
      tile_dot_unsigned<1, 5, 6>();
      if constexpr (P == 2) {
        tile_load<7>(of[1], kTileBytes);
        tile_dot_unsigned<2, 4, 7>();
        tile_dot_unsigned<3, 5, 7>();
      }
    } else {
      tile_load<6>(of[0], kTileBytes);
      tile_dot_unsigned<0, 4, 6>();
      if constexpr (P == 4) {
        tile_load<7>(of[1], kTileBytes);
        tile_dot_unsigned<1, 4, 7>();
        tile_load<6>(of[2], kTileBytes);
        tile_dot_unsigned<2, 4, 6>();
        tile_load<7>(of[3], kTileBytes);
        tile_dot_unsigned<3, 4, 7>();
      }
    }
  }
  alignas(64) int32_t sums[4][kTileLines][16];
  tile_store<0>(sums[0], kTileBytes);
  tile_store<1>(sums[1], kTileBytes);
  tile_store<2>(sums[2], kTileBytes);
  tile_store<3>(sums[3], kTileBytes);
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < T; ++t) finish<kOutput>(product, panel + p * hop, t == 0 ? first : second, tokens, sums[p * T + t]);
  }
}

// One tile of tokens, with panels [begin, end) in P streams, far from each other (avx512.cpp).
template <Output kOutput, int P>
void streams(const Product& product, int64_t begin, int64_t end, int64_t tokens, int64_t token) {
  const int64_t part = (end - begin) / P;
  for (int64_t panel = begin; panel < begin + part; ++panel) tile<kOutput, P, 1>(product, panel, part, tokens, token, 0);
  if constexpr (P > 1) streams<kOutput, 1>(product, begin + part * P, end, tokens, token);
}

// Many tokens, two tiles of them with all panels whose codes stay in the second-level cache: their results are then written in the order
// in which memory has them, which takes a third of the time where they are too many for the caches. The last tile overlaps the one
// before it.
template <Output kOutput>
void panels(const Product& product, int64_t begin, int64_t end) {
  const int64_t all = product.x.tokens, tiles = ceil_div(all, kTileLines);
  const int64_t fit = kCodesBytes / (product.w.blocks() * kBlockBytes), some = fit < 4 ? 4 : fit / 4 * 4;
  const auto start = [&](int64_t i) { return least(i * kTileLines, all - kTileLines); };
  for (int64_t first = begin; first < end; first += some) {
    const int64_t last = least(first + some, end);
    int64_t i = 0;
    for (; i + 1 < tiles; i += 2) {
      int64_t panel = first;
      for (; panel + 2 <= last; panel += 2) tile<kOutput, 2, 2>(product, panel, 1, kTileLines, start(i), start(i + 1));
      if (panel < last) tile<kOutput, 1, 2>(product, panel, 0, kTileLines, start(i), start(i + 1));
    }
    if (i < tiles) streams<kOutput, 4>(product, first, last, kTileLines, start(i));
  }
}

template <Output kOutput, typename Value>
void run(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, Value* y, int64_t y_stride) {
  for_chunks(w, x, y, y_stride, [=](const Product& product) {
    const int64_t tokens = least(product.x.tokens, kTileLines);
    const Tiles tiles(TileShapes(tokens, kStepBlocks * kBlockColumns, 4, 6));
    if (product.x.tokens <= kTileLines) {
      streams<kOutput, 4>(product, begin, end, tokens, 0);
    } else {
      panels<kOutput>(product, begin, end);
    }
  });
}

void matmul(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (x.tokens < kLeastTokens || w.granularity == Granularity::group) return kAvx512.matmul(w, x, begin, end, y, y_stride);
  run<Output::scaled>(w, x, begin, end, y, y_stride);
}

void matmul_integer(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y, int64_t y_stride) {
  if (x.tokens < kLeastTokens) return kAvx512.matmul_integer(w, x, begin, end, y, y_stride);
  run<Output::integer>(w, x, begin, end, y, y_stride);
}

bool quantize(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums) {
  return kAvx512.quantize(x, columns, stride, codes, scale, sums);
}

}  // namespace

const Kernels kAmx{Isa::amx, quantize, matmul, matmul_integer};

}  // namespace wf
