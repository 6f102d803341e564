#include "ternary/blocks.h"

#include <cstring>

#include "ternary/half.h"
#include "ternary/words.h"

namespace wf {
namespace {

constexpr int64_t kQ6Groups = 320, kQ6Group = 192;  // where a block's groups begin, and bytes of each

float to_float(const uint8_t* half) {
  uint16_t bits;
  std::memcpy(&bits, half, 2);
  return half_to_float(bits);
}

// Compilers turn operations on these into those of whatever vectors a processor has.
using Sixteen = uint8_t __attribute__((vector_size(16)));

// Rows of 16 bytes become columns: of the sixteen registers, four times, one half is interleaved with the other.
void transpose(Sixteen (&rows)[16]) {
  Sixteen other[16];
  const auto interleave = [](const Sixteen (&from)[16], Sixteen (&to)[16]) {
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  };
  interleave(rows, other);
  interleave(other, rows);
  interleave(rows, other);
  interleave(other, rows);
}

// Sixteen bytes of sixteen rows, from `at` on, written column by column.
void pack_columns(const uint8_t* const (&rows)[16], int64_t at, uint8_t* out) {
  Sixteen columns[16];
  for (int r = 0; r < 16; ++r) std::memcpy(&columns[r], rows[r] + at, 16);
  transpose(columns);
  std::memcpy(out, columns, sizeof columns);
}

// Sixteen rows' two bytes from `at` on, side by side.
void pack_halves(const uint8_t* const (&rows)[16], int64_t at, uint8_t* out) {
  for (int r = 0; r < 16; ++r) std::memcpy(out + 2 * r, rows[r] + at, 2);
}

void pack_q6_k(const uint8_t* const (&rows)[16], uint8_t* block) {
  constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = 0xf0f0f0f0;
  pack_halves(rows, 208, block);
  pack_columns(rows, 192, block + 32);
  for (int quarter = 0; quarter < 4; ++quarter) {
    const uint8_t* const four[4] = {rows[4 * quarter], rows[4 * quarter + 1], rows[4 * quarter + 2], rows[4 * quarter + 3]};
    uint8_t* groups = block + kQ6Groups + 16 * quarter;
    for (int part = 0; part < 4; ++part) {  // 64 columns: of 128 a half, and of each 32 of these a half
      uint8_t* first = groups + (part / 2 * 8 + part % 2) * kQ6Group;  // every second one of eight
      Words high[4];
      load_words(four, 128 + 16 * part, high);
      transpose_pairs(high);
      for (int group = 0; group < 4; ++group) std::memcpy(first + 2 * group * kQ6Group + 128, &high[group], 16);
      for (int side = 0; side < 2; ++side) {
        Words low[4];
        load_words(four, part / 2 * 64 + side * 32 + part % 2 * 16, low);
        uint8_t *below = first + 2 * side * kQ6Group, *above = first + 2 * (side + 2) * kQ6Group;  // of the nibbles
        for (int i = 0; i < 2; ++i) {
          const Words lower = (low[i] & kLow) | (low[i + 2] << 4 & kHigh), upper = (low[i] >> 4 & kLow) | (low[i + 2] & kHigh);
          std::memcpy(below + 64 * i, &lower, 16);
          std::memcpy(above + 64 * i, &upper, 16);
        }
      }
    }
  }
}

// Calls `use(column, weight)` for the weights [begin, end) of a row.
template <typename Use>
void each_weight(const BlockMatrix& w, int64_t row, int64_t begin, int64_t end, Use use) {
  const uint8_t* panel = w.data + row / kPanelRows * w.panel_bytes();
  row %= kPanelRows;
  for (int64_t column = begin; column < end; ++column) {
    const uint8_t* block = panel + column / w.block_columns() * w.block_bytes();
    const float scale = to_float(block + 2 * row);
    const int64_t inside = column % w.block_columns();
    switch (w.type) {
      case BlockType::q8_0:
        use(column, scale * static_cast<float>(static_cast<int8_t>(block[32 + inside * 16 + row])));
        break;
      case BlockType::q4_1: {
        const int code = block[64 + inside % 16 * 16 + row] >> inside / 16 * 4 & 15;
        use(column, scale * static_cast<float>(code) + to_float(block + 32 + 2 * row));
        break;
      }
      case BlockType::q6_k: {
        const uint8_t* group = block + kQ6Groups + inside / 16 * kQ6Group;
        const int64_t j = inside % 16;
        const int low = group[j / 4 % 2 * 64 + 4 * row + j % 4] >> j / 8 * 4 & 15, high = group[128 + 4 * row + j % 4] >> j / 4 * 2 & 3;
        use(column, scale * static_cast<float>(static_cast<int8_t>(block[32 + inside / 16 * 16 + row])) * static_cast<float>((low | high << 4) - 32));
        break;
      }
    }
  }
}

}  // namespace

int64_t row_bytes(BlockType type, int64_t columns) {
  const BlockMatrix w{nullptr, 1, columns, type};
  return columns % w.block_columns() == 0 ? w.blocks() * w.row_bytes() : 0;
}

void pack_panels(const BlockMatrix& w, const uint8_t* data, int64_t begin, int64_t end, uint8_t* out) {
  static constexpr uint8_t kZeros[256] = {};  // stands for the rows beyond the last
  const int64_t own_bytes = w.row_bytes();
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const uint8_t* rows[16];
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = panel * kPanelRows + r;
        rows[r] = row < w.rows ? data + (row * w.blocks() + b) * own_bytes : kZeros;
      }
      uint8_t* block = out + panel * w.panel_bytes() + b * w.block_bytes();
      switch (w.type) {
        case BlockType::q6_k:
          pack_q6_k(rows, block);
          break;
        case BlockType::q8_0:
          pack_halves(rows, 0, block);
          pack_columns(rows, 2, block + 32);
          pack_columns(rows, 18, block + 288);
          break;
        case BlockType::q4_1:
          pack_halves(rows, 0, block);
          pack_halves(rows, 2, block + 32);
          pack_columns(rows, 4, block + 64);
          break;
      }
    }
  }
}

void pack_blocks(BlockType type, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
  const BlockMatrix w{out, rows, columns, type};
  pack_panels(w, data, 0, w.panels(), out);
}

void unpack_row(const BlockMatrix& w, int64_t row, float* out) {
  unpack_columns(w, row, 0, w.columns, out);
}

void unpack_columns(const BlockMatrix& w, int64_t row, int64_t begin, int64_t end, float* out) {
  each_weight(w, row, begin, end, [=](int64_t column, float weight) { out[column - begin] = weight; });
}

int64_t float_bytes(const BlockMatrix& w, int64_t tokens) { return tokens * (w.columns + w.groups()) * static_cast<int64_t>(sizeof(float)); }

void arrange_floats(const BlockMatrix& w, const float* x, int64_t tokens, void* out) {
  float *floats = static_cast<float*>(out), *sums = floats + tokens * w.columns;
  for (int64_t tile = 0; tile < token_tiles(tokens); ++tile) {
    const int64_t first = tile_begin(tokens, tile), count = tile_begin(tokens, tile + 1) - first;
    for (int64_t t = 0; t < count; ++t) {
      const float* from = x + (first + t) * w.columns;
      float *to = floats + first * w.columns + t, *group_sums = sums + first * w.groups() + t;
      for (int64_t group = 0; group < w.groups(); ++group) {
        float sum = 0.0F;
        for (int64_t i = 0; i < w.group_columns(); ++i, ++from, to += count) sum += *to = *from;
        group_sums[group * count] = sum;
      }
    }
  }
}

}  // namespace wf
