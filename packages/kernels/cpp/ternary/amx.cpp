// AMX: a tile of 16 tokens and 64 columns times a tile of 64 columns and 16 rows in one instruction, for several tokens.
// One token and scales of 128 columns stay with AVX-512, which every processor with tiles has.
//
// A tile of weights is what four blocks of a panel become when each plane gets a register's bytes of its own: the processor wants four
// neighbouring columns of 16 rows in each of its 16 rows, and so the blocks have them.
#include <immintrin.h>

#include <memory>
#include <new>

#include "ternary/chunks.h"

namespace wf {
namespace {

constexpr int64_t kTileRows = 16, kTileColumns = 64, kTileBytes = 1024;
constexpr int64_t kTileBlocks = kTileColumns / kBlockColumns;
constexpr int64_t kLeastTokens = 8;            // fewer are done sooner with AVX-512
constexpr int64_t kPairTokens = 2 * kTileRows;  // that share a load of weights
constexpr int64_t kUnpackedBytes = 256 << 10;  // of weights for several pairs of token tiles: they stay in the second-level cache
constexpr int64_t kSliceTiles = kUnpackedBytes / (2 * kTileBytes);  // of a panel, where two panels do not fit
constexpr int64_t kFewTiles = 8;               // of a panel for one pair of token tiles: they stay in the first-level cache
constexpr int kPrefetch = 2048;                // bytes ahead

// Tiles by number. Sums: 0 and 1 of the first 16 tokens with two panels, 2 and 3 of the next 16. Activations: 4 and 5. Weights: 6 and 7.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  Shapes(int64_t first, int64_t second) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = kTileColumns;
      rows[i] = static_cast<uint8_t>(i >= 6 ? kTileRows : i == 2 || i == 3 || i == 5 ? (second > 0 ? second : 1) : first);
    }
  }
};

// Before and after tile instructions: gcc does not know what memory they read and write.
WF_INLINE void settle(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// Gives every plane of a panel's blocks bytes of its own, and fills up the last tile with zeros.
void unpack_tiles(const uint8_t* codes, int64_t blocks, int64_t tiles, uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(3);
  for (int64_t block = 0; block < blocks; ++block, codes += kBlockBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch), _MM_HINT_T0);
    __m512i planes = _mm512_load_si512(codes);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k, out += 64) {
      _mm512_store_si512(out, _mm512_and_si512(planes, mask));
      planes = _mm512_srli_epi32(planes, 2);
    }
  }
  for (int64_t i = 4 * blocks; i < 16 * tiles; ++i, out += 64) _mm512_store_si512(out, _mm512_setzero_si512());
}

// Adds activations times weights of so many tiles to the sums: of 16 tokens at most, or of kTwo such tiles of tokens, with two panels.
template <bool kTwo>
WF_INLINE void add_products(const int8_t* first, const int8_t* second, int64_t stride, const uint8_t* a, const uint8_t* b, int64_t tiles) {
  for (int64_t i = 0; i < tiles; ++i) {
    _tile_loadd(4, first + i * kTileColumns, stride);
    _tile_loadd(6, a + i * kTileBytes, 64);
    _tile_loadd(7, b + i * kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, second + i * kTileColumns, stride);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
}

// Writes the results of some tokens with one panel.
template <Output kOutput>
void write(const Product& product, const int32_t* sums, int64_t panel, int64_t token, int64_t tokens) {
  const TernaryMatrix& w = product.w;
  const int64_t left = w.rows - panel * kPanelRows;
  const auto rows = static_cast<__mmask16>(left >= kPanelRows ? 0xffff : (1 << left) - 1);
  for (const int64_t end = token + tokens; token < end; ++token, sums += kPanelRows) {
    const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums), _mm512_set1_epi32(product.totals[token]));
    if constexpr (kOutput == Output::integer) {
      _mm512_mask_storeu_epi32(result<int32_t>(product, panel, token), rows, sum);
    } else {
      const __m512 scale = w.granularity == Granularity::row ? _mm512_maskz_loadu_ps(rows, w.scales + panel * kPanelRows)
                                                             : _mm512_set1_ps(w.scales[0]);
      const __m512 both = _mm512_mul_ps(_mm512_set1_ps(product.x.scales[token]), scale);
      _mm512_mask_storeu_ps(result<float>(product, panel, token), rows, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), both));
    }
  }
}

// The sums of a pair of token tiles with a pair of panels, in memory.
using Sums = int32_t[4][kTileBytes / 4];

void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void load_sums(const Sums& sums) {
  _tile_loadd(0, sums[0], 64);
  _tile_loadd(1, sums[1], 64);
  _tile_loadd(2, sums[2], 64);
  _tile_loadd(3, sums[3], 64);
}

void store_sums(Sums& sums) {
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  settle(sums);
}

// What a product needs beside its arguments: too much for some threads' stacks.
struct alignas(64) Scratch {
  uint8_t unpacked[kUnpackedBytes];
  Sums sums[kChunkTokens / kPairTokens];
};

// Panels [begin, end) of a chunk: as many of them as fit are unpacked, then all tokens pass, so that results are written in longer
// pieces. Wide rows are unpacked in slices, between which sums wait in memory; with one pair of token tiles they stay where they are.
template <Output kOutput>
void panels(const Product& product, int64_t begin, int64_t end, Scratch& scratch) {
  auto& [unpacked, sums] = scratch;
  const TernaryMatrix& w = product.w;
  const int64_t blocks = w.blocks(), tiles = ceil_div(blocks, kTileBlocks), tokens = product.x.tokens, stride = product.x.stride;
  const int64_t parts = ceil_div(tokens, kTileRows), pairs = ceil_div(parts, 2);
  const int64_t slice = least(tiles, pairs == 1 ? kFewTiles : kSliceTiles);
  const int64_t group = pairs == 1 ? 2 : kUnpackedBytes / (slice * kTileBytes) / 2 * 2;
  int64_t shaped[2] = {-1, -1};
  for (int64_t panel = begin; panel < end; panel += group) {
    const int64_t count = least(group, end - panel);
    for (int64_t from = 0; from < tiles; from += slice) {
      const int64_t now = least(slice, tiles - from), first_block = from * kTileBlocks;
      const bool last = from + now == tiles;
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* codes = w.codes + ((panel + i) * blocks + first_block) * kBlockBytes;
        unpack_tiles(codes, least(now * kTileBlocks, blocks - first_block), now, unpacked + i * slice * kTileBytes);
      }
      settle(unpacked);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        // The token that each of the pair's tiles begins with, and the one behind them: parts of nearly the same size.
        const int64_t at[3] = {tokens * (2 * pair) / parts, tokens * (2 * pair + 1) / parts, tokens * least(2 * pair + 2, parts) / parts};
        const int64_t sizes[2] = {at[1] - at[0], at[2] - at[1]};
        if (sizes[0] != shaped[0] || sizes[1] != shaped[1]) {
          const Shapes shapes(sizes[0], sizes[1]);
          settle(&shapes);
          _tile_loadconfig(&shapes);
          shaped[0] = sizes[0];
          shaped[1] = sizes[1];
        }
        const int8_t* x = product.x.codes + at[0] * stride + from * kTileColumns;
        for (int64_t i = 0; i < count; i += 2) {
          const bool wide = i + 1 < count;  // else the one panel is multiplied twice
          const uint8_t* a = unpacked + i * slice * kTileBytes;
          const uint8_t* b = wide ? a + slice * kTileBytes : a;
          if (from == 0) {
            clear_sums();
          } else if (pairs > 1) {
            load_sums(sums[pair]);
          }
          if (sizes[1] > 0) {
            add_products<true>(x, x + sizes[0] * stride, stride, a, b, now);
          } else {
            add_products<false>(x, nullptr, stride, a, b, now);
          }
          if (!last && pairs == 1) continue;
          store_sums(sums[pair]);
          for (int64_t j = 0; last && j < (wide ? 2 : 1); ++j) {
            write<kOutput>(product, sums[pair][j], panel + i + j, at[0], sizes[0]);
            write<kOutput>(product, sums[pair][2 + j], panel + i + j, at[1], sizes[1]);
          }
        }
      }
    }
  }
  _tile_release();
}

// Returns whether there was memory for it.
template <Output kOutput, typename Value>
bool run(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, Value* y, int64_t y_stride) {
  const std::unique_ptr<Scratch> scratch(new (std::nothrow) Scratch);
  if (scratch == nullptr) return false;
  for_chunks(w, x, y, y_stride, [&](const Product& product) { panels<kOutput>(product, begin, end, *scratch); });
  return true;
}

void matmul(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const bool suits = x.tokens >= kLeastTokens && w.granularity != Granularity::group;
  if (!suits || !run<Output::scaled>(w, x, begin, end, y, y_stride)) kAvx512.matmul(w, x, begin, end, y, y_stride);
}

void matmul_integer(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y, int64_t y_stride) {
  const bool suits = x.tokens >= kLeastTokens;
  if (!suits || !run<Output::integer>(w, x, begin, end, y, y_stride)) kAvx512.matmul_integer(w, x, begin, end, y, y_stride);
}

bool quantize(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums) {
  return kAvx512.quantize(x, columns, stride, codes, scale, sums);
}

}  // namespace

const Kernels kAmx{Isa::amx, quantize, matmul, matmul_integer};

}  // namespace wf
