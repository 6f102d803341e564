// Products of digits (blocks_digits.h) in tiles: for each group of columns three, of up to 16 tokens and 16 rows. Q6_K's groups, of 16 columns,
// fill a quarter of a tile: they are left to AVX-512.
#include "ternary/amx.h"
#include "ternary/blocks_digits.h"

namespace wf {
namespace {

constexpr int kTilePrefetch = 2048;
// Tokens that three tiles have to have to be faster than `vpdpbusd`: how many they have costs tiles nothing.
constexpr int64_t kLeastDigitTokens = 12;
using Sums = int32_t[3][kTileLines][16];  // of a group: high, middle, low

// A panel with `tokens` tokens from `token` on. What a group's tiles hold is unpacked while the one before is multiplied, and its sums
// are taken up while the next one is: what was written has to reach the cache before a tile reads it, and the other way round.
template <typename Type>
void tile_panel(const BlockMatrix& w, const DigitActivations& x, int64_t panel, int64_t token, int64_t tokens, float* y, int64_t y_stride) {
  static_assert(Type::kGroups == 1, "a block is a group");
  constexpr int64_t kToken = 3 * Type::kColumns;
  const int64_t groups = w.groups();
  const uint8_t* data = w.data + panel * w.panel_bytes();
  alignas(64) uint8_t codes[2][Type::kColumns / 4][kTileBytes];
  alignas(64) Sums sums[2];
  __m512 totals[kTileLines];  // those beyond `tokens` are of anything
#pragma GCC unroll 16
  for (__m512& total : totals) total = _mm512_setzero_ps();
  const auto unpack = [&](int64_t group) {
    const uint8_t* block = data + group * Type::kBytes;
    for (int line = 0; line < Type::kBytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(block + line + kTilePrefetch), _MM_HINT_T0);
    Type::template codes<true>(block, 0, [&](int i, __m512i four) { _mm512_store_si512(codes[group % 2][i], four); });
  };
  const auto take = [&](int64_t group) {
    const uint8_t* block = data + group * Type::kBytes;
    const __m512 scale = Type::scale(block, 0);
    const Sums& of = sums[group % 2];
    const DigitGroup* of_tokens = x.groups + group * x.tokens + token;
#pragma GCC unroll 16
    for (int t = 0; t < kTileLines; ++t) {
      totals[t] = gain(totals[t], scale, _mm512_load_si512(of[0][t]), _mm512_load_si512(of[1][t]), _mm512_load_si512(of[2][t]), of_tokens[t]);
      totals[t] = Type::add_least(block, totals[t], of_tokens[t]);
    }
  };
  unpack(0);
  for (int64_t group = 0; group < groups; ++group) {
    if (group + 1 < groups) unpack(group + 1);
    const int8_t* digits = x.digits + (group * x.tokens + token) * kToken;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_load<6>(codes[group % 2], kTileBytes);
    tile_load<3>(digits, kToken);
    tile_dot<0, 3, 6>();
    tile_load<4>(digits + Type::kColumns, kToken);
    tile_dot<1, 4, 6>();
    tile_load<5>(digits + 2 * Type::kColumns, kToken);
    tile_dot<2, 5, 6>();
    tile_store<0>(sums[group % 2][0], kTileBytes);
    tile_store<1>(sums[group % 2][1], kTileBytes);
    tile_store<2>(sums[group % 2][2], kTileBytes);
    if (group > 0) take(group - 1);
  }
  take(groups - 1);
  const int64_t row = panel * kPanelRows;
#pragma GCC unroll 16
  for (int t = 0; t < kTileLines; ++t) {
    if (t < tokens) _mm512_mask_storeu_ps(y + (token + t) * y_stride + row, rows_from(w, row), totals[t]);
  }
}

// The last tile of tokens overlaps the one before it.
template <typename Type>
void tile_panels(const BlockMatrix& w, const DigitActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const int64_t tokens = least(x.tokens, kTileLines);
  const Tiles tiles(TileShapes(tokens, Type::kColumns, 3, 6));
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t token = 0; token < x.tokens; token += kTileLines) {
      tile_panel<Type>(w, x, panel, least(token, x.tokens - tokens), tokens, y, y_stride);
    }
  }
}

}  // namespace

void matmul_digits_in_tiles(const BlockMatrix& w, const BlockActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (w.type == BlockType::q6_k || x.tokens < kLeastDigitTokens * ceil_div(x.tokens, kTileLines)) {
    return matmul_digits(w, x, begin, end, y, y_stride);
  }
  const DigitActivations digits(w, x);
  if (w.type == BlockType::q8_0) return tile_panels<Q8Digits>(w, digits, begin, end, y, y_stride);
  tile_panels<Q4Digits>(w, digits, begin, end, y, y_stride);
}

}  // namespace wf
