// The tile registers of AMX: eight of up to 16 rows of 64 bytes. Included by files of that instruction set.
//
// By asm, because the intrinsics of gcc 12 do not say that they read and write memory.
#pragma once

#include <immintrin.h>

#include "ternary/chunks.h"

namespace wf {
namespace {

constexpr int64_t kTileLines = 16;  // rows of a tile at most
constexpr int64_t kTileBytes = 64;  // of a row at most

// The tiles' shapes. Those of sums come first: for each token 16 numbers of four bytes. From `first_x` on there are activations of so many
// columns, a row a token, and from `first_codes` on weights, a row for four columns: the codes of 16 rows.
class TileShapes {
 public:
  TileShapes(int64_t tokens, int64_t columns, int first_x, int first_codes) {
    for (int i = 0; i < 8; ++i) {
      rows_[i] = static_cast<uint8_t>(i < first_codes ? tokens : columns / 4);
      row_bytes_[i] = static_cast<uint16_t>(i >= first_x && i < first_codes ? columns : kTileBytes);
    }
  }

 private:
  uint8_t palette_ = 1, start_row_ = 0, reserved_[14] = {};
  uint16_t row_bytes_[16] = {};
  uint8_t rows_[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// Tiles in use, as long as it lives. Afterwards they cost the operating system nothing when it switches threads.
class Tiles {
 public:
  WF_INLINE explicit Tiles(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
  WF_INLINE ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int kTile>
WF_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows are `stride` bytes apart.
template <int kTile>
WF_INLINE void tile_load(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
WF_INLINE void tile_store(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}

// sums += signed x times unsigned codes
template <int kSums, int kX, int kCodes>
WF_INLINE void tile_dot_unsigned() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kCodes));
}

// sums += signed x times signed codes
template <int kSums, int kX, int kCodes>
WF_INLINE void tile_dot() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kCodes));
}

}  // namespace
}  // namespace wf
