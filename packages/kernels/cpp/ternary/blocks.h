// Matrices of 8, 6 and 4 bits with scales for short groups, for embeddings and heads: llama.cpp's Q8_0, Q6_K and Q4_1 in another order.
//
// Panels of 16 rows follow each other, in a panel its blocks, and in a block what a register of 16 rows wants next to each other:
//
//   q8_0  32 columns, 544 bytes:  f16 scale[16 rows], int8 code[32 columns][16 rows];                          w = scale * code
//   q4_1  32 columns, 320 bytes:  f16 scale[16], f16 least[16], byte [16][16 rows] of columns j and j + 16;    w = scale * code + least
//   q6_k 256 columns, 3392 bytes: f16 scale[16], int8 factor[16 groups of 16 columns][16 rows], 32 bytes of nothing, then for each group 192
//                                 bytes: byte low[2][16 rows][4] of columns 4i + j and 8 + 4i + j, byte high[16 rows][4] of columns j,
//                                 j + 4, j + 8, j + 12: four neighbours in a lane, of which shifts and masks make floats;
//                                 w = scale * factor * (code - 32)
//
// Training multiplies the head's floats with unquantised activations. Activations of 16 bits miss that by more than 1e-5 of the largest
// logit, whether they have a scale a token or a group: here they are float32, or whole numbers of 24 bits (blocks_digits.h).
#pragma once

#include <cstdint>

#include "ternary/ternary.h"

namespace wf {

enum class BlockType : int { q8_0, q6_k, q4_1 };

// A packed matrix. Memory is the caller's, aligned to 64 bytes.
struct BlockMatrix {
  const uint8_t* data;
  int64_t rows, columns;
  BlockType type;

  int64_t block_columns() const { return type == BlockType::q6_k ? 256 : 32; }
  int64_t block_bytes() const { return type == BlockType::q6_k ? 3392 : type == BlockType::q8_0 ? 544 : 320; }
  int64_t row_bytes() const { return type == BlockType::q6_k ? 210 : block_bytes() / kPanelRows; }  // of a block in llama.cpp's rows
  int64_t group_columns() const { return type == BlockType::q6_k ? 16 : 32; }
  int64_t blocks() const { return columns / block_columns(); }
  int64_t groups() const { return columns / group_columns(); }
  int64_t panels() const { return ceil_div(rows, kPanelRows); }
  int64_t panel_bytes() const { return blocks() * block_bytes(); }
  int64_t bytes() const { return panels() * panel_bytes(); }
};

// Activations of some tokens as an instruction set's kernels want them, who alone know what it is.
struct BlockActivations {
  const void* data;  // aligned to 64 bytes
  int64_t tokens;
};

// Float32 activations, in tiles of tokens that share a weight on its way to a float: a column's tokens are neighbours.
struct FloatActivations {
  const float* x;     // of each tile [columns, tokens of the tile]
  const float* sums;  // the sum of each group's columns, of each tile [groups(), tokens of the tile]
  int64_t tokens;

  FloatActivations(const BlockMatrix& w, const BlockActivations& from)
      : x(static_cast<const float*>(from.data)), sums(x + from.tokens * w.columns), tokens(from.tokens) {}
};

constexpr int64_t kBlockTokens = 8;  // of a tile at most
constexpr int64_t token_tiles(int64_t tokens) { return ceil_div(tokens, kBlockTokens); }
constexpr int64_t tile_begin(int64_t tokens, int64_t tile) { return tokens * tile / token_tiles(tokens); }

// Makes what FloatActivations reads of x [tokens, columns], in so many bytes.
int64_t float_bytes(const BlockMatrix& w, int64_t tokens);
void arrange_floats(const BlockMatrix& w, const float* x, int64_t tokens, void* out);

// Bytes of a row as llama.cpp has it, or 0 where the type cannot have rows of so many columns.
int64_t row_bytes(BlockType type, int64_t columns);

// From llama.cpp's rows. `out` holds `bytes()`; rows beyond the last are zero.
void pack_blocks(BlockType type, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out);

// The panels [begin, end) of the same; `w` says the shape.
void pack_panels(const BlockMatrix& w, const uint8_t* data, int64_t begin, int64_t end, uint8_t* out);

// One row in float32, as an embedding looks it up.
void unpack_row(const BlockMatrix& w, int64_t row, float* out);

// The columns [begin, end) of a row.
void unpack_columns(const BlockMatrix& w, int64_t row, int64_t begin, int64_t end, float* out);

}  // namespace wf
